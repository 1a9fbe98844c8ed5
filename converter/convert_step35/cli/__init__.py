"""The `convert-step35` command: plan, run, verify, inspect, recipes, mtp."""

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from gguf import LlamaFileType

from convert_step35 import __version__
from convert_step35.cli import tables
from convert_step35.cli.console import PATH, console, cores, json_option, output_path, overwrite_option, threads_option
from convert_step35.cli.mtp import mtp
from convert_step35.cli.progress import bytes_bar, progress_bar
from convert_step35.cli.workspace import Workspace, fingerprint, open_workspace
from convert_step35.errors import CheckpointError, ConvertError, OptionError, OutputError, printable
from convert_step35.gguf.model import GgufModel, architecture_of, has_mtp, has_trunk, open_model, require_step35
from convert_step35.gguf.shard_names import whole_name
from convert_step35.inspection.inspection import inspect_file
from convert_step35.inspection.verification import Verdict, check_metadata, check_report, check_rows, compare
from convert_step35.models import Models, load_models
from convert_step35.planning.plan import MtpMode, Plan, Wishes, side_file
from convert_step35.planning.presets import PRESETS
from convert_step35.planning.recipes import ggml_type, head_matrices, parse_override
from convert_step35.quantization.libggml import load_ggml
from convert_step35.quantization.quantizers import load_quantizers
from convert_step35.sizes import format_size, parse_size
from convert_step35.source.mapping import map_tensors
from convert_step35.writing.conversion import Tools, convert
from convert_step35.writing.journal import drop_journal, journal_path
from convert_step35.writing.output import PARTIAL, write_atomically
from convert_step35.writing.report import build_report, plan_entries, report_path, to_json, totals
from convert_step35.writing.requantizing import FROM_KEY

_EXAMPLES = """
\b
Examples:
  convert-step35 plan  Step-3.5-Flash --type MOE_IQ4_XS
  convert-step35 run   Step-3.5-Flash step35.gguf --target-size 105GiB
  convert-step35 verify step35.gguf --against Step-3.5-Flash
"""


def main() -> None:
    """Run the command; an error of the user or of a file becomes one line on stderr, and exit code 2 or 1."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # A name that is no text to this terminal must not hide what is said of it.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli.main(arguments, prog_name="convert-step35", standalone_mode=False)
    except click.UsageError as exc:
        _end(f"error: {_usage(exc)}", exit_code=2)
    except (KeyboardInterrupt, click.Abort):
        _end("stopped", exit_code=130)
    except (ConvertError, OSError) as exc:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        _end(f"error: {_problem(exc)}", exit_code=2 if isinstance(exc, OptionError) else 1)


def _end(line: str, *, exit_code: int) -> NoReturn:
    print(f"convert-step35: {line}", file=sys.stderr)
    sys.exit(exit_code)


def _usage(exc: click.UsageError) -> str:
    command = exc.ctx.command_path if exc.ctx is not None else "convert-step35"
    message = " ".join(exc.format_message().split()).rstrip(".")
    return f"{message}; see {command} --help"


def _problem(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.filename is not None:
        return f"{exc.filename}: {exc.strerror}"
    return str(exc)


@click.group(epilog=_EXAMPLES, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="convert-step35")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; anywhere in the line.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Step-3.5 checkpoints to GGUF, in one pass, at any ggml type."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _what_to_make(command: Callable[..., None]) -> Callable[..., None]:
    """The options that plan and run share."""
    options = [
        click.option(
            "--type",
            "type_name",
            metavar="T",
            help="A preset, a recipe or a ggml type; see `convert-step35 recipes`.  [default: Q8_0]",
        ),
        click.option(
            "--target-size", metavar="SIZE", help="Instead of --type: the best recipe whose file fits, such as 103GiB."
        ),
        click.option(
            "--tensor-type",
            "overrides",
            multiple=True,
            metavar="REGEX=TYPE",
            help="Type of the matrices whose GGUF name matches; repeatable, the first match wins.",
        ),
        click.option("--imatrix", type=PATH, help="Importance matrix of llama-imatrix, in GGUF form."),
        click.option(
            "--mtp",
            type=click.Choice([mode.value for mode in MtpMode]),
            default="keep",
            show_default=True,
            help="MTP heads: in the file, in a file beside it, not at all, or nothing but them.",
        ),
        click.option(
            "--mtp-type",
            metavar="T",
            help="ggml type of the MTP heads' matrices, such as Q4_K: cheaper drafts, the same text.",
        ),
        click.option(
            "--split-max-size", metavar="SIZE", help="Write shards with at most this much data each, such as 45GB."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("checkpoint", type=PATH)
@_what_to_make
@json_option
def plan(checkpoint: Path, as_json: bool, **choices: Any) -> None:
    """Print every tensor's type and size, and the totals, without reading tensor data."""
    workspace, made = _plan(checkpoint, Path(f"{checkpoint.resolve().name}.gguf"), **choices)
    if as_json:
        print(
            to_json(
                {
                    "recipe": made.recipe,
                    "notes": list(made.notes),
                    "totals": totals(made),
                    "files": _files(made),
                    "tensors": plan_entries(made),
                }
            ),
            end="",
        )
        return
    shown = console()
    shown.print(tables.checkpoint_line(workspace))
    shown.print(tables.plan_table(made))
    shown.print(tables.plan_totals(made))


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
@_what_to_make
@overwrite_option
@click.option("--restart", is_flag=True, help="Drop an unfinished conversion instead of going on with it.")
@threads_option
@json_option
def run(
    checkpoint: Path, out: Path, overwrite: bool, restart: bool, threads: int | None, as_json: bool, **choices: Any
) -> None:
    """Convert CHECKPOINT to OUT (.gguf). Killed at any moment, the same command goes on from there."""
    workspace, made = _plan(checkpoint, output_path(out), **choices)
    if restart:
        _drop_unfinished(out)
    _refuse_existing(made, out, overwrite)
    report = _convert(workspace, made, out, threads)
    if as_json:
        print(to_json(report), end="")
        return
    console().print(tables.report_summary(made, report))


