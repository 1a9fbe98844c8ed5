"""What the server counts, as Prometheus reads it."""

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SPEED_WINDOW_S = 10
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters in a registry of their own: several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.throughput = Throughput()
        self.requests = Counter(
            "step35_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("step35_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.cached_tokens = Counter(
            "step35_cached_tokens", "Tokens of prompts that came from the cache.", registry=self.registry
        )
        self.generated_tokens = Counter("step35_generated_tokens", "Tokens generated.", registry=self.registry)
        self.prefill_seconds = Counter("step35_prefill_seconds", "Time in steps with prompts.", registry=self.registry)
        self.decode_seconds = Counter(
            "step35_decode_seconds", "Time in steps of answers alone.", registry=self.registry
        )
        self.drafted = Counter(
            "step35_drafted_tokens", "Tokens drafted by each MTP head.", ["head"], registry=self.registry
        )
        self.accepted = Counter(
            "step35_accepted_tokens", "Drafts accepted of each MTP head.", ["head"], registry=self.registry
        )
        self.joined = Counter(
            "step35_joined_requests", "Retries that joined a running request.", registry=self.registry
        )
        self.refused = Counter(
            "step35_refused_requests", "Requests refused because the queue was full.", registry=self.registry
        )
        self.first_token = Histogram(
            "step35_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue = Gauge("step35_queue_length", "Requests that wait.", registry=self.registry)
        self.running = Gauge("step35_running", "Requests that run.", registry=self.registry)
        self.cells_used = Gauge("step35_context_cells_used", "Tokens in the KV cache.", registry=self.registry)
        self.cells = Gauge("step35_context_cells", "Tokens that the KV cache holds.", registry=self.registry)
        self.memory = Gauge("step35_memory_bytes", "Resident memory of the process.", registry=self.registry)
        self.decode_tps = Gauge(
            "step35_decode_tokens_per_second", "Speed of the answers in the last seconds.", registry=self.registry
        )

    def count_heads(self, drafted: list[int], accepted: list[int]) -> None:
        """Adds one turn's drafts per head."""
        for head, (n_drafted, n_accepted) in enumerate(zip(drafted, accepted, strict=True), 1):
            self.drafted.labels(head).inc(n_drafted)
            self.accepted.labels(head).inc(n_accepted)

    def acceptance(self) -> list[dict[str, int]]:
        """Returns drafted and accepted tokens of each MTP head so far."""
        counts: dict[str, dict[str, int]] = {}
        for counter, name in ((self.drafted, "drafted"), (self.accepted, "accepted")):
            for metric in counter.collect():
                for sample in metric.samples:
                    if sample.name.endswith("_total"):
                        counts.setdefault(sample.labels["head"], {"head": int(sample.labels["head"])})[name] = int(
                            sample.value
                        )
        return [counts[head] for head in sorted(counts)]

    def text(self) -> bytes:
        """Returns all of it in Prometheus's text form."""
        self.memory.set(resident_bytes())
        return generate_latest(self.registry)


class Throughput:
    """Tokens a second over the last SPEED_WINDOW_S; counted by whole seconds, so that a token costs next to nothing.

    One thread adds, any may read.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, n_tokens: int, now_s: float) -> None:
        second = int(now_s)
        if second not in self._counts:
            recent = {s: n for s, n in self._counts.items() if s > second - SPEED_WINDOW_S}
            self._counts = recent | {second: 0}  # anew: somebody may be adding up the old one
        self._counts[second] += n_tokens

    def tps(self, now_s: float) -> float:
        return sum(n for second, n in self._counts.items() if second > now_s - SPEED_WINDOW_S) / SPEED_WINDOW_S


def resident_bytes() -> int:
    """Returns this process's resident memory."""
    return psutil.Process().memory_info().rss
