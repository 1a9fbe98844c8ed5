"""`convert-step35 run`: the conversion, with a progress bar, a report, and notes on stderr."""

from pathlib import Path
from typing import Any

import click

from convert_step35.cli import tables
from convert_step35.cli.console import (
    PATH,
    console,
    cores,
    end,
    json_option,
    output_path,
    overwrite_option,
    print_json,
    print_notes,
    threads_option,
)
from convert_step35.cli.conversion_options import GivenOptions, conversion_options, plan_conversion
from convert_step35.cli.progress import progress_bar
from convert_step35.cli.workspace import Workspace, fingerprint
from convert_step35.errors import OutputError
from convert_step35.gguf.shard_names import whole_name
from convert_step35.planning.plan import Plan, side_file
from convert_step35.quantization.quantizers import load_quantizers
from convert_step35.writing.conversion import TensorResult, Tools, convert
from convert_step35.writing.journal import drop_journal, journal_path
from convert_step35.writing.output import PARTIAL, write_atomically
from convert_step35.writing.report import build_report, report_path, to_json


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
@conversion_options
@overwrite_option
@click.option("--restart", is_flag=True, help="Drop an unfinished conversion instead of going on with it.")
@threads_option
@json_option
def run(
    checkpoint: Path,
    out: Path,
    given: GivenOptions,
    overwrite: bool,
    restart: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Convert CHECKPOINT to OUT (.gguf). Killed at any moment, the same command goes on from there."""
    workspace, made = plan_conversion(checkpoint, output_path(out), given)
    if restart:
        _drop_unfinished(out)
    _refuse_existing(made, out, overwrite)
    report = _convert(workspace, made, out, threads or cores())
    if as_json:
        print_json(report)
        return
    console().print(tables.report_summary(made, report))


def _drop_unfinished(out: Path) -> None:
    """Remove what an earlier run to OUT left, whatever its options were."""
    drop_journal(journal_path(out))
    for path in out.parent.glob(f"*{PARTIAL}"):
        if whole_name(path.name.removesuffix(PARTIAL)) in (out.name, side_file(out).name):
            path.unlink()


def _refuse_existing(made: Plan, out: Path, overwrite: bool) -> None:
    files = [file.path for file in made.files]
    for path in (*files, report_path(out)):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; choose another name")
    existing = [path for path in files if path.exists()]
    if existing and not overwrite and not journal_path(out).exists():
        raise OutputError(f"{existing[0]} exists; choose another name or pass --overwrite")


def _convert(workspace: Workspace, made: Plan, out: Path, n_threads: int) -> dict[str, Any]:
    """Run the plan; the report, which is on the disk before the files are published."""
    quantizers = load_quantizers()
    prints = fingerprint(workspace, made, quantizers.ggml)

    def write_report(results: list[TensorResult]) -> None:
        write_atomically(report_path(out), to_json(build_report(made, results, prints)))

    unfinished = ["going on with an unfinished conversion"] if journal_path(out).exists() else []
    quantizers.prepare({tensor.ggml_type for tensor in made.tensors})
    print_notes(*made.notes, *quantizers.notes, *unfinished)
    try:
        with progress_bar(made) as on_progress:
            tools = Tools(
                workspace.checkpoint, quantizers, workspace.imatrix, n_threads, on_progress, on_resumed=on_progress
            )
            results = convert(made, journal_path(out), prints, tools, write_report)
    except KeyboardInterrupt:
        end("stopped; the same command goes on from here", exit_code=130)
    return build_report(made, results, prints)
