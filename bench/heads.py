"""What MTP heads cost and what trimming them loses.

`costs`: CPU milliseconds of one thread for a run of head 1 over its usual four rows, by how many of them go through the
output matrix; the files take turns. `cycles`: wall milliseconds of a draft cycle, with a model's own heads and with
those of side files. `make` writes heads of the real width with random weights for it. `acceptance`: the
bundled checkpoint with whole heads, and with its N most frequent tokens.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
import numpy as np

import real_width
from contenders import Setup, Step35, Task
from convert_step35.planning.plan import MtpMode
from convert_step35.quantization.quantizers import load_quantizers
from convert_step35.writing.trimming import plan_trim, trim
from peers import Result, at_temperatures, cells, make_tasks, random_tokens, time_cycle
from step35.drafting.mtp_heads import REPLAYED_ROWS
from step35.native.context import Context
from step35.native.model import Model
from step35.native.rows import Rows
from step35.options import ContextOptions, ModelOptions
from step35.planning.model_header import read_header

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the bundled checkpoint's text

from reference.chats import generate_chats
from reference.corpus import split_sources, standard_library

N_CTX, N_BATCH = 1024, 32
RUNS = (
    (REPLAYED_ROWS, REPLAYED_ROWS),
    (REPLAYED_ROWS, 2),
    (REPLAYED_ROWS, 1),
    (REPLAYED_ROWS, 0),
    (2, 2),
    (2, 1),
    (N_BATCH, N_BATCH),
    (N_BATCH, 0),
)
"""Rows and output rows of a run: stock llama.cpp returns no hidden state without logits."""


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--type", "type_name", default="Q8_0", show_default=True)
def make(out: Path, type_name: str) -> None:
    click.echo(real_width.write_model(out, preset=type_name, mtp=MtpMode.ONLY))


@main.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--rounds", default=5, show_default=True)
def costs(files: tuple[Path, ...], rounds: int) -> None:
    models = {file.name: _load(file) for file in files}
    options = ContextOptions(N_CTX, N_BATCH, n_outputs=N_BATCH, n_threads=1)
    heads = {name: model.open_head(0, options) for name, model in models.items()}
    taken: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(rounds):
        for name, head in heads.items():
            for n_rows, n_outputs in RUNS:
                taken.setdefault((name, n_rows, n_outputs), []).extend(
                    _times(head, models[name].n_embd, n_rows, n_outputs)
                )
    for (name, n_rows, n_outputs), seconds in taken.items():
        base = min(taken[next(iter(models)), n_rows, n_rows])
        low, middle = min(seconds), median(seconds)
        click.echo(
            f"{name}, {n_rows} rows, {n_outputs} outputs: {1e3 * low:.2f} ms at best, median {1e3 * middle:.2f}, "
            f"{low / base:.3f} of all outputs of the first file"
        )


def _load(file: Path) -> Model:
    return Model(ModelOptions(file, load_heads=True, load_mode="mmap"), read_header(file).draft_vocabulary)


def _times(head: Context, n_embd: int, n_rows: int, n_outputs: int) -> Iterator[float]:
    hidden = np.random.default_rng(0).standard_normal((n_rows, n_embd), np.float32)
    for i in range(4):
        started = time.thread_time()
        head.decode([Rows(0, 0, range(5, 5 + n_rows), n_outputs, hidden)])
        if i:  # the first one builds the graph
            yield time.thread_time() - started
        head.truncate(0, 0)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("sides", type=click.Path(path_type=Path), nargs=-1)
@click.option("--depth", "depths", multiple=True, default=("1", "2", "3"), show_default=True)
@click.option("--rounds", default=2, show_default=True)
def cycles(model: Path, sides: tuple[Path, ...], depths: tuple[str, ...], rounds: int) -> None:
    task = Task("random", random_tokens(np.random.default_rng(0), 64), 48)
    for number in range(rounds):
        for depth in depths:
            for side in (None, *sides)[:: -1 if number % 2 else 1]:
                contender = Step35(Setup(model, mtp=side, n_threads=2), depth)
                (_, _, seconds), _ = time_cycle(contender, task)
                click.echo(f"{side.name if side else 'its own heads'}, depth {depth}: {1e3 * seconds:.1f} ms")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("vocabs", type=int, nargs=-1)
def acceptance(model: Path, vocabs: tuple[int, ...]) -> None:
    tasks = at_temperatures(make_tasks(8, 12, 160), (0.0, 1.0))
    _show("all tokens", model, None, tasks)
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        counts.write_text(json.dumps({"counts": _count(model)}))
        for n in vocabs:
            plan, out = plan_trim(model, n, counts), Path(folder) / f"{n}.gguf"
            trim(plan, out, load_quantizers(), lambda n_bytes: None)
            _show(f"{n}, {plan.share:.2%} of what was counted", model, out, tasks)


def _count(model: Path) -> list[int]:
    """Counts what the bundled checkpoint was trained on: source code and chats, about as much of each."""
    vocabulary = Model(ModelOptions(model, vocab_only=True))
    texts, _ = split_sources(standard_library())
    found = np.zeros(vocabulary.n_vocab, np.int64)
    for text in [*texts[:150], *generate_chats(3000, 11)]:
        tokens = vocabulary.tokenize(text.encode(), add_bos=False, parse_special=True)
        found += np.bincount(tokens, minlength=len(found))
    return found.tolist()


def _show(what: str, model: Path, mtp: Path | None, tasks: list) -> None:
    with Step35(Setup(model, mtp=mtp, n_threads=1), "3") as contender:
        results = [Result("heads", 1, "step35", task, contender.run(task)) for task in tasks]
    click.echo(what)
    for kind, temperature in dict.fromkeys((task.kind, task.temperature) for task in tasks):
        cell = cells(results, kind, temperature)["step35"]
        rates = " ".join(f"{share:.3f}" for share in cell.acceptance)
        click.echo(f"  {kind}, T = {temperature:.0f}: {rates}, {cell.tokens_per_decode:.3f} tokens a decode")


if __name__ == "__main__":
    main()
