"""How fast a placement may run, from bytes and bandwidth: estimates, to be checked by measuring.

Decoding reads every active weight and the KV cells once a token. Prefill computes, and reads or
copies every weight once a batch. The shares of the bandwidth that are reached are the machine's.
"""

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from step35.native.device_kinds import REMOTE
from step35.planning.context_memory import Run, cell_bytes, loaded_tensors
from step35.planning.machine import Machine
from step35.planning.memory_usage import HOST, Layout
from step35.planning.model_header import Group, Header, ModelShape

GPU_STEP_S = 3e-3
"""Kernel launches of one step through all layers on a GPU."""
HANDOVER_S = 60e-6
"""Sending one layer's activations to the host and back."""
DRAFT_STEP_S = 0.4e-3
CORE_FLOPS = 5e10
ACCEPTANCE = (0.85, 0.75, 0.65)
"""Posted shares of accepted drafts, head by head, each given that the one before was accepted."""


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Tokens a second with `n_past` tokens in the context; `depth` is the best number of drafts."""

    n_past: int
    prefill: float
    decode: float
    drafted: float
    depth: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is estimated for: a model, on a machine, laid out in some way."""

    header: Header
    machine: Machine
    run: Run
    layout: Layout
    distinct: tuple[float, ...] = ()
    """Experts that 1, 2, ... adjacent tokens use, from a trace; beyond it, tokens choose independently."""


def speed(deployment: Deployment, n_past: int) -> SpeedEstimate:
    """Returns the estimated speeds with `n_past` tokens in the context, and of a prefill up to there."""
    plain = step_seconds(deployment, n_past, 1)
    drafted = {depth: _drafted(deployment, n_past, depth) for depth in range(deployment.run.n_heads + 1)}
    best = max(drafted, key=drafted.__getitem__)
    return SpeedEstimate(n_past, prefill(deployment, n_past), 1 / plain, drafted[best], best)


def step_seconds(deployment: Deployment, n_past: int, n_tokens: int) -> float:
    """Returns the time of one step of a few tokens."""
    seconds = GPU_STEP_S if deployment.layout.gpus else 0.0
    seconds += HANDOVER_S * sum(HOST in devices for devices in deployment.layout.experts) * bool(deployment.layout.gpus)
    for device, n_bytes in _read(deployment, n_tokens).items():
        bandwidth, share, _ = _bandwidth(deployment.machine, device)
        seconds += n_bytes / (bandwidth * share)
    for device, n_bytes in _cells(deployment, n_past).items():
        seconds += _attention_seconds(deployment.machine, device, n_bytes, n_tokens)
    return seconds + _network_seconds(deployment, n_tokens)


def _attention_seconds(machine: Machine, device: str, n_bytes: float, n_tokens: int) -> float:
    """Returns the time over the KV cells: they are read once, as fast as weights are.

    What attention takes longer than that is its arithmetic, which every token of the step needs.
    """
    bandwidth, share, kv_share = _bandwidth(machine, device)
    reading = n_bytes / (bandwidth * share)
    return reading + n_tokens * max(0.0, n_bytes / (bandwidth * kv_share) - reading)


def _network_seconds(deployment: Deployment, n_tokens: int) -> float:
    """Returns the time that activations take to remote GPUs and back; each is asked for its result once."""
    remotes = [deployment.machine.gpus[int(device[3:])] for device in deployment.layout.gpus]
    n_bytes = 4 * deployment.header.shape.n_embd * n_tokens
    return sum(2 * n_bytes / gpu.host_bandwidth + gpu.latency_s for gpu in remotes if gpu.kind == REMOTE)


def touched(shape: ModelShape, n_tokens: int, distinct: tuple[float, ...] = ()) -> float:
    """Returns how many of a layer's experts n tokens are expected to use: traced, or else routed independently."""
    if n_tokens <= len(distinct):
        return distinct[n_tokens - 1]
    return shape.n_expert * (1 - (1 - shape.n_expert_used / shape.n_expert) ** n_tokens)


def _read(deployment: Deployment, n_tokens: int) -> dict[str, float]:
    """Returns the weight bytes that one step reads on each device."""
    read: dict[str, float] = {}
    share = touched(deployment.header.shape, n_tokens, deployment.distinct) / deployment.header.shape.n_expert
    for tensor in deployment.header.tensors:
        if tensor.group in (Group.EMBEDDING, Group.HEADS, Group.IDLE):
            continue
        device = deployment.layout.device_of(tensor)
        read[device] = read.get(device, 0) + tensor.n_bytes * (share if tensor.group is Group.EXPERTS else 1)
    return read


def _cells(deployment: Deployment, n_past: int) -> dict[str, float]:
    cells: dict[str, float] = {}
    shape = deployment.header.shape
    for layer, device in zip(shape.trunk, deployment.layout.layers, strict=False):
        n = min(n_past, shape.window) if layer.is_sliding else n_past
        cells[device] = cells.get(device, 0) + n * cell_bytes(shape, layer, deployment.run.kv_type)
    return cells


