"""What goes where: from a header, a machine and constraints to a placement, with its reasons.

Pure. A policy lays the model out for one set of run settings; `place` walks down a ladder of settings
until one fits, and says what it gave up. `auto` takes the policy with the fastest estimated decode.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from step35.errors import SettingsError
from step35.planning.context_memory import Run, weight_bytes
from step35.planning.machine import Machine
from step35.planning.memory_usage import (
    HOST,
    Layout,
    LoadSettings,
    MemoryUsage,
    Pool,
    fits,
    gpu_name,
    matrix_of,
    pools,
    taken,
    usage,
)
from step35.planning.model_header import Group, Header
from step35.planning.speed import Deployment, SpeedEstimate, op_offload_threshold, speed
from step35.sizes import format_size

POLICIES = ("auto", "unified", "split", "gpu", "cpu", "rpc")
CTX_STEP = 1024
SHORT = 2048
"""Tokens in the context at which speeds are stated besides the full one."""

# settings from the best to the most frugal: prompt tokens a batch, type of the KV cache
_LADDERS = {
    "unified": ((2048, "f16"), (1024, "f16"), (1024, "q8_0"), (512, "q8_0")),
    "gpu": ((2048, "f16"), (1024, "f16"), (1024, "q8_0"), (512, "q8_0")),
    "rpc": ((2048, "f16"), (1024, "f16"), (1024, "q8_0"), (512, "q8_0")),
    "split": ((4096, "f16"), (2048, "f16"), (2048, "q8_0"), (1024, "q8_0"), (512, "q8_0")),
    "cpu": ((512, "f16"), (512, "q8_0")),
}


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the user asks for; None leaves it to the plan. `n_ctx` None is the longest that fits."""

    n_ctx: int | None = None
    policy: str = "auto"
    gpu_budget: int | None = None
    n_batch: int | None = None
    kv_type: str | None = None
    n_sessions: int = 1
    n_checkpoints: int = 4
    with_heads: bool = True
    distinct: tuple[float, ...] = ()
    """Experts that adjacent tokens use, from a trace."""
    rpc: tuple[str, ...] = ()
    """Hosts whose GPUs the machine has in front of its own."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise SettingsError(f"bad policy: expected one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.n_ctx is not None and self.n_ctx < 8:
            raise SettingsError(f"bad context: expected at least 8 tokens, got {self.n_ctx}")


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan: where every tensor goes and how the engine runs. `usage` and `speeds` follow from the rest."""

    machine: str
    policy: str
    digest: str
    run: Run
    layout: Layout
    load_mode: str
    n_threads: int
    op_offload_from: int | None
    """The smallest batch that computes host weights on the GPU; None = never."""
    gpu_budget: int | None
    reasons: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    """What tuning measured, a line each."""
    rpc: tuple[str, ...] = ()
    """HOST:PORT of the rpc-servers that have the first GPUs."""
    spreads_numa: bool = False
    """Whether threads and pages are spread over the NUMA nodes."""

    @property
    def loading(self) -> LoadSettings:
        return LoadSettings(self.load_mode, self.op_offload_from is not None)


