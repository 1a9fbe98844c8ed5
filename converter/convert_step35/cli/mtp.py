"""The `convert-step35 mtp` commands: what can be done to the MTP heads of a finished GGUF."""

from pathlib import Path
from typing import Any

import click
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.cli.console import (
    PATH,
    console,
    cores,
    json_option,
    output_path,
    overwrite_option,
    print_json,
    print_notes,
    threads_option,
)
from convert_step35.cli.progress import bytes_bar
from convert_step35.cli.tables import heads_summary
from convert_step35.errors import OptionError, OutputError
from convert_step35.gguf.model import GgufModel
from convert_step35.planning.recipes import parse_ggml_type
from convert_step35.quantization.quantizers import load_quantizers
from convert_step35.sizes import format_size
from convert_step35.writing.output import write_atomically
from convert_step35.writing.report import heads_report, report_path, to_json, trim_report
from convert_step35.writing.requantizing import HeadsPlan, plan_heads
from convert_step35.writing.requantizing import requantize as requantize_heads
from convert_step35.writing.trimming import plan_trim
from convert_step35.writing.trimming import trim as trim_heads


@click.group(invoke_without_command=True)
@click.pass_context
def mtp(context: click.Context) -> None:
    """Work on the MTP heads of a finished GGUF."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@mtp.command()
@click.argument("file", type=PATH)
@click.argument("out", type=PATH)
@click.option("--type", "type_name", metavar="T", required=True, help="ggml type of the heads' matrices, such as Q4_K.")
@overwrite_option
@threads_option
@json_option
def requantize(file: Path, out: Path, type_name: str, overwrite: bool, threads: int | None, as_json: bool) -> None:
    """Copy FILE to OUT (.gguf) with the MTP heads at another type: cheaper drafts, the same text.

    FILE is a model with heads in it or a side file of heads. All other tensors are copied byte for byte.
    """
    kind = parse_ggml_type(type_name)
    plan = plan_heads(file, kind)
    _refuse_existing(plan.model, output_path(out), overwrite)
    report = _requantize(plan, out, kind, threads or cores())
    if as_json:
        print_json(report)
        return
    console().print(heads_summary(out, report))


@mtp.command()
@click.argument("file", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--vocab",
    "n_kept",
    type=click.IntRange(1),
    metavar="N",
    required=True,
    help="Tokens that can be drafted, such as 32768.",
)
@click.option(
    "--counts", type=PATH, required=True, help="What step35 count-tokens wrote of a text like the model's work."
)
@overwrite_option
@json_option
def trim(file: Path, out: Path, n_kept: int, counts: Path, overwrite: bool, as_json: bool) -> None:
    """Make OUT (.gguf), a side file of FILE's MTP heads that draft the N most frequent tokens only.

    Drafts get cheaper and some fewer are accepted; the text stays the same. step35 runs it with --mtp-file OUT.
    """
    plan = plan_trim(file, n_kept, counts)
    _refuse_existing(plan.model, output_path(out), overwrite)
    with bytes_bar("writing", plan.n_bytes) as on_bytes:
        written = trim_heads(plan, out, load_quantizers(), on_bytes)
    report = trim_report(out, plan, written)
    write_atomically(report_path(out), to_json(report))
    if as_json:
        print_json(report)
        return
    size = format_size(report["files"][0]["bytes"])
    print(f"wrote {out}  {size}; {n_kept} of {plan.n_vocab} tokens, {plan.share:.2%} of the text that was counted")


def _requantize(plan: HeadsPlan, out: Path, kind: GgmlType, n_threads: int) -> dict[str, Any]:
    quantizers = load_quantizers()
    print_notes(*plan.notes, *quantizers.notes)
    with bytes_bar("writing", plan.n_bytes) as on_bytes:
        done = requantize_heads(plan, out, kind, quantizers, n_threads, on_bytes)
    report = heads_report(out, plan, done)
    write_atomically(report_path(out), to_json(report))
    return report


def _refuse_existing(model: GgufModel, out: Path, overwrite: bool) -> None:
    for file in model.files:
        if out.exists() and file.path.samefile(out):
            raise OptionError(f"OUT expected another file than {file.path}, got the same; choose another name")
    for path in (out, report_path(out)):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; choose another name")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another name or pass --overwrite")
