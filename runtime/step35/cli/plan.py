"""`step35 plan`: what would go where on a box, what that takes, how fast it may be, and whether it fits."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from step35.choices import KV_TYPES
from step35.sizes import format_size, parse_size

if TYPE_CHECKING:
    from step35.planning.autoplan import EnginePlan
    from step35.planning.hardware import Sources
    from step35.planning.model_header import Header, Headers


class Size(click.ParamType):
    """A size with its unit."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def engine_plan(
    model: Path, plan_path: Path | None, mtp: Path | None, draft: str = "auto", **settings: Any
) -> "EnginePlan":
    """Returns what a command's options come to: what the plan file says, or a plan made for this box.

    A setting of None is left to the plan. Says on stderr what the user may not expect.
    """
    from step35.planning.autoplan import file_plan
    from step35.planning.hardware import before_loading
    from step35.planning.model_header import read_headers

    if plan_path is None:
        sources = before_loading()  # a llama.cpp that can't be loaded is named before a file that is wrong
        return plan_for_this_box(read_headers(model, mtp), sources, draft, **settings)
    _refuse_beside_a_plan(*settings)
    return file_plan(read_headers(model, mtp), plan_path, draft=draft)


def plan_for_this_box(headers: "Headers", sources: "Sources", draft: str, **settings: Any) -> "EnginePlan":
    """Returns a plan made for this box; says on stderr what the user may not expect."""
    from step35.planning.autoplan import auto_plan

    planned = auto_plan(headers, sources, draft=draft, **settings)
    if planned.note:
        click.echo(f"step35: {planned.note}", err=True)
    return planned


def _refuse_beside_a_plan(*names: str) -> None:
    ctx = click.get_current_context()
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--plan and {param.opts[-1]}: the plan says it already; leave one out, or edit the plan"
            )


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--mtp", type=click.Path(path_type=Path), help="A file with the MTP heads, if MODEL has none.")
@click.option(
    "--machine", "machine_name", metavar="NAME", help="A box of models.yaml, or a .yaml file; default this one."
)
@click.option("-c", "--ctx", "n_ctx", type=int, help="Context size in tokens; default the longest that fits.")
@click.option("--policy", default="auto", show_default=True, help="auto, unified, split, gpu, cpu or rpc.")
@click.option("--gpu-budget", type=Size(), help="What to take of each GPU at most, such as 22GiB.")
@click.option(
    "-b", "--batch", "n_batch", type=click.IntRange(8, 1 << 16), help="Prompt tokens per decode; default the plan's."
)
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), help="Type of the KV cache; default the plan's.")
@click.option(
    "--sessions", "n_sessions", type=click.IntRange(1, 64), default=1, show_default=True, help="Sessions at a time."
)
@click.option(
    "--rpc", multiple=True, metavar="HOST:PORT", help="A second box: its rpc-server, or its NAME; repeatable."
)
@click.option(
    "--network-gbps", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Gbit/s to the second box."
)
@click.option("--no-heads", is_flag=True, help="Without the MTP heads.")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="Estimate drafting with the experts that step35 trace counted."
)
@click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), help="Judge this plan file instead of making one."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan to a file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def plan(model, mtp, machine_name, plan_path, rpc, network_gbps, trace, out, as_json, no_heads, **wishes) -> None:
    """Plans where MODEL's tensors and buffers go; reads its header only. Exit code 1 if it doesn't fit."""
    from step35.planning.advice import advice
    from step35.planning.hardware import probe, this_box
    from step35.planning.machine import find_machine
    from step35.planning.model_header import read_model
    from step35.planning.placement import Constraints, judge, place, wishes_of
    from step35.planning.plan_file import read_plan, rpc_of, to_text
    from step35.planning.remote import with_remotes

    if plan_path is not None:
        _refuse_beside_a_plan(*wishes, "rpc", "no_heads")
    header = read_model(model, None if no_heads else mtp)
    hosts = rpc if plan_path is None else rpc_of(plan_path, header)
    machine = find_machine(machine_name) if machine_name else probe(this_box())
    if hosts:
        machine = with_remotes(machine, hosts, network_gbps * 1e9 / 8)
    asked = Constraints(**wishes, rpc=rpc, with_heads=not no_heads, distinct=_distinct(trace, header) if trace else ())
    if plan_path is None:
        judged = place(header, machine, asked)
    else:
        judged = judge(header, machine, read_plan(plan_path, header, machine), asked.distinct)
        asked = wishes_of(judged.placement, asked.distinct)
    hints = [] if judged.fits else advice(header, machine, asked)
    if plan_path is not None:
        hints = [f"a new plan with {hint}" for hint in hints]
    if out is not None:
        out.write_text(to_text(judged.placement, model.name), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(as_data(header, judged, hints)))
    else:
        click.echo(as_table(header, judged, hints))
    if not judged.fits:
        raise SystemExit(1)