def constraints_of(placement: Placement, distinct: tuple[float, ...] = ()) -> Constraints:
    """Returns what one would ask for to get a plan like this; its batch and KV type may yet be traded."""
    run = placement.run
    return Constraints(
        n_ctx=run.n_ctx,
        gpu_budget=placement.gpu_budget,
        n_sessions=run.n_sessions,
        n_checkpoints=run.n_checkpoints,
        with_heads=bool(run.n_heads),
        distinct=distinct,
        rpc=placement.rpc,
    )


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A placement beside what it takes and how fast it may be."""

    placement: Placement
    usage: MemoryUsage
    pools: tuple[Pool, ...]
    speeds: tuple[SpeedEstimate, ...]

    @property
    def fits(self) -> bool:
        return fits(self.usage, list(self.pools))

    @property
    def decode(self) -> float:
        """Estimated tokens a second with the context full."""
        return self.speeds[-1].decode


def place(header: Header, machine: Machine, constraints: Constraints) -> PlanReport:
    """Returns the best placement that fits, or the most frugal one that doesn't; `fits` tells which.

    Raises SettingsError where the constraints can't be met on any size of this machine.
    """
    _check(header, machine, constraints)
    if constraints.n_ctx is None:
        return _longest(header, machine, constraints)
    return _best([_place(header, machine, constraints, policy) for policy in _policies(machine, constraints)])


def report_on(header: Header, machine: Machine, placement: Placement, distinct: tuple[float, ...] = ()) -> PlanReport:
    """Returns what a placement takes on a machine and how fast it may be."""
    used = usage(header, machine, placement.run, placement.layout, placement.loading)
    deployment = Deployment(header, machine, placement.run, placement.layout, distinct)
    n_past = sorted({min(SHORT, placement.run.n_ctx), placement.run.n_ctx})
    return PlanReport(
        placement, used, tuple(pools(machine, placement.gpu_budget)), tuple(speed(deployment, n) for n in n_past)
    )


def _check(header: Header, machine: Machine, constraints: Constraints) -> None:
    n_most = header.shape.n_ctx_train
    if constraints.n_ctx is not None and constraints.n_ctx > n_most:
        raise SettingsError(f"context too long: expected at most {n_most} (the model's), got {constraints.n_ctx}")
    if constraints.gpu_budget is not None and not machine.gpus:
        raise SettingsError(f"no GPU to budget: {machine.name} has none; leave the GPU budget out")
    largest = max((gpu.total_bytes for gpu in machine.gpus), default=0)
    if constraints.gpu_budget is not None and constraints.gpu_budget > largest:
        raise SettingsError(
            f"GPU budget too large: expected at most {format_size(largest)} ({machine.name}), "
            f"got {format_size(constraints.gpu_budget)}"
        )


def _policies(machine: Machine, constraints: Constraints) -> list[str]:
    if machine.has_remotes and constraints.policy in ("auto", "rpc"):
        return ["rpc"]
    if constraints.policy == "rpc":
        raise SettingsError("policy doesn't suit: rpc expected a second box, got none; name it with --rpc HOST:PORT")
    possible = ["unified"] if machine.is_unified else ["gpu", "split"] if machine.gpus else []
    if constraints.policy == "auto" and machine.is_unified:
        return possible  # the CPU reads the same memory, and computes more slowly
    possible.append("cpu")
    if constraints.policy == "auto":
        return possible
    if constraints.policy not in possible:
        raise SettingsError(
            f"policy doesn't suit: {machine.name} expected one of {', '.join(possible)}, got {constraints.policy!r}"
        )
    return [constraints.policy]


def _best(reports: list[PlanReport]) -> PlanReport:
    fitting = [report for report in reports if report.fits]
    return max(fitting, key=lambda report: report.decode) if fitting else reports[0]


def _longest(header: Header, machine: Machine, constraints: Constraints) -> PlanReport:
    n_most = header.shape.n_ctx_train
    n_ctx = longest_context(header, machine, constraints)
    report = place(header, machine, replace(constraints, n_ctx=max(n_ctx, min(CTX_STEP, n_most))))
    if n_ctx in (0, n_most):
        return report
    reason = f"context {n_ctx} of the model's {n_most}: the longest that fits"
    return replace(report, placement=replace(report.placement, reasons=(*report.placement.reasons, reason)))


def longest_context(header: Header, machine: Machine, constraints: Constraints) -> int:
    """Returns the longest context that fits, in steps of 1024 tokens; 0 if none does."""
    n_most = header.shape.n_ctx_train

    def can_fit(n_ctx: int) -> bool:
        return place(header, machine, replace(constraints, n_ctx=n_ctx)).fits

    if can_fit(n_most):
        return n_most
    low, high = 0, n_most // CTX_STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if can_fit(middle * CTX_STEP) else (low, middle)
    return low * CTX_STEP


# one policy


def _place(header: Header, machine: Machine, constraints: Constraints, policy: str) -> PlanReport:
    assert constraints.n_ctx is not None
    rungs = _rungs(constraints, policy)
    report = _try(header, machine, constraints, policy, rungs[0])
    taken_rung = rungs[0]
    for rung in rungs[1:]:
        if report.fits:
            break
        report, taken_rung = _try(header, machine, constraints, policy, rung), rung
    reasons = (*report.placement.reasons, *_trades(rungs[0], taken_rung, report))
    return replace(report, placement=replace(report.placement, reasons=reasons))


def _try(header: Header, machine: Machine, constraints: Constraints, policy: str, rung: tuple[int, str]) -> PlanReport:
    placement = _lay_out(header, machine, constraints, policy, _fit_run(header, constraints, rung))
    return report_on(header, machine, placement, constraints.distinct)


def _rungs(constraints: Constraints, policy: str) -> list[tuple[int, str]]:
    rungs = [(constraints.n_batch or n_batch, constraints.kv_type or kv_type) for n_batch, kv_type in _LADDERS[policy]]
    return list(dict.fromkeys(rungs))


def _fit_run(header: Header, constraints: Constraints, rung: tuple[int, str]) -> Run:
    assert constraints.n_ctx is not None
    n_heads = header.shape.n_heads if constraints.with_heads else 0
    return Run(
        constraints.n_ctx,
        min(rung[0], constraints.n_ctx),
        constraints.n_sessions,
        n_heads,
        rung[1],
        constraints.n_checkpoints,
    )


def _trades(best: tuple[int, str], taken_rung: tuple[int, str], report: PlanReport) -> Iterator[str]:
    why = f"to fit {report.placement.run.n_ctx} tokens of context"
    if taken_rung[0] < best[0]:
        yield f"batch {taken_rung[0]} instead of {best[0]}, {why}: prefill is slower"
    if taken_rung[1] != best[1]:
        yield f"KV cache {taken_rung[1]} instead of {best[1]}, {why}"


def _lay_out(header: Header, machine: Machine, constraints: Constraints, policy: str, run: Run) -> Placement:
    layout, reasons = _LAYOUTS[policy](header, machine, constraints, run)
    deployment = Deployment(header, machine, run, layout)
    threshold = op_offload_threshold(deployment)
    spreads_numa = policy == "cpu" and machine.n_numa > 1
    return Placement(
        machine=machine.name,
        policy=policy,
        digest=header.digest,
        run=run,
        layout=layout,
        load_mode=_load_mode(machine, policy, layout, spreads_numa),
        n_threads=machine.n_cores,
        op_offload_from=threshold,
        gpu_budget=constraints.gpu_budget,
        rpc=constraints.rpc,
        spreads_numa=spreads_numa,
        reasons=(*reasons, *_offload_reason(layout, threshold, run)),
    )


def _load_mode(machine: Machine, policy: str, layout: Layout, spreads_numa: bool) -> str:
    """Returns mmap for NUMA, where each page then lies near the thread that first used it."""
    if spreads_numa:
        return "mmap"
    return "none" if policy == "cpu" or layout.host_experts else machine.load_mode


def _offload_reason(layout: Layout, threshold: int | None, run: Run) -> Iterator[str]:
    if layout.host_experts and layout.gpus:
        rule = "never" if threshold is None else f"from batches of {threshold} tokens"
        yield f"host experts are computed on the GPU {rule}: below, copying them costs more than the CPU takes"


def _all_on(header: Header, device: str, reason: str) -> tuple[Layout, tuple[str, ...]]:
    experts = tuple((device,) * 3 if layer.is_moe else () for layer in header.shape.layers)
    return Layout((device,) * len(header.shape.layers), experts, device), (reason,)


def _unified(header: Header, machine: Machine, constraints: Constraints, run: Run) -> tuple[Layout, tuple[str, ...]]:
    why = {"mmap": "the GPU maps the file itself", "none": "mapping the file would load several times slower"}
    reason = f"one memory: everything on the GPU, load mode {machine.load_mode}"
    return _all_on(header, gpu_name(0), f"{reason} ({why[machine.load_mode]})" if machine.load_mode in why else reason)


def _cpu(header: Header, machine: Machine, constraints: Constraints, run: Run) -> tuple[Layout, tuple[str, ...]]:
    nodes = f" spread over {machine.n_numa} NUMA nodes" if machine.n_numa > 1 else ""
    return _all_on(header, HOST, f"everything on the CPU, {machine.n_cores} threads{nodes}")


def _gpu(header: Header, machine: Machine, constraints: Constraints, run: Run) -> tuple[Layout, tuple[str, ...]]:
    layers = _spread(header, machine, constraints, run)
    experts = tuple(
        (device,) * 3 if shape.is_moe else () for device, shape in zip(layers, header.shape.layers, strict=True)
    )
    return Layout(layers, experts, layers[-1]), ("everything on the GPU",)


def _rpc(header: Header, machine: Machine, constraints: Constraints, run: Run) -> tuple[Layout, tuple[str, ...]]:
    """Whole layers: the first on the remote boxes, the last and the output here, where the logits are wanted."""
    layout, _ = _gpu(header, machine, constraints, run)
    counts = [f"{layout.layers.count(gpu_name(i))} layers on {gpu.name}" for i, gpu in enumerate(machine.gpus)]
    return layout, (", ".join(counts) + ": whole layers, so that a step crosses the network once each way",)


def _split(header: Header, machine: Machine, constraints: Constraints, run: Run) -> tuple[Layout, tuple[str, ...]]:
    """Attention, shared experts, dense layers, KV and heads on the GPUs, then routed experts as far as they go.

    Experts go matrix by matrix in the order of the layers, so all but one layer of a GPU are whole.
    """
    layers = _spread(header, machine, constraints, run)
    sizes = _matrix_sizes(header)
    experts = [[HOST] * 3 if shape.is_moe else [] for shape in header.shape.layers]
    room = _rooms(header, machine, constraints, run, _with_experts(layers, experts))
    for layer, matrix in sizes:
        room[layers[layer]] -= sizes[layer, matrix]
        if room[layers[layer]] >= 0:
            experts[layer][matrix] = layers[layer]
    layout = _with_experts(layers, experts)
    n_on_gpu = sum(device != HOST for devices in experts for device in devices)
    share = n_on_gpu / max(1, len(sizes))
    return layout, (
        f"attention, KV and heads on the GPU first, then {share:.0%} of the routed experts; the rest on the host",
    )


def _with_experts(layers: tuple[str, ...], experts: list[list[str]]) -> Layout:
    return Layout(layers, tuple(tuple(devices) for devices in experts), layers[-1])


@cache
def _matrix_sizes(header: Header) -> dict[tuple[int, int], int]:
    """Returns the bytes of each expert matrix by layer and matrix, in that order."""
    found = ((t.layer, matrix_of(t), t) for t in header.tensors if t.group is Group.EXPERTS and t.layer is not None)
    return {(layer, matrix): weight_bytes([t]) for layer, matrix, t in sorted(found, key=lambda f: f[:2])}


def _rooms(header: Header, machine: Machine, constraints: Constraints, run: Run, bare: Layout) -> dict[str, int]:
    """Returns what each GPU has left for experts, with room for the op-offload scratch."""
    used = usage(header, machine, run, bare, LoadSettings("none", offloads_ops=True))
    return {
        pool.devices[0]: pool.budget - taken(used, pool)
        for pool in pools(machine, constraints.gpu_budget)
        if pool.devices[0] != HOST
    }


def _spread(header: Header, machine: Machine, constraints: Constraints, run: Run) -> tuple[str, ...]:
    """Returns each layer's GPU: consecutive layers, in proportion to the memory that each GPU may take."""
    *on_gpu, ram = pools(machine, constraints.gpu_budget)
    budgets = [min(pool.budget, ram.budget) if pool.devices[0] in ram.devices else pool.budget for pool in on_gpu]
    sizes = [0] * len(header.shape.layers)
    for tensor in header.tensors:
        sizes[-1 if tensor.layer is None else tensor.layer] += tensor.n_bytes
    bounds = [bound / max(1, sum(budgets)) for bound in accumulate(budgets)]
    shares = [(end - size / 2) / sum(sizes) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    return tuple(
        gpu_name(next((i for i, bound in enumerate(bounds) if share <= bound), len(bounds) - 1)) for share in shares
    )


_LAYOUTS = {"unified": _unified, "cpu": _cpu, "gpu": _gpu, "split": _split, "rpc": _rpc}
