"""`convert-step35 recipes`: the names that --type takes."""

from dataclasses import asdict

import click

from convert_step35.cli import tables
from convert_step35.cli.console import console, json_option, print_json
from convert_step35.models import load_models
from convert_step35.planning.presets import PRESETS


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List what --type takes: this project's recipes, and llama-quantize's presets."""
    known = load_models().recipes
    if as_json:
        print_json({"recipes": [asdict(recipe) for recipe in known.values()], "presets": list(PRESETS)})
        return
    console().print(tables.recipe_table(known, PRESETS))
