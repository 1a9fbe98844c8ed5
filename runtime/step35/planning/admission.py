"""Refuses what the memory can't hold before anything is loaded, and compares with what llama.cpp took after."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from step35.errors import DoesNotFit
from step35.options import EngineOptions
from step35.planning.hardware import Sources, probe, this_box
from step35.planning.llama_options import layout_of, run_of
from step35.planning.machine import Machine
from step35.planning.memory_pressure import Level, Reading, Thresholds
from step35.planning.memory_usage import HOST, LoadSettings, MemoryUsage, Pool, Purpose, pools, taken, usage
from step35.planning.model_header import Headers
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
    loading = LoadSettings(options.load_mode, options.op_offload)
    used = usage(header, machine, run_of(header, options), layout_of(header, options, machine), loading)
    return MemoryDemand(used, tuple(pools(machine)))


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
