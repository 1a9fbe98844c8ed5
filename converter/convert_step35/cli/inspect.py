"""`convert-step35 inspect`: what a GGUF file holds and what is wrong with it."""

import sys
from pathlib import Path

import click

from convert_step35.cli import tables
from convert_step35.cli.console import PATH, console, json_option, print_json
from convert_step35.inspection.inspection import inspect_file
from convert_step35.models import load_models


@click.command()
@click.argument("file", type=PATH)
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Say what a GGUF file holds and what is wrong with it; exit code 1 if something is."""
    found = inspect_file(file, load_models())
    if as_json:
        print_json(found.as_json())
    else:
        console().print(tables.inspection(found))
    if found.problems:
        sys.exit(1)
