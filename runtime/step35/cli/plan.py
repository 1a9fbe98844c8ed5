"""`step35 plan`: what would go where on a box, what that takes, how fast it may be, and whether it fits."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from step35.choices import KV_TYPES
from step35.cli.renamed_option import mtp_file_option, renamed_option
from step35.sizes import parse_size

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
@mtp_file_option
@click.option(
    "--machine", "machine_name", metavar="NAME", help="A box of models.yaml, or a .yaml file; default this one."
)
@click.option("-c", "--ctx", "n_ctx", type=int, help="Context size in tokens; default the longest that fits.")
@click.option("--policy", default="auto", show_default=True, help="auto, unified, split, gpu, cpu or rpc.")
@click.option("--gpu-budget", type=Size(), help="What to take of each GPU at most, such as 22GiB.")
@click.option(
    "-b",
    "--batch",
    "n_batch",
    type=click.IntRange(8, 1 << 16),
    help="Prompt tokens per decode (batch and ubatch); default the plan's.",
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
@renamed_option(
    "--routing",
    "--trace",
    "routing",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Estimate drafting with the experts that step35 trace counted.",
)
@click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), help="Judge this plan file instead of making one."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan to a file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def plan(
    model: Path,
    mtp: Path | None,
    machine_name: str | None,
    plan_path: Path | None,
    rpc: tuple[str, ...],
    network_gbps: float,
    routing: Path | None,
    out: Path | None,
    as_json: bool,
    no_heads: bool,
    **constraints: Any,
) -> None:
    """Plans where MODEL's tensors and buffers go; reads its header only. Exit code 1 if it doesn't fit."""
    from step35.cli.plan_report import as_data, as_table
    from step35.planning.advice import advice
    from step35.planning.hardware import probe, this_box
    from step35.planning.machine import find_machine
    from step35.planning.model_header import read_model
    from step35.planning.placement import Constraints, constraints_of, place, report_on
    from step35.planning.plan_file import read_plan, rpc_of, to_text
    from step35.planning.remote import with_remotes

    if plan_path is not None:
        _refuse_beside_a_plan(*constraints, "rpc", "no_heads")
    header = read_model(model, None if no_heads else mtp)
    hosts = rpc if plan_path is None else rpc_of(plan_path, header)
    machine = find_machine(machine_name) if machine_name else probe(this_box())
    if hosts:
        machine = with_remotes(machine, hosts, network_gbps * 1e9 / 8)
    distinct = () if routing is None else _distinct(routing, header)
    asked = Constraints(**constraints, rpc=rpc, with_heads=not no_heads, distinct=distinct)
    if plan_path is None:
        report = place(header, machine, asked)
    else:
        report = report_on(header, machine, read_plan(plan_path, header, machine), distinct)
        asked = constraints_of(report.placement, distinct)
    hints = [] if report.fits else advice(header, machine, asked)
    if plan_path is not None:
        hints = [f"a new plan with {hint}" for hint in hints]
    if out is not None:
        out.write_text(to_text(report.placement, model.name), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(as_data(header, report, hints)))
    else:
        click.echo(as_table(header, report, hints))
    if not report.fits:
        raise SystemExit(1)


def _distinct(file: Path, header: "Header") -> tuple[float, ...]:
    from step35.planning.routing_trace import distinct_of
    from step35.yaml_file import read_text

    try:
        data = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.ClickException(f"not a routing trace: {file}: {error}; write one with step35 trace") from error
    return distinct_of(data, str(file), header.shape.n_expert, header.shape.n_expert_used)
