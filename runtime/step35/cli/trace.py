"""`step35 trace`: a profiling run that counts which experts fire, for `step35 plan --routing`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from step35.engine.engine import Engine
    from step35.planning.routing_trace import Choices

BATCH = 256


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-f", "--file", "files", type=click.Path(path_type=Path), multiple=True, required=True, help="A prompt; repeatable."
)
@click.option(
    "-n", "--most", type=click.IntRange(16, 1 << 18), default=2048, show_default=True, help="Tokens of each prompt."
)
@click.option("-t", "--threads", "n_threads", type=int, help="CPU threads; default the cores.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the trace goes; default MODEL.trace.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the trace instead of its summary.")
def trace(model, files, most, n_threads, out, as_json) -> None:
    """Runs prompts through MODEL and counts the experts of every layer; slower than a normal run."""
    from step35.cli.plan import plan_for_this_box
    from step35.engine.engine import Engine
    from step35.planning.hardware import before_loading
    from step35.planning.model_header import read_headers
    from step35.planning.routing_trace import report, summarize, to_data
    from step35.yaml_file import read_text

    headers = read_headers(model)
    shape = headers.model.shape
    n_ctx = min(most, shape.n_ctx_train)
    planned = plan_for_this_box(
        headers, before_loading(), "off", n_ctx=n_ctx, n_batch=min(BATCH, n_ctx), n_threads=n_threads
    )
    with Engine(planned.options, headers) as engine:
        prompts = [engine.tokenize(read_text(path))[:n_ctx] for path in files]
        routing = summarize(record(engine, prompts), shape.n_expert)
    out = out or model.with_name(model.name + ".trace.json")
    data = to_data(routing, model.name)
    out.write_text(json.dumps(data), encoding="utf-8")
    click.echo(json.dumps(data) if as_json else "\n".join([*report(routing), str(out)]))


def record(engine: "Engine", prompts: Sequence[Sequence[int]]) -> "list[Choices]":
    """Returns the experts that each prompt's tokens choose, by layer; empty prompts are left out."""
    import numpy as np

    from step35.native.rows import Rows

    found: dict[int, list[np.ndarray]] = {}
    context = engine.model.open_trunk(
        engine.options.context(), on_experts=lambda layer, chosen: found.setdefault(layer, []).append(chosen)
    )
    traced = []
    try:
        for tokens in filter(None, prompts):
            found.clear()
            context.truncate(0, 0)
            for start in range(0, len(tokens), context.n_batch):
                part = list(tokens[start : start + context.n_batch])
                context.decode([Rows(0, start, part, outputs=len(part))])  # the last layer sees outputs only
            traced.append({layer: np.concatenate(parts) for layer, parts in found.items()})
    finally:
        context.close()
    return traced
