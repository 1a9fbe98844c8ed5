"""Which experts tokens use: how unevenly, how much neighbours share, what a cache would hit. Pure."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from step35.errors import SettingsError

ABOUT = "step35 routing trace"
MOST_TOKENS = 8
"""Adjacent tokens whose experts are counted together: as many as a verification has, and more."""
CACHE_SHARES = (0.125, 0.25, 0.5, 0.75)
HOT_SHARE = 0.1

Choices = Mapping[int, np.ndarray]
"""Experts (n_tokens, n_expert_used) by layer, of one prompt; tokens in order."""


@dataclass(frozen=True, slots=True)
class Routing:
    """A trace, summed up: `counts` are uses of each expert by layer, `hits` LRU hit rates by experts cached a layer.

    `distinct[n - 1]` is how many of a layer's experts n adjacent tokens use, the mean over layers and places.
    """

    n_expert: int
    n_expert_used: int
    n_tokens: int
    counts: Mapping[int, tuple[int, ...]]
    distinct: tuple[float, ...]
    hits: Mapping[int, float]

    @property
    def overlap(self) -> float:
        """Returns the share of a token's experts that the token before it used too."""
        return 2 - self.distinct[1] / self.n_expert_used if len(self.distinct) > 1 else 0.0

    def skew(self, layer: int) -> float:
        """Returns the share of a layer's uses that its busiest tenth of experts has."""
        counts = sorted(self.counts[layer], reverse=True)
        n_hot = max(1, round(HOT_SHARE * len(counts)))
        return sum(counts[:n_hot]) / max(1, sum(counts))


def summarize(prompts: Sequence[Choices], n_expert: int) -> Routing:
    """Returns what the choices of some prompts come to; raises SettingsError if there are none."""
    if not any(len(rows) for choices in prompts for rows in choices.values()):
        raise SettingsError(
            "nothing to trace: expected a text of at least one token that passes an MoE layer, got none"
        )
    layers = sorted(prompts[0])
    joined = {layer: np.concatenate([choices[layer] for choices in prompts]) for layer in layers}
    counts = {layer: np.bincount(joined[layer].ravel(), minlength=n_expert) for layer in layers}
    return Routing(
        n_expert=n_expert,
        n_expert_used=joined[layers[0]].shape[1],
        n_tokens=len(joined[layers[0]]),
        counts={layer: tuple(map(int, counts[layer])) for layer in layers},
        distinct=tuple(_distinct(prompts)),
        hits={n: _hit_rate(prompts, n) for n in sorted({max(1, round(share * n_expert)) for share in CACHE_SHARES})},
    )


def _distinct(prompts: Sequence[Choices]) -> Iterator[float]:
    for n in range(1, MOST_TOKENS + 1):
        sizes = [size for choices in prompts for rows in choices.values() for size in _window_sizes(rows, n)]
        if not sizes:
            return
        yield float(np.mean(sizes))


def _window_sizes(rows: np.ndarray, n: int) -> Iterator[int]:
    for start in range(len(rows) - n + 1):
        yield len(np.unique(rows[start : start + n]))


def _hit_rate(prompts: Sequence[Choices], n_cached: int) -> float:
    n_hits = n_uses = 0
    for layer in prompts[0]:
        cache: OrderedDict[int, None] = OrderedDict()
        for expert in (int(e) for choices in prompts for e in choices[layer].ravel()):
            n_uses += 1
            n_hits += expert in cache
            cache[expert] = None
            cache.move_to_end(expert)
            if len(cache) > n_cached:
                cache.popitem(last=False)
    return n_hits / n_uses


# the file


def to_data(routing: Routing, model: str) -> dict[str, object]:
    """Returns a trace under the names that its file has."""
    return {
        "about": ABOUT,
        "model": model,
        "n_tokens": routing.n_tokens,
        "n_expert": routing.n_expert,
        "n_expert_used": routing.n_expert_used,
        "distinct": [round(n, 4) for n in routing.distinct],
        "overlap": round(routing.overlap, 4),
        "skew": {str(layer): round(routing.skew(layer), 4) for layer in routing.counts},
        "lru_hit_rate": {str(n): round(rate, 4) for n, rate in routing.hits.items()},
        "counts": {str(layer): list(counts) for layer, counts in routing.counts.items()},
    }


def distinct_of(data: object, file: str, n_expert: int, n_expert_used: int) -> tuple[float, ...]:
    """Returns `distinct` of a trace's file, checked against a model; raises SettingsError on anything else."""
    if not isinstance(data, dict) or data.get("about") != ABOUT:
        raise SettingsError(f"not a routing trace: {file} expected about={ABOUT!r}; write one with step35 trace")
    wanted, got = (n_expert, n_expert_used), (data.get("n_expert"), data.get("n_expert_used"))
    if wanted != got:
        raise SettingsError(f"another model's trace: {file} expected n_expert, n_expert_used {wanted}, got {got}")
    distinct = data.get("distinct")
    if not isinstance(distinct, list) or not all(isinstance(n, int | float) and 0 < n <= n_expert for n in distinct):
        raise SettingsError(f"bad routing trace: {file} distinct expected numbers up to {n_expert}, got {distinct!r}")
    return tuple(map(float, distinct))


def report(routing: Routing) -> list[str]:
    """Returns a trace in a few lines."""
    skews = [routing.skew(layer) for layer in routing.counts]
    distinct = ", ".join(f"{n:.1f}" for n in routing.distinct[:4])
    hits = ", ".join(f"{rate:.0%} with {n}" for n, rate in routing.hits.items())
    return [
        f"{routing.n_tokens} tokens, {len(routing.counts)} MoE layers of {routing.n_expert} experts, "
        f"{routing.n_expert_used} a token",
        f"experts that 1, 2, 3, 4 adjacent tokens use: {distinct}; "
        f"a token shares {routing.overlap:.0%} with the one before",
        f"busiest tenth of the experts: {np.mean(skews):.0%} of the uses "
        f"({min(skews):.0%} to {max(skews):.0%} by layer)",
        f"LRU hit rate by experts cached a layer: {hits}",
    ]
