"""`step35 mtp`: hands over to the converter's commands for MTP heads, which is another program."""

import subprocess
import sys

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mtp(arguments: tuple[str, ...]) -> None:
    """Works on a model's MTP heads, such as: mtp requantize IN OUT --type Q4_K (convert-step35 mtp)."""
    done = subprocess.run([sys.executable, "-m", "convert_step35", "mtp", *arguments], check=False)
    sys.exit(done.returncode)
