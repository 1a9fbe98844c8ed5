"""Tuning by measurement: a plan beside a handful of its neighbours, round by round, and the fastest of them. Pure.

A neighbour replaces the plain plan only if it was faster in every round. So noise can cost a gain, and what is kept
was never measured slower than the plain plan.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from step35.planning.machine import Machine
from step35.planning.memory_usage import HOST, Layout
from step35.planning.model_header import Header
from step35.planning.placement import Placement, report_on

N_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured: a prompt and its answer, in tokens."""

    n_prompt: int = 512
    n_predict: int = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement, in tokens a second."""

    prefill_tps: float
    decode_tps: float

    def seconds(self, workload: Workload) -> float:
        """Returns what the workload takes at these speeds."""
        return workload.n_prompt / self.prefill_tps + workload.n_predict / self.decode_tps


@dataclass(frozen=True, slots=True)
class Change:
    """One step away from a plan; changes of different kinds can be made together."""

    kind: str
    what: str
    apply: Callable[[Placement], Placement]


@dataclass(slots=True)
class Trial:
    """A candidate with its measurements, and those of the plain plan in the same rounds."""

    changes: tuple[Change, ...]
    placement: Placement
    samples: list[Sample] = field(default_factory=list)
    plain: list[Sample] = field(default_factory=list)

    @property
    def what(self) -> str:
        return ", ".join(change.what for change in self.changes) or "plain plan"

    def is_faster(self, workload: Workload) -> bool:
        """Whether it beat the plain plan in every round."""
        return bool(self.samples) and all(ratio < 1 for ratio in self._ratios(workload))

    def ratio(self, workload: Workload) -> float:
        """Returns its time over the plain plan's, the median of the rounds."""
        return median(self._ratios(workload))

    def _ratios(self, workload: Workload) -> list[float]:
        pairs = zip(self.samples, self.plain, strict=True)
        return [sample.seconds(workload) / plain.seconds(workload) for sample, plain in pairs]


Measure = Callable[[Placement], Sample | None]
"""Measures a plan; None where it can't run."""


def tune(
    plain: Placement, changes: Sequence[Change], measure: Measure, workload: Workload, n_rounds: int = N_ROUNDS
) -> list[Trial]:
    """Returns all trials, the plain plan's first. The gains of different kinds are tried together as well."""
    base = Trial((), plain)
    trials = [Trial((change,), change.apply(plain)) for change in changes]
    _measure_rounds(base, trials, measure, n_rounds)
    winners = _best_of_each_kind([trial for trial in trials if trial.is_faster(workload)], workload)
    if len(winners) > 1:
        together = Trial(winners, _applied(plain, winners))
        _measure_rounds(base, [together], measure, n_rounds)
        trials.append(together)
    return [base, *trials]


def fastest(trials: Sequence[Trial], workload: Workload) -> Trial:
    """Returns the trial with the greatest gain over the plain plan, which is the first; itself if none has any."""
    faster = [trial for trial in trials[1:] if trial.is_faster(workload)]
    return min(faster, key=lambda trial: trial.ratio(workload), default=trials[0])


def _measure_rounds(base: Trial, trials: Sequence[Trial], measure: Measure, n_rounds: int) -> None:
    dropped: set[int] = set()
    for _ in range(n_rounds):
        plain = measure(base.placement)
        if plain is None:
            return
        base.samples.append(plain)
        base.plain.append(plain)
        for trial in trials:
            sample = measure(trial.placement) if id(trial) not in dropped else None
            if sample is None:
                dropped.add(id(trial))
                trial.samples.clear()
                trial.plain.clear()
                continue
            trial.samples.append(sample)
            trial.plain.append(plain)


def _best_of_each_kind(trials: Sequence[Trial], workload: Workload) -> tuple[Change, ...]:
    best: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.ratio(workload)):
        best.setdefault(trial.changes[0].kind, trial)
    return tuple(trial.changes[0] for trial in best.values())


def _applied(placement: Placement, changes: Sequence[Change]) -> Placement:
    for change in changes:
        placement = change.apply(placement)
    return placement


_TUNED = "tuned by measuring:"


