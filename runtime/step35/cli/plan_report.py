"""How `step35 plan` shows a plan's report: as one JSON object, or as a table with a verdict."""

from step35.planning.memory_usage import MemoryUsage, Purpose, taken
from step35.planning.model_header import Header
from step35.planning.placement import PlanReport
from step35.sizes import format_size


def as_data(header: Header, report: PlanReport, hints: list[str]) -> dict[str, object]:
    """Returns a plan's report under the names that --json prints; sizes in bytes, speeds in tokens a second."""
    placement = report.placement
    run = placement.run
    return {
        "model": str(header.path),
        "machine": placement.machine,
        "policy": placement.policy,
        "fits": report.fits,
        "try": hints,
        "context": run.n_ctx,
        "batch": run.n_batch,
        "kv_type": run.kv_type,
        "usage": {device: {str(purpose): n for purpose, n in sizes.items()} for device, sizes in report.usage.items()},
        "budgets": [
            {"name": p.name, "devices": p.devices, "used": taken(report.usage, p), "budget": p.budget}
            for p in report.pools
        ],
        "estimates": [
            {
                "n_past": s.n_past,
                "prefill_tps": s.prefill,
                "decode_tps": s.decode,
                "drafted_tps": s.drafted,
                "depth": s.depth,
            }
            for s in report.speeds
        ],
        "reasons": placement.reasons,
    }


def as_table(header: Header, report: PlanReport, hints: list[str]) -> str:
    """Returns a plan's report as text: settings, bytes by device and purpose, reasons, estimate, verdict."""
    placement = report.placement
    run = placement.run
    what = f"{header.path.name} ({format_size(header.n_bytes)}) on {placement.machine}, policy {placement.policy}"
    settings = f"context {run.n_ctx}, batch {run.n_batch}, KV {run.kv_type}, "
    settings += f"{run.n_sessions} session(s), {run.n_heads} MTP heads"
    lines = [what, settings, "", *_bytes_table(report.usage), ""]
    lines += [f"{p.name}: {format_size(taken(report.usage, p))} of {format_size(p.budget)}" for p in report.pools]
    lines += ["", *(f"- {reason}" for reason in placement.reasons), ""]
    for s in report.speeds:
        drafted = f", {s.drafted:.1f} at draft depth {s.depth}" if s.depth else ""
        lines.append(
            f"estimate at {s.n_past} tokens: prefill {s.prefill:.0f} tok/s, decode {s.decode:.1f} tok/s{drafted}"
        )
    return "\n".join([*lines, verdict(report.fits, hints)])


def verdict(does_fit: bool, hints: list[str]) -> str:
    """Returns the last line of a plan."""
    if does_fit:
        return "fits"
    return f"does not fit; try {' or '.join(hints)}" if hints else "does not fit at any context; this box is too small"


def _bytes_table(usage: MemoryUsage) -> list[str]:
    devices = list(usage)
    purposes = [p for p in Purpose if any(p in sizes for sizes in usage.values())]
    rows = [("", *devices)]
    rows += [(str(p), *(format_size(usage[d][p]) if p in usage[d] else "-" for d in devices)) for p in purposes]
    rows.append(("all", *(format_size(sum(usage[d].values())) for d in devices)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
