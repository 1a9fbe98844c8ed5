"""From a placement to the options that make llama.cpp do exactly that."""

import os
from itertools import groupby, pairwise
from pathlib import Path

from step35.gguf_facts import read_header, with_side
from step35.options import EngineOptions
from step35.placement import Placement
from step35.plan_file import from_text
from step35.rpc import parse_endpoint
from step35.usage import HOST, MATRICES, Layout, gpu_name

OFFLOAD_VARIABLE = "GGML_OP_OFFLOAD_MIN_BATCH"
"""Read once, when ggml's backends are registered: to be set before the first model is loaded."""
ALL_LAYERS = -1


def planned_options(model: Path, plan: Path, *, mtp: Path | None = None, draft: str = "auto") -> EngineOptions:
    """Returns the engine's options of a plan file, and sets what ggml reads from the environment.

    Raises SettingsError that names the line of a mistake in the plan.
    """
    header = read_header(model) if mtp is None else with_side(read_header(model), read_header(mtp))
    placement = from_text(plan.read_text(encoding="utf-8"), str(plan), header)
    for host in placement.rpc:
        parse_endpoint(host)
    os.environ.update(environment(placement))
    return engine_options(placement, model, mtp=mtp, draft=draft)


def engine_options(placement: Placement, model: Path, *, mtp: Path | None = None, draft: str = "auto") -> EngineOptions:
    """Returns the engine's options for a placement."""
    run, layout = placement.run, placement.layout
    return EngineOptions(
        model,
        mtp=mtp,
        draft=draft if run.n_heads or mtp else "off",
        n_ctx=run.n_ctx,
        n_batch=run.n_batch,
        n_sessions=run.n_sessions,
        n_checkpoints=run.n_checkpoints,
        n_threads=placement.n_threads,
        n_gpu_layers=ALL_LAYERS if layout.gpus else 0,
        load_mode=placement.load_mode,
        kv_type=run.kv_type,
        op_offload=placement.op_offload_from is not None,
        overrides=overrides(layout),
        tensor_split=tensor_split(layout),
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


def tensor_split(layout: Layout) -> tuple[float, ...]:
    """Returns the share of the layers that each GPU takes; the output counts as one more layer.

    llama.cpp compares layer / (n_layers + 1) with the shares' running sum, so the cuts lie between two layers.
    """
    n_gpus = len(layout.gpus)
    if n_gpus < 2:
        return ()
    places = [*layout.layers, layout.output]
    counts = {device: len(list(group)) for device, group in groupby(places)}
    cuts = [sum(counts.get(gpu_name(j), 0) for j in range(i + 1)) - 0.5 for i in range(n_gpus - 1)]
    bounds = [0.0, *(max(0.0, cut) for cut in cuts), float(len(places))]
    return tuple(b - a for a, b in pairwise(bounds))
