"""From a placement to the options that make llama.cpp do exactly that, and from options to where llama.cpp puts things.

The two rules are each other's inverse, as far as options can say what a placement says.
"""

import re
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

from step35.options import EngineOptions
from step35.planning.context_memory import Run
from step35.planning.machine import Machine
from step35.planning.memory_usage import HOST, MATRICES, Layout, gpu_name
from step35.planning.model_header import Header
from step35.planning.placement import Placement

OFFLOAD_VARIABLE = "GGML_OP_OFFLOAD_MIN_BATCH"
"""Read once, when ggml's backends are registered: to be set before the first model is loaded."""
ALL_LAYERS = -1


def engine_options(
    placement: Placement, header: Header, *, mtp: Path | None = None, draft: str = "auto"
) -> EngineOptions:
    """Returns the engine's options for a placement of a model."""
    run, layout = placement.run, placement.layout
    places = _planned_places(layout, header.n_blocks)
    n_on_gpu = len(places) - places.count(HOST)
    return EngineOptions(
        header.path,
        mtp=mtp,
        draft=draft if run.n_heads or mtp else "off",
        n_ctx=run.n_ctx,
        n_batch=run.n_batch,
        n_sessions=run.n_sessions,
        n_checkpoints=run.n_checkpoints,
        n_threads=placement.n_threads,
        n_gpu_layers=ALL_LAYERS if n_on_gpu == len(places) else n_on_gpu,
        load_mode=placement.load_mode,
        kv_type=run.kv_type,
        op_offload=placement.op_offload_from is not None,
        overrides=overrides(layout),
        tensor_split=tensor_split(layout, header.n_blocks),
        rpc=placement.rpc,
        spreads_numa=placement.spreads_numa,
    )


def environment(placement: Placement) -> dict[str, str]:
    """Returns the variables to set before the first model is loaded."""
    threshold = placement.op_offload_from
    return {} if threshold is None else {OFFLOAD_VARIABLE: str(threshold)}


def overrides(layout: Layout) -> tuple[tuple[str, str], ...]:
    """Returns (pattern of tensor names, buffer type) for the experts that don't lie where their layer does.

    With everything on the host there is nothing to say.
    """
    if not layout.gpus:
        return ()
    found: dict[tuple[str, ...], list[int]] = {}
    for layer, devices in enumerate(layout.experts):
        on_host = tuple(m for m, device in zip(MATRICES, devices, strict=True) if device == HOST) if devices else ()
        if on_host:
            found.setdefault(on_host, []).append(layer)
    return tuple((_pattern(layers, matrices), HOST) for matrices, layers in found.items())


def _pattern(layers: list[int], matrices: tuple[str, ...]) -> str:
    return rf"^blk\.({'|'.join(map(str, layers))})\.ffn_({'|'.join(matrices)})_exps\."


def tensor_split(layout: Layout, n_blocks: int) -> tuple[float, ...]:
    """Returns the share of the layers that each GPU takes; the output counts as one more of the file's `n_blocks`.

    llama.cpp compares a layer's place among those on GPUs with the shares' running sum, so the cuts lie between two
    layers. One GPU is named as well: without shares, llama.cpp would use all that the box has.
    """
    counts = Counter(place for place in _planned_places(layout, n_blocks) if place != HOST)
    n_gpus = max((int(device[3:]) + 1 for device in counts), default=0)
    ends = list(accumulate(counts[gpu_name(i)] for i in range(n_gpus)))
    bounds = [0.0, *(max(0.0, end - 0.5) for end in ends[:-1]), *map(float, ends[-1:])]
    return tuple(b - a for a, b in pairwise(bounds))


def _planned_places(layout: Layout, n_blocks: int) -> list[str]:
    """Returns the devices of what llama.cpp spreads: the layers that the trunk's file declares, then the output.

    Heads may be declared that are not there.
    """
    missing = (layout.layers[-1],) * (n_blocks - len(layout.layers))
    return [*layout.layers[:n_blocks], *missing, layout.output]


# from options


def run_of(header: Header, options: EngineOptions) -> Run:
    """Returns the settings that memory depends on, as an engine with these options has them."""
    return Run(
        options.n_ctx,
        options.n_batch,
        options.n_sessions,
        options.drafting.n_heads(header.shape.n_heads),
        options.kv_type,
        options.n_checkpoints,
        options.flash_attention is not False,
    )


def layout_of(header: Header, options: EngineOptions, machine: Machine) -> Layout:
    """Returns where llama.cpp puts everything with these options."""
    layers = header.shape.layers
    places = _given_places(header, options, machine)
    heads = [_last_gpu(options, machine)] * (len(layers) - header.shape.n_trunk)
    devices = [*places[: header.shape.n_trunk], *heads] if options.side_file else places[: len(layers)]
    experts = tuple(
        tuple(_override(f"blk.{i}.ffn_{matrix}_exps.weight", options) or device for matrix in MATRICES)
        if layer.is_moe
        else ()
        for i, (device, layer) in enumerate(zip(devices, layers, strict=True))
    )
    return Layout(tuple(devices), experts, places[-1])


def _given_places(header: Header, options: EngineOptions, machine: Machine) -> list[str]:
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
