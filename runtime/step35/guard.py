"""Refuses what the memory can't hold, before anything is loaded; on a unified box there is no second chance."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from step35.errors import DoesNotFit
from step35.gguf_facts import Header, read_header, with_side
from step35.machine import Machine
from step35.memory import Run
from step35.options import EngineOptions
from step35.sizes import format_size
from step35.usage import HOST, MATRICES, Layout, Loading, Pool, Usage, gpu_name, pools, taken, usage


@dataclass(frozen=True, slots=True)
class Need:
    """What an engine with some options takes, and what there is."""

    usage: Usage
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


def need(options: EngineOptions, machine: Machine) -> Need:
    """Returns what an engine with these options would take; reads headers only."""
    header = read_header(options.model)
    drafts = options.draft not in ("off", "ngram")
    if drafts and options.mtp is not None:
        header = with_side(header, read_header(options.mtp))
    layout = layout_of(header, options, machine)
    run = _run(options, header.shape.n_heads if drafts else 0)
    used = usage(header, machine, run, layout, Loading(options.load_mode, options.op_offload))
    return Need(used, tuple(pools(machine)))


def _run(options: EngineOptions, n_heads: int) -> Run:
    depth = int(options.draft) if options.draft.isdigit() else n_heads
    return Run(
        options.n_ctx,
        options.n_batch,
        options.n_sessions,
        min(depth, n_heads),
        options.kv_type,
        options.n_checkpoints,
        options.flash_attention is not False,
    )


def layout_of(header: Header, options: EngineOptions, machine: Machine) -> Layout:
    """Returns where llama.cpp puts everything with these options."""
    layers = header.shape.layers
    n_places = len(layers) + 1  # the output counts as a layer
    n_on_gpu = (n_places if options.n_gpu_layers < 0 else min(options.n_gpu_layers, n_places)) if machine.gpus else 0
    first = n_places - n_on_gpu
    shares = _running_shares(options, machine)
    places = [HOST] * first + [_gpu_of(i / n_on_gpu, shares) for i in range(n_on_gpu)]
    experts = tuple(
        tuple(_override(f"blk.{i}.ffn_{matrix}_exps.weight", options) or place for matrix in MATRICES)
        if layer.is_moe
        else ()
        for i, (place, layer) in enumerate(zip(places, layers, strict=False))
    )
    return Layout(tuple(places[:-1]), experts, places[-1])


def _running_shares(options: EngineOptions, machine: Machine) -> list[float]:
    shares = options.tensor_split or [gpu.free_bytes for gpu in machine.gpus]
    return [bound / sum(shares) for bound in accumulate(shares)] if shares else []


def _gpu_of(position: float, shares: list[float]) -> str:
    return gpu_name(next((i for i, bound in enumerate(shares) if bound > position), len(shares) - 1))


def _override(name: str, options: EngineOptions) -> str | None:
    return next((device for pattern, device in options.overrides if re.search(pattern, name)), None)


def refuse_what_does_not_fit(options: EngineOptions) -> None:
    """Raises DoesNotFit if this box's free memory can't hold an engine with these options."""
    from step35.hardware import probe, this_box

    machine = probe(replace(this_box(), bandwidth=lambda n_threads: 1.0))
    if machine.total_bytes:  # unknown on some systems
        need(options, machine).check()


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Lets the kernel forget files that were read and copied: on a unified box their pages are the GPU's memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
