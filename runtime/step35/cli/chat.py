"""`step35 chat`: the command; the conversation itself is in terminal."""

import click

from step35.cli.model_options import MODEL_OPTIONS, SAMPLING_OPTIONS, with_options
from step35.cli.plan import engine_plan


@click.command()
@with_options(MODEL_OPTIONS)
@with_options(SAMPLING_OPTIONS)
def chat(temp, top_k, top_p, min_p, seed, **engine_options) -> None:
    """Talks in the terminal; the reasoning is dimmed, Ctrl-C stops an answer."""
    from step35.cli.terminal import run
    from step35.engine.engine import Engine
    from step35.sampling.sampler import Sampling

    planned = engine_plan(**engine_options)
    with Engine(planned.options, planned.headers) as engine:
        for note in engine.notes:
            click.echo(f"step35: {note}", err=True)
        run(engine, Sampling(temp, top_k, top_p, min_p, seed))
