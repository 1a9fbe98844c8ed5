"""The plan file: a placement as text to read, edit and run again."""

import re
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import yaml

from step35.choices import KV_TYPES, PLANNED_LOAD_MODES
from step35.errors import SettingsError
from step35.options import MAX_SEQUENCES
from step35.planning.context_memory import Run
from step35.planning.machine import Machine
from step35.planning.memory_usage import HOST, MATRICES, Layout, gpu_name
from step35.planning.model_header import Header, ModelShape
from step35.planning.placement import POLICIES, Placement
from step35.sizes import exact_size, format_size, parse_size
from step35.yaml_file import Section, one_of, parse_yaml, read_text, text, whole

_NEVER, _NO_BUDGET = "never", "none"
_MAX_GPUS = 16
_RANGES = "layers such as 3-17, or matrices such as 18.gate"


def to_text(placement: Placement, model_name: str) -> str:
    """Returns the plan as YAML."""
    run, layout = placement.run, placement.layout
    budget = _NO_BUDGET if placement.gpu_budget is None else exact_size(placement.gpu_budget)
    offload = _NEVER if placement.op_offload_from is None else placement.op_offload_from
    return "\n".join(
        [
            "# A step35 plan: what goes where, and how the engine runs. Edit what you like and run it with --plan.",
            f"model: {_quoted(model_name)}",
            f"header_sha256: {placement.digest}  # of the model's header: a plan is for one file",
            f"machine: {_quoted(placement.machine)}",
            f"policy: {placement.policy}",
            f"gpu_budget: {budget}",
            f"context: {run.n_ctx}",
            f"batch: {run.n_batch}  # prompt tokens a decode",
            f"kv_type: {run.kv_type}",
            f"sessions: {run.n_sessions}",
            f"checkpoints: {run.n_checkpoints}  # a session",
            f"heads: {run.n_heads}  # MTP heads that draft",
            f"threads: {placement.n_threads}",
            f"load_mode: {placement.load_mode}",
            *(["numa: distribute  # threads and pages over all nodes"] if placement.spreads_numa else []),
            f"op_offload_from: {offload}  # the batch from which the GPU computes host weights, or never",
            "layers:  # attention, shared experts, dense layers, norms and KV cells; the MTP heads are the last layers",
            *(f"  {device}: [{', '.join(ranges)}]" for device, ranges in _by_device(_layer_ranges(layout))),
            f"output: {layout.output}",
            "experts:  # routed experts: whole layers, or single matrices (gate, up, down)",
            *(f"  {device}: [{', '.join(ranges)}]" for device, ranges in _by_device(_expert_ranges(layout))),
            "reasons:",
            *(f"  - {_quoted(reason)}" for reason in placement.reasons),
            *(
                [f"rpc: [{', '.join(map(_quoted, placement.rpc))}]  # rpc-servers of the first GPUs"]
                if placement.rpc
                else []
            ),
            *(["measured:  # by step35 tune"] if placement.measured else []),
            *(f"  - {_quoted(line)}" for line in placement.measured),
            "",
        ]
    )


def _quoted(value: str) -> str:
    return yaml.safe_dump(value, default_style='"', width=1 << 20, allow_unicode=True).strip()


