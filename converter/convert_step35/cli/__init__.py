"""The `convert-step35` command: plan, run, verify, inspect, recipes, mtp."""

import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper

import click

from convert_step35 import __version__
from convert_step35.cli.console import end
from convert_step35.cli.inspect import inspect
from convert_step35.cli.mtp import mtp
from convert_step35.cli.plan import plan
from convert_step35.cli.recipes import recipes
from convert_step35.cli.run import run
from convert_step35.cli.verify import verify
from convert_step35.errors import ConvertError, OptionError

_DEBUG = "--debug"
_EXAMPLES = """
\b
Examples:
  convert-step35 plan  Step-3.5-Flash --type MOE_IQ4_XS
  convert-step35 run   Step-3.5-Flash step35.gguf --target-size 105GiB
  convert-step35 verify step35.gguf --against Step-3.5-Flash
"""


def main() -> None:
    """Run the command; an error of the user or of a file becomes one line on stderr, and exit code 2 or 1."""
    arguments, debug = _split_debug(sys.argv[1:])
    # A file name that this terminal can't encode must not hide the message about it.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli.main(arguments, prog_name="convert-step35", standalone_mode=False)
    except click.UsageError as exc:
        end(f"error: {_usage(exc)}", exit_code=2)
    except (KeyboardInterrupt, click.Abort):
        end("stopped", exit_code=130)
    except (ConvertError, OSError) as exc:
        if debug:
            traceback.print_exc()
        end(f"error: {_problem(exc)}", exit_code=2 if isinstance(exc, OptionError) else 1)


def _split_debug(line: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, which may stand after the command too, and whether it was there.

    After `--` all are names.
    """
    n_options = line.index("--") if "--" in line else len(line)
    options, names = line[:n_options], line[n_options:]
    return [*(argument for argument in options if argument != _DEBUG), *names], _DEBUG in options


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
@click.option(_DEBUG, is_flag=True, help="Show the traceback of an error; anywhere in the line.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Step-3.5 checkpoints to GGUF, in one pass, at any ggml type."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (plan, run, verify, inspect, recipes, mtp):
    cli.add_command(_command)


if __name__ == "__main__":
    main()
