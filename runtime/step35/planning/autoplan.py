"""An engine's plan: as a plan file says, or made for this very box; said in one line where it matters."""

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
from step35.planning.model_header import Header, Headers
from step35.planning.placement import Constraints, PlanReport, place
from step35.planning.plan_file import read_plan
from step35.planning.remote import parse_endpoint

DEFAULT_CTX = 32768
"""What nobody asked for may be shortened; what was asked for fits or is refused."""
NOMINAL_BANDWIDTH = 50e9
_CONSTRAINED = ("n_ctx", "n_batch", "kv_type", "n_sessions", "n_checkpoints")
_BY_HAND = ("n_gpu_layers", "overrides", "tensor_split")
"""Settings that place tensors themselves: with one of them there is nothing left to plan."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """An engine's options, the headers that they were made for, and what a user may not expect of them."""

    options: EngineOptions
    headers: Headers
    note: str | None = None


def file_plan(headers: Headers, plan: Path, *, draft: str = "auto") -> EnginePlan:
    """Returns what a plan file says, and sets what ggml reads from the environment.

    Raises SettingsError that names the line of a mistake in the plan.
    """
    header = headers.joined()
    placement = read_plan(plan, header)
    for host in placement.rpc:
        parse_endpoint(host)
    os.environ.update(environment(placement))
    return EnginePlan(engine_options(placement, header, mtp=headers.side_path, draft=draft), headers)


def auto_plan(headers: Headers, sources: Sources, *, draft: str = "auto", **settings: Any) -> EnginePlan:
    """Plans for the box that `sources` describe, and sets what ggml reads from the environment.

    Settings are EngineOptions' by name; None leaves one to the plan, anything else wins over it.
    Raises DoesNotFit where what was asked for doesn't fit.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    uses_heads = Draft.of(draft).uses_heads
    header = headers.joined(with_heads=uses_heads)
    default_ctx = min(DEFAULT_CTX, header.shape.n_ctx_train)
    mtp = headers.side_path
    by_hand = replace(EngineOptions(header.path, mtp, draft, n_ctx=default_ctx), **given)
    if any(name in given for name in _BY_HAND):
        return EnginePlan(by_hand, headers)
    constraints = Constraints(**{name: given[name] for name in _CONSTRAINED if name in given}, with_heads=uses_heads)
    report = plan_here(header, sources, constraints)
    if report is None:
        return EnginePlan(by_hand, headers)
    os.environ.update(environment(report.placement))
    planned = engine_options(report.placement, header, mtp=mtp, draft=draft)
    return EnginePlan(replace(planned, draft=draft, **given), headers, note(report, constraints, default_ctx))


def plan_here(header: Header, sources: Sources, constraints: Constraints) -> PlanReport | None:
    """Returns the plan for the box that `sources` describe; None where its memory is unknown.

    Without a context asked for, the default or the longest that fits.
    """
    machine = probe(replace(sources, bandwidth=lambda n_threads: NOMINAL_BANDWIDTH))
    if not machine.total_bytes:
        return None
    report = place_here(header, machine, constraints)
    if not _needs_bandwidth(report):
        return report
    return place_here(header, probe(sources), constraints)


def _needs_bandwidth(report: PlanReport) -> bool:
    """Whether the RAM's bandwidth decides anything: only where it competes with a GPU's."""
    layout = report.placement.layout
    return bool(layout.gpus) and layout.host_experts


def place_here(header: Header, machine: Machine, constraints: Constraints) -> PlanReport:
    """Returns a placement that fits; without a context asked for, with the default one or the longest that fits.

    Raises DoesNotFit that says what would.
    """
    if constraints.n_ctx is not None:
        return _check(header, machine, constraints, place(header, machine, constraints))
    report = place(header, machine, replace(constraints, n_ctx=min(DEFAULT_CTX, header.shape.n_ctx_train)))
    if not report.fits:
        report = place(header, machine, constraints)
    return _check(header, machine, constraints, report)


def _check(header: Header, machine: Machine, constraints: Constraints, report: PlanReport) -> PlanReport:
    if not report.fits:
        hints = advice(header, machine, replace(constraints, n_ctx=report.placement.run.n_ctx))
        MemoryDemand(report.usage, report.pools).check(
            f"try {' or '.join(hints)}" if hints else "this box is too small"
        )
    return report


def note(report: PlanReport, constraints: Constraints, default_ctx: int) -> str | None:
    """Returns one sentence on what the user may not expect; None if everything is as one would."""
    placement = report.placement
    experts = [device for devices in placement.layout.experts for device in devices]
    parts = []
    if placement.layout.gpus and HOST in experts:
        share = 1 - experts.count(HOST) / len(experts)
        parts.append(f"{share:.0%} of the routed experts on the GPU, the rest in RAM")
    if constraints.n_ctx is None and placement.run.n_ctx < default_ctx:
        parts.append(f"context {placement.run.n_ctx} instead of {default_ctx}, the longest that fits")
    if constraints.kv_type is None and placement.run.kv_type != "f16":
        parts.append(f"KV cache {placement.run.kv_type} instead of f16, to fit")
    return f"planned {placement.policy}: {'; '.join(parts)}; step35 plan tells more" if parts else None
