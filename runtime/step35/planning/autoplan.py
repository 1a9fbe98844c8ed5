"""A plan for this very box where no plan file is given: quick to make, and said in one line where it matters."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step35.choices import Draft
from step35.options import EngineOptions
from step35.planning.admission import MemoryDemand
from step35.planning.advice import advice
from step35.planning.hardware import Sources, probe
from step35.planning.llama_options import engine_options, environment
from step35.planning.machine import Machine
from step35.planning.memory_usage import HOST
from step35.planning.model_header import Header, read_model
from step35.planning.placement import Constraints, PlanReport, place

DEFAULT_CTX = 32768
"""What nobody asked for may be shortened; what was asked for fits or is refused."""
NOMINAL_BANDWIDTH = 50e9
_WISHED = ("n_ctx", "n_batch", "kv_type", "n_sessions", "n_checkpoints")
_BY_HAND = ("n_gpu_layers", "overrides", "tensor_split")
"""Settings that place tensors themselves: with one of them there is nothing left to plan."""


@dataclass(frozen=True, slots=True)
class AutoPlan:
    """The engine's options, and what is worth saying of how they came about."""

    options: EngineOptions
    note: str | None = None


def auto_options(
    model: Path, sources: Sources, *, mtp: Path | None = None, draft: str = "auto", **settings: Any
) -> AutoPlan:
    """Plans for the box that `sources` describe, and sets what ggml reads from the environment.

    Settings are EngineOptions' by name; None leaves one to the plan, anything else wins over it.
    Raises DoesNotFit where what was asked for can't be held.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    header = _header(model, mtp, draft)
    default_ctx = min(DEFAULT_CTX, header.shape.n_ctx_train)
    by_hand = EngineOptions(model, mtp, draft, **{"n_ctx": default_ctx} | given)
    if any(name in given for name in _BY_HAND):
        return AutoPlan(by_hand)
    wishes = Constraints(**{name: given[name] for name in _WISHED if name in given}, with_heads=_drafts(draft))
    judged = plan_here(header, sources, wishes)
    if judged is None:
        return AutoPlan(by_hand)
    os.environ.update(environment(judged.placement))
    planned = engine_options(judged.placement, header, mtp=mtp, draft=draft)
    return AutoPlan(replace(planned, draft=draft, **given), note(judged, wishes, default_ctx))


def plan_here(header: Header, sources: Sources, wishes: Constraints) -> PlanReport | None:
    """Returns the plan for the box that `sources` describe; None where its memory is unknown.

    Without a context asked for, the default or the longest that fits.
    """
    machine = probe(replace(sources, bandwidth=lambda n_threads: NOMINAL_BANDWIDTH))
    if not machine.total_bytes:
        return None
    judged = place_here(header, machine, wishes)
    if not _needs_bandwidth(judged):
        return judged
    return place_here(header, probe(sources), wishes)


def _header(model: Path, mtp: Path | None, draft: str) -> Header:
    return read_model(model, mtp if _drafts(draft) else None)


def _drafts(draft: str) -> bool:
    return Draft.of(draft).uses_heads


def _needs_bandwidth(judged: PlanReport) -> bool:
    """Whether the RAM's bandwidth decides anything: only where it competes with a GPU's."""
    layout = judged.placement.layout
    return bool(layout.gpus) and layout.host_experts


def place_here(header: Header, machine: Machine, wishes: Constraints) -> PlanReport:
    """Returns a placement that fits; without a context asked for, with the default one or the longest that fits.

    Raises DoesNotFit that says what would.
    """
    if wishes.n_ctx is not None:
        return _check(header, machine, wishes, place(header, machine, wishes))
    judged = place(header, machine, replace(wishes, n_ctx=min(DEFAULT_CTX, header.shape.n_ctx_train)))
    if not judged.fits:
        judged = place(header, machine, wishes)
    return _check(header, machine, wishes, judged)


def _check(header: Header, machine: Machine, wishes: Constraints, judged: PlanReport) -> PlanReport:
    if not judged.fits:
        hints = advice(header, machine, replace(wishes, n_ctx=judged.placement.run.n_ctx))
        MemoryDemand(judged.usage, judged.pools).check(
            f"try {' or '.join(hints)}" if hints else "this box is too small"
        )
    return judged


def note(judged: PlanReport, wishes: Constraints, default_ctx: int) -> str | None:
    """Returns one sentence on what the user may not expect; None if everything is as one would."""
    placement = judged.placement
    experts = [device for devices in placement.layout.experts for device in devices]
    parts = []
    if placement.layout.gpus and HOST in experts:
        share = 1 - experts.count(HOST) / len(experts)
        parts.append(f"{share:.0%} of the routed experts on the GPU, the rest in RAM")
    if wishes.n_ctx is None and placement.run.n_ctx < default_ctx:
        parts.append(f"context {placement.run.n_ctx} instead of {default_ctx}, the longest that fits")
    if wishes.kv_type is None and placement.run.kv_type != "f16":
        parts.append(f"KV cache {placement.run.kv_type} instead of f16, to fit")
    return f"planned {placement.policy}: {'; '.join(parts)}; step35 plan tells more" if parts else None
