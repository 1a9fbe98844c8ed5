"""The `step35` command: data on stdout, talk on stderr, exit 2 for usage and 1 for the rest."""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from step35 import __version__
from step35.choices import DRAFTS, KV_TYPES, LOAD_MODES
from step35.cli.backend import backend, rpc_server
from step35.cli.count_tokens import count_tokens
from step35.cli.doctor import doctor
from step35.cli.launch import launch
from step35.cli.mtp import mtp
from step35.cli.plan import engine_plan, plan
from step35.cli.renamed_option import mtp_file_option
from step35.cli.serve import make_serve
from step35.cli.trace import trace
from step35.cli.tune import tune
from step35.errors import Step35Error

if TYPE_CHECKING:
    from step35.engine.turn import Stats

EXAMPLES = """
\b
Examples:
  step35 generate model.gguf -p "def quicksort(items):" -n 200
  step35 generate model.gguf -f prompt.txt --temp 0 --json
  step35 chat model.gguf --mtp-file mtp-model.gguf
  step35 serve model.gguf --ctx 131072
"""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="step35")
@click.option("--debug", is_flag=True, help="Show llama.cpp's log, and a traceback on an error.")
def cli(debug: bool) -> None:
    """Runs Step-3.5-Flash on your own machine."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")


_MODEL_OPTIONS = (
    click.argument("model", type=click.Path(path_type=Path)),
    mtp_file_option,
    click.option("--draft", type=click.Choice(list(DRAFTS)), default="auto", show_default=True, help="How to draft."),
    click.option(
        "-c", "--ctx", "n_ctx", type=int, help="Context size in tokens; default 32768, or less if that is what fits."
    ),
    click.option(
        "-b", "--batch", "n_batch", type=int, help="Prompt tokens per decode (batch and ubatch); default planned."
    ),
    click.option("-t", "--threads", "n_threads", type=int, help="CPU threads; default the cores."),
    click.option("--ngl", "n_gpu_layers", type=int, help="Layers on the GPU, -1 is all; default planned."),
    click.option("--load-mode", type=click.Choice(list(LOAD_MODES)), help="How weights are read; default planned."),
    click.option("--kv-type", type=click.Choice(list(KV_TYPES)), help="Type of the KV cache; default planned."),
    click.option(
        "--plan", "plan_path", type=click.Path(path_type=Path), help="Run what this plan file says; see step35 plan."
    ),
)
_SAMPLING_OPTIONS = (
    click.option("--temp", default=0.6, show_default=True, help="Temperature; 0 is greedy."),
    click.option("--top-k", default=0, show_default=True, help="Keep the k most probable tokens; 0 is all."),
    click.option("--top-p", default=0.95, show_default=True, help="Keep the most probable tokens up to this sum."),
    click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the best."),
    click.option("--seed", default=0, show_default=True, help="The same seed gives the same text."),
)


def _with(options: tuple):
    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@cli.command()
@_with(_MODEL_OPTIONS)
@click.option("-p", "--prompt", help="The text to continue.")
@click.option(
    "-f", "--file", "prompt_file", type=click.File(encoding="utf-8"), help="Read the text from a file; - is stdin."
)
@click.option("-n", "--n-predict", default=256, show_default=True, help="Tokens to generate; -1 fills the context.")
@_with(_SAMPLING_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(prompt, prompt_file, n_predict, temp, top_k, top_p, min_p, seed, as_json, **engine_options) -> None:
    """Continues a text: the text on stdout, a summary on stderr."""
    from step35.engine.decode_loop import begin
    from step35.engine.decode_loop import generate as run
    from step35.engine.detokenize import stream_text
    from step35.engine.engine import Engine
    from step35.sampling.sampler import Sampling
    from step35.sampling.token_chooser import Chooser

    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the text with either -p TEXT or -f FILE")
    text = prompt if prompt is not None else prompt_file.read()
    sampling = Sampling(temp, top_k, top_p, min_p, seed)
    planned = engine_plan(**engine_options)
    with Engine(planned.options, planned.headers) as engine, engine.open_session() as session:
        for note in engine.notes:
            click.echo(f"step35: {note}", err=True)
        turn = begin(session, engine.tokenize(text), Chooser(sampling), n_predict)
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


@cli.command()
@_with(_MODEL_OPTIONS)
@_with(_SAMPLING_OPTIONS)
def chat(temp, top_k, top_p, min_p, seed, **engine_options) -> None:
    """Talks in the terminal; the reasoning is dimmed, Ctrl-C stops an answer."""
    from step35.cli.chat import run
    from step35.engine.engine import Engine
    from step35.sampling.sampler import Sampling

    planned = engine_plan(**engine_options)
    with Engine(planned.options, planned.headers) as engine:
        for note in engine.notes:
            click.echo(f"step35: {note}", err=True)
        run(engine, Sampling(temp, top_k, top_p, min_p, seed))


@cli.command()
@_with(_MODEL_OPTIONS)
@click.option("--frontiers", default="0,2048,8192,16384", show_default=True, help="Context lengths to measure at.")
@click.option("-n", "--n-predict", default=128, show_default=True, help="Tokens to decode at each.")
@_with(_SAMPLING_OPTIONS)
@click.option("--csv", "csv_file", type=click.File("w"), default="-", help="Where the table goes; default stdout.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the table as a plot, too.")
def bench(frontiers, n_predict, temp, top_k, top_p, min_p, seed, csv_file, png, draft, **engine_options) -> None:
    """Measures prefill and decode at growing contexts, without drafting and with."""
    from step35.cli.bench import measure, plot, write_csv
    from step35.sampling.sampler import Sampling

    sampling = Sampling(temp, top_k, top_p, min_p, seed)
    rows = []
    drafts, lengths = list(dict.fromkeys(["off", draft])), _frontiers(frontiers)
    for row in measure(engine_plan(**engine_options), drafts, lengths, n_predict, sampling):
        rows.append(row)
        click.echo(
            f"draft {row.draft} at {row.n_context}: prefill {row.prefill_tps} tok/s, decode {row.decode_tps} tok/s",
            err=True,
        )
    write_csv(csv_file, rows)
    if png:
        plot(png, rows, engine_options["model"].name)


def _frontiers(text: str) -> list[int]:
    try:
        frontiers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 0,2048, got {text!r}") from error
    if frontiers[0] < 0:
        raise click.BadParameter(f"expected numbers from 0 on, got {text!r}")
    return frontiers


def summary(stats: "Stats") -> dict[str, object]:
    """Returns a turn's counts and speeds under the names that --json prints."""
    return {
        "n_prompt": stats.n_prompt,
        "n_reused": stats.n_reused,
        "n_decoded": stats.n_decoded,
        "prefill_tps": round(stats.prefill_tps, 2),
        "decode_tps": round(stats.decode_tps, 2),
        "n_cycles": stats.n_rounds,
        "n_drafted": stats.n_drafted,
        "n_accepted": stats.n_accepted,
        "drafted_per_head": stats.drafted_per_head,
        "accepted_per_head": stats.accepted_per_head,
        "mean_depth": round(stats.mean_depth, 3),
    }


def summary_line(stats: "Stats") -> str:
    """Returns the counts and speeds in one line."""
    line = (
        f"prefill {stats.n_prompt - stats.n_reused} tokens, {stats.prefill_tps:.1f} tok/s · "
        f"decode {stats.n_decoded} tokens, {stats.decode_tps:.1f} tok/s"
    )
    if not stats.n_drafted:
        return line
    heads = " ".join(f"{a}/{d}" for a, d in zip(stats.accepted_per_head, stats.drafted_per_head, strict=True))
    per_head = f", per head {heads}" if heads else ""
    drafted = f"accepted {stats.n_accepted} of {stats.n_drafted} drafted{per_head}"
    return f"{line} · {drafted}, mean depth {stats.mean_depth:.2f}"


cli.add_command(plan)
cli.add_command(doctor)
cli.add_command(tune)
cli.add_command(trace)
cli.add_command(make_serve(_MODEL_OPTIONS))
cli.add_command(launch)
cli.add_command(backend)
cli.add_command(rpc_server)
cli.add_command(mtp)
cli.add_command(count_tokens)


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
