"""Where everything lies, and how many bytes that takes on each device, by purpose."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from step35.planning.context_memory import (
    Run,
    checkpoints_bytes,
    head_context,
    loaded_tensors,
    trunk_context,
    weight_bytes,
)
from step35.planning.machine import Machine
from step35.planning.model_header import Group, Header, Tensor

HOST = "CPU"
MATRICES = ("gate", "up", "down")
N_PIPELINE_COPIES = 4
"""Sets of inputs that ggml keeps, on the host and on each GPU, where a box has several and they hold all layers."""


class Purpose(StrEnum):
    """What bytes are for, in the order of a table."""

    WEIGHTS = "weights, dense"
    EXPERTS = "weights, routed experts"
    HEADS = "weights, MTP heads"
    KV = "KV cache, full attention"
    RING = "KV cache, sliding window"
    HEAD_KV = "KV cache, MTP heads"
    COMPUTE = "compute buffers"
    OUTPUTS = "logits and hidden states"
    SCRATCH = "op-offload scratch"
    CHECKPOINTS = "checkpoints"
    LOADING = "loading"
    DRIVER = "driver and kernels"


@dataclass(frozen=True, slots=True)
class Layout:
    """A device for every tensor. The token embedding is always on the host.

    `layers` names each layer's device, the heads' last; `experts` that of each layer's gate, up and
    down matrices, () for a dense layer.
    """

    layers: tuple[str, ...]
    experts: tuple[tuple[str, ...], ...]
    output: str

    def device_of(self, tensor: Tensor) -> str:
        if tensor.group is Group.EMBEDDING:
            return HOST
        if tensor.layer is None:
            return self.output
        if tensor.group is Group.EXPERTS:
            return self.experts[tensor.layer][matrix_of(tensor)]
        return self.layers[tensor.layer]

    @property
    def host_experts(self) -> bool:
        return any(HOST in devices for devices in self.experts)

    @property
    def gpus(self) -> list[str]:
        return sorted({*self.layers, self.output} - {HOST})


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What of the way of loading and running costs memory."""

    load_mode: str
    offloads_ops: bool


MemoryUsage = dict[str, dict[Purpose, int]]


def matrix_of(tensor: Tensor) -> int:
    """Returns which of MATRICES an expert tensor is."""
    return next(i for i, name in enumerate(MATRICES) if f"ffn_{name}_exps" in tensor.name)


def gpu_name(index: int) -> str:
    """Returns the name of a machine's GPU in plans."""
    return f"GPU{index}"


def usage(header: Header, machine: Machine, run: Run, layout: Layout, loading: LoadSettings) -> MemoryUsage:
    """Returns the bytes of every device by purpose."""
    counted: defaultdict[str, defaultdict[Purpose, int]] = defaultdict(lambda: defaultdict(int))
    for (device, purpose), n in _weights(header, bool(run.n_heads), layout).items():
        counted[device][purpose] += n
    _add_cells(counted, header, run, layout)
    _add_buffers(counted, header, run, layout, len(machine.gpus))
    _add_rest(counted, header, machine, run, layout, loading)
    return {device: {p: sizes[p] for p in Purpose if sizes[p]} for device, sizes in sorted(counted.items())}


_PURPOSES = {Group.EXPERTS: Purpose.EXPERTS, Group.HEADS: Purpose.HEADS, Group.IDLE: Purpose.HEADS}


@cache
def _weights(header: Header, with_heads: bool, layout: Layout) -> Mapping[tuple[str, Purpose], int]:
    sizes: defaultdict[tuple[str, Purpose], int] = defaultdict(int)
    for tensor in loaded_tensors(header, with_heads):
        sizes[layout.device_of(tensor), _PURPOSES.get(tensor.group, Purpose.WEIGHTS)] += weight_bytes([tensor])
    return sizes


def _add_cells(counted: dict, header: Header, run: Run, layout: Layout) -> None:
    shape = header.shape
    for layer, device, n in zip(shape.layers, layout.layers, trunk_context(shape, run).layers, strict=True):
        counted[device][Purpose.RING if layer.is_sliding else Purpose.KV] += n
    if run.n_heads:
        for device, n in zip(layout.layers, head_context(shape, run).layers, strict=True):
            counted[device][Purpose.HEAD_KV] += run.n_heads * n


def _add_buffers(counted: dict, header: Header, run: Run, layout: Layout, n_gpus: int) -> None:
    """Compute buffers: a whole graph's wherever a part of it may run, its inputs on a host that runs none."""
    is_split = layout.host_experts or HOST in layout.layers
    n_copies = N_PIPELINE_COPIES if n_gpus > 1 and not is_split else 1
    trunk = trunk_context(header.shape, run)
    counted[HOST][Purpose.COMPUTE] += trunk.compute if is_split else n_copies * trunk.inputs + trunk.embedded
    counted[HOST][Purpose.OUTPUTS] += trunk.outputs
    for device in layout.gpus:
        counted[device][Purpose.COMPUTE] += trunk.compute + (n_copies - 1) * trunk.inputs
    if run.n_heads:
        head, device = head_context(header.shape, run), layout.layers[-1]
        counted[HOST][Purpose.OUTPUTS] += run.n_heads * head.outputs
        more = (n_copies - 1) * (head.inputs + head.embedded)
        counted[device][Purpose.COMPUTE] += run.n_heads * (head.compute + more)
        if device != HOST:
            counted[HOST][Purpose.COMPUTE] += run.n_heads * (n_copies * head.inputs + head.embedded)


def _add_rest(counted: dict, header: Header, machine: Machine, run: Run, layout: Layout, loading: LoadSettings) -> None:
    counted[HOST][Purpose.CHECKPOINTS] += checkpoints_bytes(header.shape, run)
    if layout.gpus and loading.load_mode != "mmap":
        counted[HOST][Purpose.LOADING] += 2 * max(tensor.n_bytes for tensor in header.tensors)
    for device in layout.gpus:
        counted[device][Purpose.DRIVER] += machine.gpus[int(device[3:])].reserve_bytes
        if loading.offloads_ops and layout.host_experts:
            counted[device][Purpose.SCRATCH] += _largest_host_matrix(header, layout)


def _largest_host_matrix(header: Header, layout: Layout) -> int:
    on_host = (t for t in header.tensors if t.group is Group.EXPERTS and layout.device_of(t) == HOST)
    return max(tensor.n_bytes for tensor in on_host)


# budgets


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory that some devices share; `budget` is what a plan may take of it."""

    name: str
    devices: tuple[str, ...]
    budget: int


def pools(machine: Machine, gpu_budget: int | None = None) -> list[Pool]:
    """Returns the machine's memories; an integrated GPU is in two: its own limit, and the RAM."""
    gpus = [
        Pool(gpu.name, (gpu_name(i),), gpu.free_bytes if gpu_budget is None else min(gpu.free_bytes, gpu_budget))
        for i, gpu in enumerate(machine.gpus)
    ]
    in_ram = [gpu_name(i) for i, gpu in enumerate(machine.gpus) if gpu.kind == "integrated"]
    return [*gpus, Pool("RAM", (HOST, *in_ram), max(0, machine.available_bytes - machine.reserve_bytes))]


def taken(usage: MemoryUsage, pool: Pool) -> int:
    """Returns the bytes that a pool's devices use."""
    return sum(sum(usage.get(device, {}).values()) for device in pool.devices)


def fits(usage: MemoryUsage, machine_pools: list[Pool]) -> bool:
    """Whether no pool is used beyond its budget."""
    return all(taken(usage, pool) <= pool.budget for pool in machine_pools)
