"""The `step35` command: data on stdout, talk on stderr, exit 2 for usage and 1 for the rest."""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from step35 import __version__
from step35.errors import Step35Error

if TYPE_CHECKING:
    from step35.generation import Stats

EXAMPLES = """
\b
Examples:
  step35 generate model.gguf -p "def quicksort(items):" -n 200
  step35 generate model.gguf -f prompt.txt --temp 0 --json
"""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="step35")
@click.option("--debug", is_flag=True, help="Show llama.cpp's log, and a traceback on an error.")
def cli(debug: bool) -> None:
    """Runs Step-3.5-Flash on your own machine."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="The text to continue.")
@click.option("-f", "--file", "prompt_file", type=click.File(encoding="utf-8"), help="Read the text from a file; - is stdin.")
@click.option("-n", "--n-predict", default=256, show_default=True, help="Tokens to generate; -1 fills the context.")
@click.option("--temp", default=0.6, show_default=True, help="Temperature; 0 is greedy.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same text.")
@click.option("-c", "--ctx", "n_ctx", default=32768, show_default=True, help="Context size in tokens.")
@click.option("-t", "--threads", "n_threads", default=0, help="CPU threads; default llama.cpp's choice.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(model, prompt, prompt_file, n_predict, temp, seed, n_ctx, n_threads, as_json) -> None:
    """Continues a text: the text on stdout, a summary on stderr."""
    from step35.engine import Engine, EngineOptions
    from step35.generation import begin
    from step35.generation import generate as run
    from step35.sampling import Sampling
    from step35.text import stream_text

    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the text with either -p TEXT or -f FILE")
    text = prompt if prompt is not None else prompt_file.read()
    sampling = Sampling(temperature=temp, seed=seed)
    with Engine(EngineOptions(model, n_ctx=n_ctx, n_threads=n_threads)) as engine, engine.open_session() as session:
        turn = begin(session, engine.tokenize(text), sampling, n_predict)
        pieces = []
        for piece in stream_text(run(turn), engine.model.piece):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    if as_json:
        click.echo(json.dumps({"text": "".join(pieces), **summary(turn.stats), "finish": turn.finish}))
    else:
        click.echo()
        click.echo(summary_line(turn.stats), err=True)


def summary(stats: "Stats") -> dict[str, float | int]:
    """Returns a turn's counts and speeds under the names that --json prints."""
    return {
        "n_prompt": stats.n_prompt,
        "n_reused": stats.n_reused,
        "n_decoded": stats.n_decoded,
        "prefill_tps": round(stats.prefill_tps, 2),
        "decode_tps": round(stats.decode_tps, 2),
    }


def summary_line(stats: "Stats") -> str:
    """Returns the counts and speeds in one line."""
    return (
        f"prefill {stats.n_prompt - stats.n_reused} tokens, {stats.prefill_tps:.1f} tok/s · "
        f"decode {stats.n_decoded} tokens, {stats.decode_tps:.1f} tok/s"
    )


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
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"step35: error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
