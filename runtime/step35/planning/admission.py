"""Refuses what the memory can't hold before anything is loaded, and compares with what llama.cpp took after."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from step35.errors import DoesNotFit
from step35.options import EngineOptions
from step35.planning.context_memory import Run
from step35.planning.hardware import Sources, probe, this_box
from step35.planning.machine import Machine
from step35.planning.memory_pressure import Level, Reading, Thresholds
from step35.planning.memory_usage import (
    HOST,
    MATRICES,
    Layout,
    Loading,
    MemoryUsage,
    Pool,
    Purpose,
    gpu_name,
    pools,
    taken,
    usage,
)
from step35.planning.model_header import Header, Headers
from step35.planning.remote import with_remotes
from step35.planning.reported_buffers import differences, read_buffers
from step35.planning.watchdog import Watchdog, read_memory
from step35.sizes import format_size


@dataclass(frozen=True, slots=True)
class MemoryDemand:
    """What an engine with some options takes, and what there is."""

    usage: MemoryUsage
    pools: tuple[Pool, ...]

    def check(self, remedy: str = "make a plan with step35 plan, and run it with --plan") -> None:
        """Raises DoesNotFit for the first memory that is too small."""
        for pool in self.pools:
            n_bytes = taken(self.usage, pool)
            if n_bytes > pool.budget:
                raise DoesNotFit(
                    f"doesn't fit: {pool.name} expected to need at most {format_size(pool.budget)} (what is free, less "
                    f"the reserve), needs {format_size(n_bytes)}; {remedy}"
                )


def memory_demand(options: EngineOptions, headers: Headers, machine: Machine) -> MemoryDemand:
    """Returns what an engine with these options would take."""
    header = headers.joined(with_heads=options.drafting.uses_heads)
    layout = layout_of(header, options, machine)
    run = _run(options, options.drafting.n_heads(header.shape.n_heads))
    used = usage(header, machine, run, layout, Loading(options.load_mode, options.op_offload))
    return MemoryDemand(used, tuple(pools(machine)))


def _run(options: EngineOptions, n_heads: int) -> Run:
    return Run(
        options.n_ctx,
        options.n_batch,
        options.n_sessions,
        n_heads,
        options.kv_type,
        options.n_checkpoints,
        options.flash_attention is not False,
    )


def layout_of(header: Header, options: EngineOptions, machine: Machine) -> Layout:
    """Returns where llama.cpp puts everything with these options."""
    layers = header.shape.layers
    places = _places(header, options, machine)
    heads = [_last_gpu(options, machine)] * (len(layers) - header.shape.n_trunk)
    devices = [*places[: header.shape.n_trunk], *heads] if options.side_file else places[: len(layers)]
    experts = tuple(
        tuple(_override(f"blk.{i}.ffn_{matrix}_exps.weight", options) or device for matrix in MATRICES)
        if layer.is_moe
        else ()
        for i, (device, layer) in enumerate(zip(devices, layers, strict=True))
    )
    return Layout(tuple(devices), experts, places[-1])


def _places(header: Header, options: EngineOptions, machine: Machine) -> list[str]:
    """Returns the devices of the layers of the model's file, and of the output, which counts as one more."""
    n_places = header.n_blocks + 1
    n_on_gpu = (n_places if options.n_gpu_layers < 0 else min(options.n_gpu_layers, n_places)) if machine.gpus else 0
    shares = _running_shares(options, machine)
    return [HOST] * (n_places - n_on_gpu) + [_gpu_of(i / n_on_gpu, shares) for i in range(n_on_gpu)]


def _last_gpu(options: EngineOptions, machine: Machine) -> str:
    """Returns where the heads of a side file go."""
    n_gpus = len(options.tensor_split) or len(machine.gpus)
    return gpu_name(n_gpus - 1) if machine.gpus and options.n_gpu_layers else HOST


def _running_shares(options: EngineOptions, machine: Machine) -> list[float]:
    shares = options.tensor_split or [gpu.free_bytes for gpu in machine.gpus]
    return [bound / sum(shares) for bound in accumulate(shares)] if shares else []


def _gpu_of(position: float, shares: list[float]) -> str:
    return gpu_name(next((i for i, bound in enumerate(shares) if bound > position), len(shares) - 1))


def _override(name: str, options: EngineOptions) -> str | None:
    return next((device for pattern, device in options.overrides if re.search(pattern, name)), None)


# around a load


@dataclass(frozen=True, slots=True)
class Guard:
    """What an engine needs, on the box that it is loaded on."""

    demand: MemoryDemand
    machine: Machine
    sources: Sources

    @property
    def cache_bytes(self) -> int:
        """What checkpoints, snapshots and other caches may take together: what the plan has left of the RAM."""
        ram = self.demand.pools[-1]
        planned = self.demand.usage.get(HOST, {}).get(Purpose.CHECKPOINTS, 0)
        return max(0, ram.budget - taken(self.demand.usage, ram) + planned)

    def differences(self) -> list[str]:
        """Returns what llama.cpp took otherwise than counted; to be asked after loading."""
        from step35.native.devices import gpu_names
        from step35.native.library import take_allocations

        return differences(self.demand.usage, read_buffers(take_allocations()), gpu_names())

    def watchdog(self, *, shrink: Callable[[], object], on_change: Callable[[Level, Reading], None]) -> Watchdog:
        """Returns a watchdog, not started yet, for the memory that the plan left free."""
        thresholds = Thresholds.of_reserve(self.machine.reserve_bytes)
        return Watchdog(lambda: read_memory(self.sources), thresholds, shrink=shrink, on_change=on_change)


def check_memory(options: EngineOptions, headers: Headers) -> Guard | None:
    """Raises DoesNotFit if this box's free memory can't hold an engine with these options; None if it is unknown."""
    from step35.native.library import take_allocations

    sources = this_box()
    machine = probe(replace(sources, bandwidth=lambda n_threads: 1.0))
    if not machine.total_bytes:
        return None
    if options.rpc:
        machine = with_remotes(machine, options.rpc, network_bandwidth=1.0)
    guard = Guard(memory_demand(options, headers, machine), machine, sources)
    guard.demand.check()
    take_allocations()  # those of other engines
    return guard


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Lets the kernel forget files that were read and copied: on a unified box their pages are the GPU's memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