def _by_device(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for device, ranges in pairs:
        found.setdefault(device, []).append(ranges)
    yield from sorted(found.items(), key=lambda item: (item[0] == HOST, item[0]))


def _layer_ranges(layout: Layout) -> Iterator[tuple[str, str]]:
    for device, group in groupby(enumerate(layout.layers), key=lambda pair: pair[1]):
        yield device, _range([i for i, _ in group])


def _expert_ranges(layout: Layout) -> Iterator[tuple[str, str]]:
    for devices, group in groupby(enumerate(layout.experts), key=lambda pair: pair[1]):
        layers = [i for i, _ in group]
        if len(set(devices)) == 1:
            yield devices[0], _range(layers)
        elif devices:
            for layer in layers:
                yield from ((device, f"{layer}.{matrix}") for matrix, device in zip(MATRICES, devices, strict=True))


def _range(layers: list[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


# reading


def read_plan(path: Path, header: Header, machine: Machine | None = None) -> Placement:
    """Returns the placement of a plan file; see from_text."""
    return from_text(read_text(path), str(path), header, machine)


def rpc_of(path: Path, header: Header) -> tuple[str, ...]:
    """Returns the rpc-servers of a plan file, whose GPUs come before the machine's own."""
    return read_plan(path, header).rpc


def from_text(content: str, file: str, header: Header, machine: Machine | None = None) -> Placement:
    """Returns the placement of a plan file; raises SettingsError that names the line of a mistake.

    Without a machine, devices and budget aren't compared with one.
    """
    plan = parse_yaml(content, file)
    plan.take("model", text, "a text", "")
    digest = plan.take("header_sha256", text, "a text")
    if digest != header.digest:
        raise plan.fault(
            "header_sha256", f"{header.digest} ({header.path.name})", f"{digest}; make a plan for this file"
        )
    placement = Placement(
        machine=plan.take("machine", text, "a text"),
        policy=plan.take("policy", one_of(*POLICIES[1:]), f"one of {', '.join(POLICIES[1:])}"),
        digest=digest,
        run=_run(plan, header.shape),
        layout=_layout(plan, header.shape, machine),
        load_mode=plan.take("load_mode", one_of(*PLANNED_LOAD_MODES), f"one of {', '.join(PLANNED_LOAD_MODES)}"),
        n_threads=plan.take("threads", _within(1, 4096), "1 to 4096"),
        op_offload_from=plan.take("op_offload_from", _offload, f"a number of tokens, or {_NEVER}"),
        gpu_budget=plan.take("gpu_budget", _budget, f"a size such as 22GiB, or {_NO_BUDGET}", None),
        reasons=plan.take("reasons", _texts, "a list of texts", ()),
        spreads_numa=plan.take("numa", one_of("distribute", "none"), "distribute or none", "none") == "distribute",
        rpc=plan.take("rpc", _texts, "a list of HOST:PORT", ()),
        measured=plan.take("measured", _texts, "a list of texts", ()),
    )
    plan.end()
    if machine is not None:
        _check_budget(plan, placement, machine)
    return placement


def _run(plan: Section, shape: ModelShape) -> Run:
    n_batch = plan.take("batch", _within(8, 1 << 16), f"8 to {1 << 16} tokens")
    n_most = min(MAX_SEQUENCES, n_batch)
    return Run(
        n_ctx=plan.take("context", _within(8, shape.n_ctx_train), f"8 to {shape.n_ctx_train} tokens"),
        n_batch=n_batch,
        n_sessions=plan.take("sessions", _within(1, n_most), f"1 to {n_most}, and no more than the batch"),
        n_heads=plan.take("heads", _within(0, shape.n_heads), f"0 to {shape.n_heads} (the file's)"),
        kv_type=plan.take("kv_type", one_of(*KV_TYPES), f"one of {', '.join(KV_TYPES)}"),
        n_checkpoints=plan.take("checkpoints", _within(0, 1 << 10), f"0 to {1 << 10}"),
    )


def _layout(plan: Section, shape: ModelShape, machine: Machine | None) -> Layout:
    devices = [gpu_name(i) for i in range(_MAX_GPUS if machine is None else len(machine.gpus))] + [HOST]
    layers = _assign(
        plan, "layers", devices, {(i, m) for i in range(len(shape.layers)) for m in MATRICES}, whole_only=True
    )
    moe = [i for i, layer in enumerate(shape.layers) if layer.is_moe]
    experts = _assign(plan, "experts", devices, {(i, m) for i in moe for m in MATRICES}, whole_only=False)
    output = plan.take("output", one_of(*devices), f"one of {', '.join(devices)}")
    layout = Layout(
        tuple(layers[i, MATRICES[0]] for i in range(len(shape.layers))),
        tuple(tuple(experts[i, m] for m in MATRICES) if layer.is_moe else () for i, layer in enumerate(shape.layers)),
        output,
    )
    _check_order(plan, layout)
    _check_experts(plan, layout)
    return layout


def _check_order(plan: Section, layout: Layout) -> None:
    """llama.cpp knows one cut between two devices, and puts the layers that stay on the host before all others."""
    places = [*((f"layer {i}", device) for i, device in enumerate(layout.layers)), ("output", layout.output)]
    for (_, before), (what, device) in pairwise(places):
        if _rank(device) < _rank(before):
            key = "output" if what == "output" else "layers"
            raise plan.fault(key, f"{HOST} first, then GPU0, GPU1 and so on", f"{what} on {device} after {before}")


def _rank(device: str) -> int:
    return -1 if device == HOST else int(device[3:])


def _check_experts(plan: Section, layout: Layout) -> None:
    for i, (layer, devices) in enumerate(zip(layout.layers, layout.experts, strict=True)):
        for device in devices:
            if device not in (HOST, layer):
                where = f"{layer}, where its attention is" + (f", or on {HOST}" if layer != HOST else "")
                raise plan.fault("experts", f"layer {i} on {where}", device)


def _assign(
    plan: Section, key: str, devices: list[str], wanted: set[tuple[int, str]], *, whole_only: bool
) -> dict[tuple[int, str], str]:
    """Returns the device of each (layer, matrix); every wanted one must be there exactly once."""
    section = plan.section(key)
    assigned: dict[tuple[int, str], str] = {}
    for device in section.names():
        if device not in devices:
            raise section.fault(device, f"a device, one of {', '.join(devices)}", device)
        for part in section.take(device, _parts, _RANGES):
            if whole_only and part[1] is not None:
                raise section.fault(device, "whole layers", f"{part[0][0]}.{part[1]}")
            for item in ((layer, m) for layer in part[0] for m in ([part[1]] if part[1] else MATRICES)):
                if item not in wanted:
                    raise section.fault(device, _span(wanted, key), f"layer {item[0]}")
                if item in assigned:
                    raise section.fault(device, "every layer once", f"layer {item[0]} twice")
                assigned[item] = device
    missing = sorted({layer for layer, _ in wanted - set(assigned)})
    if missing:
        raise plan.fault(key, _span(wanted, key), f"nothing for layer {missing[0]}")
    return assigned


def _span(wanted: set[tuple[int, str]], key: str) -> str:
    layers = sorted({layer for layer, _ in wanted})
    return f"the {key} of layers {layers[0]}-{layers[-1]}, each once" if layers else f"no {key}"


def _parts(value: Any) -> list[tuple[range, str | None]]:
    return [_part(str(item)) for item in (value if isinstance(value, list) else [value])]


def _part(item: str) -> tuple[range, str | None]:
    match = re.fullmatch(rf"(\d{{1,4}})(?:-(\d{{1,4}})|\.({'|'.join(MATRICES)}))?", item, re.ASCII)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError
    return range(int(match[1]), int(match[2] or match[1]) + 1), match[3]


def _within(low: int, high: int):
    def check(value: Any) -> int:
        if not low <= whole(value) <= high:
            raise ValueError
        return value

    return check


def _offload(value: Any) -> int | None:
    return None if value == _NEVER else _within(1, 1 << 16)(value)


def _budget(value: Any) -> int | None:
    try:
        return None if value == _NO_BUDGET else parse_size(text(value))
    except SettingsError as error:
        raise ValueError from error


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text(item) for item in value or ())


def _check_budget(plan: Section, placement: Placement, machine: Machine) -> None:
    largest = max((gpu.total_bytes for gpu in machine.gpus), default=0)
    if placement.gpu_budget is not None and placement.gpu_budget > largest:
        got = format_size(placement.gpu_budget)
        raise plan.fault("gpu_budget", f"at most {format_size(largest)} ({machine.name})", got)
