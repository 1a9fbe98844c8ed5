"""`step35 bench`: the command; what it measures is in benchmark."""

from pathlib import Path

import click

from step35.cli.model_options import MODEL_OPTIONS, SAMPLING_OPTIONS, with_options
from step35.cli.plan import engine_plan


@click.command()
@with_options(MODEL_OPTIONS)
@click.option("--frontiers", default="0,2048,8192,16384", show_default=True, help="Context lengths to measure at.")
@click.option("-n", "--n-predict", default=128, show_default=True, help="Tokens to decode at each.")
@with_options(SAMPLING_OPTIONS)
@click.option("--csv", "csv_file", type=click.File("w"), default="-", help="Where the table goes; default stdout.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the table as a plot, too.")
def bench(frontiers, n_predict, temp, top_k, top_p, min_p, seed, csv_file, png, draft, **engine_options) -> None:
    """Measures prefill and decode at growing contexts, without drafting and with."""
    from step35.cli.benchmark import measure, plot, write_csv
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
