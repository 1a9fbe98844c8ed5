"""An option under a new name: the old spelling is still taken, hidden from the help, and noted on stderr."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Any], Any]


def renamed_option(new: str, old: str, name: str, **settings: Any) -> Decorator:
    """Returns an option `new` for the parameter `name`; `old` is its former spelling, `settings` are click.option's."""
    given_before = f"step35 {name}"

    def take_old(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is not None:
            click.echo(f"step35: {old} is now called {new}", err=True)
            ctx.meta[given_before] = value

    def take_new(ctx: click.Context, param: click.Parameter, value: object) -> object:
        return ctx.meta.get(given_before) if value is None else value

    kind = {"type": settings["type"]} if "type" in settings else {}
    hidden = click.option(  # eager: taken before the new one, in whatever order they are given
        old, f"old_{name}", hidden=True, is_eager=True, expose_value=False, callback=take_old, **kind
    )
    shown = click.option(new, name, callback=take_new, **settings)
    return lambda function: shown(hidden(function))


mtp_file_option = renamed_option(
    "--mtp-file", "--mtp", "mtp", type=click.Path(path_type=Path), help="A file with the MTP heads, if MODEL has none."
)
