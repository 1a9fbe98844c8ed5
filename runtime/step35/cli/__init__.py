"""The `step35` command: data on stdout, talk on stderr, exit 2 for usage and 1 for the rest."""

import logging
import signal
import sys
from collections.abc import Iterator

import click

from step35 import __version__
from step35.cli.backend import backend, rpc_server
from step35.cli.bench import bench
from step35.cli.chat import chat
from step35.cli.count_tokens import count_tokens
from step35.cli.doctor import doctor
from step35.cli.error_line import error_line
from step35.cli.generate import generate
from step35.cli.launch import launch
from step35.cli.mtp import mtp
from step35.cli.plan import plan
from step35.cli.serve import serve
from step35.cli.trace import trace
from step35.cli.tune import tune
from step35.errors import Step35Error

EXAMPLES = """
\b
Examples:
  step35 generate model.gguf -p "def quicksort(items):" -n 200
  step35 generate model.gguf -f prompt.txt --temp 0 --json
  step35 chat model.gguf --mtp-file mtp-model.gguf
  step35 serve model.gguf --ctx 131072
"""


def _debug_option(*, is_shown: bool) -> click.Option:
    """Returns --debug, which stands before a command or after it; the help of `step35` alone shows it."""
    text = "Show llama.cpp's log, and a traceback on an error; anywhere in the line."
    return click.Option(
        ["--debug"], is_flag=True, help=text, hidden=not is_shown, expose_value=False, callback=_start_debugging
    )


def _start_debugging(_: click.Context, __: click.Parameter, is_given: bool) -> None:
    if is_given:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="step35")
def cli() -> None:
    """Runs Step-3.5-Flash on your own machine."""


COMMANDS = (
    generate, chat, serve, bench, plan, doctor, tune, trace, launch, backend, rpc_server, mtp, count_tokens,
)  # fmt: skip


def _with_subcommands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from _with_subcommands(below)


cli.params.append(_debug_option(is_shown=True))
for _command in COMMANDS:
    cli.add_command(_command)
    if _command is not mtp:  # it hands its line to the converter, which has a --debug of its own
        for _each in _with_subcommands(_command):
            _each.params.append(_debug_option(is_shown=False))


def main() -> None:
    """Runs the command; every error of ours is one line on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.UsageError as error:
        _fail(error.format_message(), 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (Step35Error, OSError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        _fail(error_line(error), 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"step35: error: {message}", err=True)
    sys.exit(code)