def _bandwidth(machine: Machine, device: str) -> tuple[float, float, float]:
    """Returns a device's bandwidth and its shares for weights and for KV cells."""
    if device == HOST:
        return machine.bandwidth, machine.decode_share, machine.decode_share
    gpu = machine.gpus[int(device[3:])]
    return gpu.bandwidth, gpu.decode_share, gpu.kv_share


def _drafted(deployment: Deployment, n_past: int, depth: int) -> float:
    """Returns tokens a second with `depth` drafts a cycle."""
    return expected_tokens(depth) / cycle_seconds(deployment, n_past, depth)


def expected_tokens(depth: int) -> float:
    """Returns the tokens of a cycle with `depth` drafts: those accepted, and the one that the step itself chooses."""
    return 1 + sum(accumulate(ACCEPTANCE[:depth], mul))


def cycle_seconds(deployment: Deployment, n_past: int, depth: int) -> float:
    """Returns the time to draft `depth` tokens and to verify them."""
    return step_seconds(deployment, n_past, 1 + depth) + depth * _draft_seconds(deployment)


def _draft_seconds(deployment: Deployment) -> float:
    heads = (t for t in loaded_tensors(deployment.header, True) if t.group is Group.HEADS)
    n_bytes = sum(tensor.n_bytes for tensor in heads) / max(1, deployment.header.shape.n_heads)
    bandwidth, share, _ = _bandwidth(deployment.machine, deployment.layout.layers[-1])
    return DRAFT_STEP_S * bool(deployment.layout.gpus) + n_bytes / (bandwidth * share)


# prefill


def prefill(deployment: Deployment, n_past: int) -> float:
    """Returns prompt tokens a second, over a prompt of n_past tokens in full batches."""
    n_batch = min(deployment.run.n_batch, max(1, n_past))
    seconds = 0.0
    for device, (n_bytes, flops) in _batch_work(deployment, n_batch, n_past).items():
        if device == HOST and deployment.layout.gpus:
            seconds += min(_on_host(deployment.machine, n_bytes, flops), _on_gpu(deployment, n_bytes, flops))
        elif device == HOST:
            seconds += _on_host(deployment.machine, n_bytes, flops)
        else:
            gpu = deployment.machine.gpus[int(device[3:])]
            seconds += n_bytes / gpu.bandwidth + flops / gpu.flops
    return n_batch / (seconds + _network_seconds(deployment, n_batch))


def op_offload_threshold(deployment: Deployment) -> int | None:
    """Returns the batch from which host experts are faster on the GPU; None if they never are."""
    if not (deployment.layout.host_experts and deployment.layout.gpus):
        return None
    for n_batch in range(32, deployment.run.n_batch + 1, 32):
        n_bytes, flops = _batch_work(deployment, n_batch, 0)[HOST]
        if _on_gpu(deployment, n_bytes, flops) < _on_host(deployment.machine, n_bytes, flops):
            return n_batch
    return None


def host_flops(machine: Machine) -> float:
    """Returns what the CPU reaches in large products."""
    return machine.flops or machine.n_cores * CORE_FLOPS


def _on_host(machine: Machine, n_bytes: float, flops: float) -> float:
    return n_bytes / machine.bandwidth + flops / host_flops(machine)


def _on_gpu(deployment: Deployment, n_bytes: float, flops: float) -> float:
    gpu = deployment.machine.gpus[0]
    return n_bytes / gpu.host_bandwidth + flops / gpu.flops


def _batch_work(deployment: Deployment, n_batch: int, n_past: int) -> dict[str, tuple[float, float]]:
    """Returns the weight bytes and operations of one batch on each device, halfway through the prompt."""
    shape = deployment.header.shape
    share = touched(shape, n_batch) / shape.n_expert
    work: dict[str, tuple[float, float]] = {}
    for tensor in deployment.header.tensors:
        if tensor.group in (Group.EMBEDDING, Group.OUTPUT, Group.HEADS, Group.IDLE):
            continue
        n_weights = 1
        for size in tensor.shape:
            n_weights *= size
        is_routed = tensor.group is Group.EXPERTS
        active = shape.n_expert_used / shape.n_expert if is_routed else 1.0
        device = deployment.layout.device_of(tensor)
        n_bytes, flops = work.get(device, (0.0, 0.0))
        n_bytes += tensor.n_bytes * (share if is_routed else 1.0)
        work[device] = (n_bytes, flops + 2 * n_weights * active * n_batch)
    for layer, device in zip(shape.trunk, deployment.layout.layers, strict=False):
        n_seen = min(n_past, shape.window) if layer.is_sliding else n_past / 2
        n_bytes, flops = work.get(device, (0.0, 0.0))
        work[device] = (n_bytes, flops + 4 * layer.n_head * shape.head_dim * n_seen * n_batch)
    return work