@cli.command()
@click.argument("file", type=PATH)
@click.option(
    "--against", type=PATH, metavar="CKPT", help="Also convert parts of this checkpoint again and compare bytes."
)
@click.option("--full", is_flag=True, help="With --against: compare every byte with libggml's, which takes long.")
@click.option("--imatrix", type=PATH, help="With --against: the imatrix that the file was made with.")
@threads_option
@json_option
def verify(
    file: Path, against: Path | None, full: bool, imatrix: Path | None, threads: int | None, as_json: bool
) -> None:
    """Check a finished GGUF: structure, every row, the report's digests and, if given, its checkpoint."""
    if against is None and (full or imatrix is not None):
        raise click.UsageError(f"{'--full' if full else '--imatrix'} needs --against CKPT")
    verdict = _verify(file, against, full, imatrix, threads or cores())
    if as_json:
        print(
            to_json(
                {
                    "ok": not verdict.problems,
                    "tensors": verdict.n_tensors,
                    "digests": verdict.n_digests,
                    "compared_chunks": verdict.n_compared_chunks,
                    "problems": list(verdict.problems),
                    "notes": list(verdict.notes),
                }
            ),
            end="",
        )
    else:
        console().print(tables.verdict(file, verdict))
    if verdict.problems:
        sys.exit(1)