def tuned(best: Trial, lines: Sequence[str]) -> Placement:
    """Returns the plan to keep, with what was measured and, where it isn't the plain one, how it came about."""
    reasons = tuple(reason for reason in best.placement.reasons if not reason.startswith(_TUNED))
    if best.changes:
        reasons = (*reasons, f"{_TUNED} {best.what}")
    return replace(best.placement, reasons=reasons, measured=tuple(lines))


def report(trials: Sequence[Trial], best: Trial, workload: Workload) -> list[str]:
    """Returns one line a trial, for the plan file and the screen."""
    return [_line(trial, workload) + (" <- kept" if trial is best else "") for trial in trials]


def _line(trial: Trial, workload: Workload) -> str:
    if not trial.samples:
        return f"{trial.what}: did not run"
    prefill, decode = (median(getattr(s, name) for s in trial.samples) for name in ("prefill_tps", "decode_tps"))
    speeds = f"{trial.what}: prefill {prefill:.1f}, decode {decode:.1f} tok/s"
    return speeds if not trial.changes else f"{speeds}, {trial.ratio(workload):.2f} of the plain plan's time"


# neighbours


def neighbours(header: Header, machine: Machine, plain: Placement) -> list[Change]:
    """Returns the changes worth trying that fit the machine."""
    made = [*_threads(machine, plain), *_batches(plain), *_experts(plain), *_thresholds(plain), *_heads(plain)]
    return [change for change in made if report_on(header, machine, change.apply(plain)).fits]


def _threads(machine: Machine, plain: Placement) -> Iterator[Change]:
    if plain.layout.gpus and not plain.layout.host_experts:
        return  # the CPU computes next to nothing
    for n in sorted({max(1, plain.n_threads // 2), max(1, plain.n_threads - 1), machine.n_cores} - {plain.n_threads}):
        yield Change("threads", f"{n} thread{'s' * (n > 1)}", lambda p, n=n: replace(p, n_threads=n))


def _batches(plain: Placement) -> Iterator[Change]:
    for n in (plain.run.n_batch // 2, plain.run.n_batch * 2):
        if 64 <= n <= min(8192, plain.run.n_ctx):
            yield Change("batch", f"batch {n}", lambda p, n=n: replace(p, run=replace(p.run, n_batch=n)))


def _thresholds(plain: Placement) -> Iterator[Change]:
    if plain.op_offload_from is None:
        return
    for n in (plain.op_offload_from // 2, plain.op_offload_from * 2, None):
        what = f"op offload from {n}" if n else "no op offload"
        yield Change("threshold", what, lambda p, n=n: replace(p, op_offload_from=n))


def _heads(plain: Placement) -> Iterator[Change]:
    for n in range(plain.run.n_heads):
        what = f"at most {n} drafts" if n else "no drafting"
        yield Change("heads", what, lambda p, n=n: replace(p, run=replace(p.run, n_heads=n)))


def _experts(plain: Placement) -> Iterator[Change]:
    """One layer's experts more on the GPU than planned, and one and two fewer."""
    layout = plain.layout
    on_host = [i for i, devices in enumerate(layout.experts) if HOST in devices and layout.layers[i] != HOST]
    on_gpu = [i for i, devices in enumerate(layout.experts) if devices and HOST not in devices]
    if not on_host or not layout.gpus:
        return
    yield Change("experts", f"experts of layer {on_host[0]} on the GPU", lambda p: _moved(p, on_host[:1], None))
    for n in (1, 2):
        if len(on_gpu) > n:
            layers = on_gpu[-n:]
            what = f"experts of {n} layer{'s' * (n > 1)} fewer on the GPU"
            yield Change("experts", what, lambda p, layers=layers: _moved(p, layers, HOST))


def _moved(placement: Placement, layers: Sequence[int], device: str | None) -> Placement:
    """Returns the placement with some layers' experts elsewhere; None is where the rest of the layer lies."""
    layout = placement.layout
    experts = tuple(
        (device or layout.layers[i],) * len(devices) if i in layers else devices
        for i, devices in enumerate(layout.experts)
    )
    return replace(placement, layout=Layout(layout.layers, experts, layout.output))
