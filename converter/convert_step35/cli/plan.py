"""`convert-step35 plan`: every tensor's type and size, before anything is read or written."""

from pathlib import Path
from typing import Any

import click

from convert_step35.cli import tables
from convert_step35.cli.console import PATH, console, json_option, print_json
from convert_step35.cli.conversion_options import GivenOptions, conversion_options, plan_conversion
from convert_step35.planning.plan import Plan
from convert_step35.sizes import format_size
from convert_step35.writing.report import plan_entries, totals


@click.command()
@click.argument("checkpoint", type=PATH)
@conversion_options
@json_option
def plan(checkpoint: Path, given: GivenOptions, as_json: bool) -> None:
    """Print every tensor's type and size, and the totals, without reading tensor data."""
    workspace, made = plan_conversion(checkpoint, Path(f"{checkpoint.resolve().name}.gguf"), given)
    if as_json:
        print_json(_as_json(made))
        return
    shown = console()
    shown.print(tables.checkpoint_line(workspace))
    shown.print(tables.plan_table(made))
    shown.print(tables.plan_totals(made))


def _as_json(made: Plan) -> dict[str, Any]:
    files = [
        {
            "name": file.path.name,
            "n_bytes": file.n_bytes,
            "size": format_size(file.n_bytes),
            "tensors": len(file.tensors),
        }
        for file in made.files
    ]
    return {
        "recipe": made.recipe,
        "notes": list(made.notes),
        "totals": totals(made),
        "files": files,
        "tensors": plan_entries(made),
    }
