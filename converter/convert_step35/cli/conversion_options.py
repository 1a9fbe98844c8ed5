"""What `plan` and `run` take alike: which types, which heads and which files to make of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from convert_step35.cli.console import PATH
from convert_step35.cli.workspace import Workspace, open_workspace
from convert_step35.models import load_models
from convert_step35.planning.plan import ConversionOptions, MtpMode, Plan, TargetSize
from convert_step35.planning.recipes import parse_ggml_type, parse_override
from convert_step35.sizes import parse_size

_DEFAULT_TYPE = "Q8_0"


@dataclass(frozen=True, slots=True)
class GivenOptions:
    """The options as the command line has them, not yet parsed."""

    type_name: str | None
    target_size: str | None
    overrides: tuple[str, ...]
    imatrix: Path | None
    mtp: str
    mtp_type: str | None
    split_max_size: str | None

    def parsed(self, out: Path) -> ConversionOptions:
        """The options of a conversion to OUT; OptionError for the first value that means nothing."""
        return ConversionOptions(
            out=out,
            types=self._types(),
            overrides=tuple(parse_override(text) for text in self.overrides),
            mtp=MtpMode(self.mtp),
            mtp_type=parse_ggml_type(self.mtp_type) if self.mtp_type is not None else None,
            split_max_bytes=parse_size(self.split_max_size) if self.split_max_size is not None else None,
        )

    def _types(self) -> str | TargetSize:
        if self.target_size is None:
            return _DEFAULT_TYPE if self.type_name is None else self.type_name
        return TargetSize(parse_size(self.target_size))


def conversion_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it takes them as one argument, `given`."""

    @wraps(command)
    def with_given(**arguments: Any) -> None:
        given = GivenOptions(**{field.name: arguments.pop(field.name) for field in fields(GivenOptions)})
        command(given=given, **arguments)

    decorated: Callable[..., None] = with_given
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


_OPTIONS = (
    click.option(
        "--type",
        "type_name",
        metavar="T",
        help=f"A preset, a recipe or a ggml type; see `convert-step35 recipes`.  [default: {_DEFAULT_TYPE}]",
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
)


def plan_conversion(checkpoint: Path, out: Path, given: GivenOptions) -> tuple[Workspace, Plan]:
    """Open the checkpoint and plan its conversion to OUT."""
    if given.type_name is not None and given.target_size is not None:
        raise click.UsageError("give --type or --target-size, not both")
    models = load_models()
    options = given.parsed(out)
    workspace = open_workspace(checkpoint, models, mtp=options.mtp, imatrix_path=given.imatrix)
    return workspace, workspace.plan(options, models)
