"""What the commands share: common options, OUT's name, what goes to stdout and what to stderr."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import category

import click
from rich.console import Console

from convert_step35.errors import OutputError, quoted
from convert_step35.gguf.shard_names import is_shard_name
from convert_step35.writing.report import to_json

# Click does not check whether a path is readable: the code that opens it has the better message.
PATH = click.Path(path_type=Path, readable=False)
_NEVER_FOLD = 100_000

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace OUT if it exists; the old file stays until the new one is whole."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="Threads.  [default: one a core]"
)


def console() -> Console:
    """Stdout as wide as the terminal; lines in a file or a pipe are never folded."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_NEVER_FOLD)


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    print(to_json(data), end="")


def print_notes(*notes: str) -> None:
    """Lines on stderr that a user should read before the work starts."""
    for note in notes:
        print(f"convert-step35: note: {note}", file=sys.stderr)


def end(line: str, *, exit_code: int) -> NoReturn:
    """End the command with a last line on stderr."""
    print(f"convert-step35: {line}", file=sys.stderr)
    sys.exit(exit_code)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def output_path(out: Path) -> Path:
    """OUT, if a GGUF file can be written under that name; UsageError or OutputError if not."""
    if out.suffix != ".gguf":
        raise click.UsageError(f"OUT expected a name that ends in .gguf, got {out}")
    if any(category(char) in ("Cc", "Cs") for char in out.name):
        raise click.UsageError(f"OUT expected a name of UTF-8 without control characters, got {quoted(str(out), 400)}")
    if is_shard_name(out.name):
        raise click.UsageError(
            f"OUT expected a name that is not a shard's, got {out}: --split-max-size numbers shards itself"
        )
    if not out.parent.is_dir():
        raise OutputError(f"no such folder: {out.parent}; create it first")
    return out
