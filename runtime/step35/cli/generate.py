"""`step35 generate`: continues a text."""

import json
from typing import TYPE_CHECKING

import click

from step35.cli.model_options import MODEL_OPTIONS, SAMPLING_OPTIONS, with_options
from step35.cli.plan import engine_plan

if TYPE_CHECKING:
    from step35.engine.turn import Stats


@click.command()
@with_options(MODEL_OPTIONS)
@click.option("-p", "--prompt", help="The text to continue.")
@click.option(
    "-f", "--file", "prompt_file", type=click.File(encoding="utf-8"), help="Read the text from a file; - is stdin."
)
@click.option("-n", "--n-predict", default=256, show_default=True, help="Tokens to generate; -1 fills the context.")
@with_options(SAMPLING_OPTIONS)
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
        for piece in stream_text(run(turn), engine.piece):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    if as_json:
        click.echo(json.dumps({"text": "".join(pieces), **summary(turn.stats), "finish": turn.finish}))
    else:
        click.echo()
        click.echo(summary_line(turn.stats), err=True)


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