@cli.command()
@click.argument("file", type=PATH)
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Say what a GGUF file holds and what is wrong with it; exit code 1 if something is."""
    found = inspect_file(file, load_models())
    if as_json:
        print(to_json(found.as_json()), end="")
    else:
        console().print(tables.inspection(found))
    if found.problems:
        sys.exit(1)


@cli.command()
@json_option
def recipes(as_json: bool) -> None:
    """List what --type takes: this project's recipes, and llama-quantize's presets."""
    known = load_models().recipes
    if as_json:
        print(to_json({"recipes": [asdict(recipe) for recipe in known.values()], "presets": list(PRESETS)}), end="")
        return
    console().print(tables.recipe_table(known, PRESETS))


def _plan(
    checkpoint: Path,
    out: Path,
    type_name: str | None,
    target_size: str | None,
    overrides: tuple[str, ...],
    imatrix: Path | None,
    mtp: str,
    mtp_type: str | None,
    split_max_size: str | None,
) -> tuple[Workspace, Plan]:
    if type_name is not None and target_size is not None:
        raise click.UsageError("give --type or --target-size, not both")
    models = load_models()
    mode = MtpMode(mtp)
    wishes = Wishes(
        out=out,
        type_name="Q8_0" if type_name is None and target_size is None else type_name,
        target_bytes=parse_size(target_size) if target_size is not None else None,
        overrides=tuple(parse_override(text) for text in overrides),
        mtp=mode,
        mtp_type=ggml_type(mtp_type) if mtp_type is not None else None,
        split_max_bytes=parse_size(split_max_size) if split_max_size is not None else None,
    )
    workspace = open_workspace(checkpoint, models, mtp=mode, imatrix_path=imatrix)
    return workspace, workspace.plan(wishes, models)


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


def _convert(workspace: Workspace, made: Plan, out: Path, threads: int | None) -> dict[str, Any]:
    quantizers = load_quantizers()
    prints = fingerprint(workspace, made, quantizers.ggml)
    reports: list[dict[str, Any]] = []

    def report(results: list[Any]) -> None:
        reports.append(build_report(made, results, prints))
        write_atomically(report_path(out), to_json(reports[0]))

    unfinished = ["going on with an unfinished conversion"] if journal_path(out).exists() else []
    quantizers.prepare({tensor.kind for tensor in made.tensors})
    for note in (*made.notes, *quantizers.notes, *unfinished):
        print(f"convert-step35: note: {note}", file=sys.stderr)
    try:
        with progress_bar(made) as on_progress:
            tools = Tools(
                workspace.checkpoint,
                quantizers,
                workspace.imatrix,
                threads or cores(),
                on_progress,
                on_resumed=on_progress,
            )
            convert(made, journal_path(out), prints, tools, report)
    except KeyboardInterrupt:
        _end("stopped; the same command goes on from here", exit_code=130)
    return reports[0]


def _verify(file: Path, against: Path | None, full: bool, imatrix: Path | None, n_threads: int) -> Verdict:
    models, ggml = load_models(), load_ggml()
    problems = list(inspect_file(file, models).problems)
    model = open_model(file)
    workspace = _open_against(model, against, imatrix, models) if against is not None else None
    digests, bad_rows = check_rows(model, ggml, n_threads, bytes_bar)
    n_digests, changed = check_report(model, digests)
    n_compared, differing = _compare(model, workspace, full, n_threads) if workspace is not None else (0, [])
    found = tuple(problems + bad_rows + changed + differing)
    return Verdict(len(digests), n_digests, n_compared, found, tuple(_uncompared(model, against)))


def _uncompared(model: GgufModel, against: Path | None) -> Iterator[str]:
    if against is not None and FROM_KEY in model.metadata:
        was = printable(model.metadata[FROM_KEY])
        yield f"the MTP heads were quantized again from {was}: not compared with the checkpoint"


def _open_against(model: GgufModel, against: Path, imatrix: Path | None, models: Models) -> Workspace:
    """The checkpoint, of which only the shards that the model needs must be there."""
    require_step35(model)
    arch = architecture_of(model)
    workspace = open_workspace(
        against, models, mtp=MtpMode.KEEP if has_trunk(model, arch) else MtpMode.ONLY, imatrix_path=imatrix
    )
    if has_mtp(model, arch) and not workspace.checkpoint.has_mtp:
        raise CheckpointError(
            f"no MTP weights: {against} holds none, and {model.path} has MTP heads; "
            "give the checkpoint that it was made of"
        )
    return workspace


def _compare(model: GgufModel, workspace: Workspace, full: bool, n_threads: int) -> tuple[int, list[str]]:
    arch, checkpoint = architecture_of(model), workspace.checkpoint
    mapped = map_tensors(checkpoint.arch, trunk=has_trunk(model, arch), mtp=has_mtp(model, arch))
    heads = head_matrices(mapped) if FROM_KEY in model.metadata else frozenset()
    expected = workspace.subject.entries(mapped, with_mtp=arch.n_mtp > 0, ftype=LlamaFileType.GUESSED, recipe="")
    n, problems = compare(
        model,
        checkpoint,
        [tensor for tensor in mapped if tensor.name not in heads],
        load_ggml(),
        workspace.imatrix,
        n_threads=n_threads,
        chunks_per_tensor=None if full else 4,
        progress=bytes_bar,
    )
    return n, check_metadata(model, expected) + problems


def _files(made: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": file.path.name,
            "n_bytes": file.n_bytes,
            "size": format_size(file.n_bytes),
            "tensors": len(file.tensors),
        }
        for file in made.files
    ]


cli.add_command(mtp)


if __name__ == "__main__":
    main()
