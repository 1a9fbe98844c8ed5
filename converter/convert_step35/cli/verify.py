"""`convert-step35 verify`: whether a finished file is whole, and what its checkpoint gives."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from gguf import LlamaFileType

from convert_step35.cli import tables
from convert_step35.cli.console import PATH, console, cores, json_option, print_json, threads_option
from convert_step35.cli.progress import bytes_bar
from convert_step35.cli.workspace import Workspace, open_workspace
from convert_step35.errors import CheckpointError, printable
from convert_step35.gguf.model import GgufModel, architecture_of, has_mtp, has_trunk, open_model, require_step35
from convert_step35.inspection.inspection import inspect_file
from convert_step35.inspection.verification import Verdict, check_metadata, check_report, check_rows, compare
from convert_step35.models import Models, load_models
from convert_step35.planning.plan import MtpMode
from convert_step35.planning.recipes import head_matrices
from convert_step35.quantization.libggml import load_ggml
from convert_step35.source.mapping import map_tensors
from convert_step35.writing.requantizing import FROM_KEY

_CHUNKS_PER_TENSOR = 4


@click.command()
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
        print_json(_as_json(verdict))
    else:
        console().print(tables.verdict(file, verdict))
    if verdict.problems:
        sys.exit(1)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "ok": not verdict.problems,
        "tensors": verdict.n_tensors,
        "digests": verdict.n_digests,
        "compared_chunks": verdict.n_compared_chunks,
        "problems": list(verdict.problems),
        "notes": list(verdict.notes),
    }


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
    mode = MtpMode.KEEP if has_trunk(model, arch) else MtpMode.ONLY
    workspace = open_workspace(against, models, mtp=mode, imatrix_path=imatrix)
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
        chunks_per_tensor=None if full else _CHUNKS_PER_TENSOR,
        progress=bytes_bar,
    )
    return n, check_metadata(model, expected) + problems