def _distinct(trace: Path, header: "Header") -> tuple[float, ...]:
    from step35.planning.routing_trace import distinct_of
    from step35.yaml_file import read_text

    try:
        data = json.loads(read_text(trace))
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.ClickException(f"not a routing trace: {trace}: {error}; write one with step35 trace") from error
    return distinct_of(data, str(trace), header.shape.n_expert, header.shape.n_expert_used)


def as_data(header, judged, hints) -> dict[str, object]:
    """Returns a judged placement under the names that --json prints; sizes in bytes, speeds in tokens a second."""
    placement = judged.placement
    run = placement.run
    return {
        "model": str(header.path),
        "machine": placement.machine,
        "policy": placement.policy,
        "fits": judged.fits,
        "try": hints,
        "context": run.n_ctx,
        "batch": run.n_batch,
        "kv_type": run.kv_type,
        "usage": {device: {str(purpose): n for purpose, n in sizes.items()} for device, sizes in judged.usage.items()},
        "budgets": [
            {"name": p.name, "devices": p.devices, "used": _taken(judged, p), "budget": p.budget} for p in judged.pools
        ],
        "estimates": [
            {
                "n_past": s.n_past,
                "prefill_tps": s.prefill,
                "decode_tps": s.decode,
                "drafted_tps": s.drafted,
                "depth": s.depth,
            }
            for s in judged.speeds
        ],
        "reasons": placement.reasons,
    }


def _taken(judged, pool) -> int:
    from step35.planning.memory_usage import taken

    return taken(judged.usage, pool)


def as_table(header, judged, hints) -> str:
    """Returns a judged placement as text: settings, bytes by device and purpose, reasons, estimate, verdict."""
    placement = judged.placement
    run = placement.run
    what = f"{header.path.name} ({format_size(header.n_bytes)}) on {placement.machine}, policy {placement.policy}"
    settings = f"context {run.n_ctx}, batch {run.n_batch}, KV {run.kv_type}, "
    settings += f"{run.n_sessions} session(s), {run.n_heads} MTP heads"
    lines = [what, settings, "", *_bytes_table(judged.usage), ""]
    lines += [f"{p.name}: {format_size(_taken(judged, p))} of {format_size(p.budget)}" for p in judged.pools]
    lines += ["", *(f"- {reason}" for reason in placement.reasons), ""]
    for s in judged.speeds:
        drafted = f", {s.drafted:.1f} at draft depth {s.depth}" if s.depth else ""
        lines.append(
            f"estimate at {s.n_past} tokens: prefill {s.prefill:.0f} tok/s, decode {s.decode:.1f} tok/s{drafted}"
        )
    return "\n".join([*lines, verdict(judged.fits, hints)])


def verdict(does_fit: bool, hints: list[str]) -> str:
    """Returns the last line of a plan."""
    if does_fit:
        return "fits"
    return f"does not fit; try {' or '.join(hints)}" if hints else "does not fit at any context; this box is too small"


def _bytes_table(usage) -> list[str]:
    from step35.planning.memory_usage import Purpose

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
