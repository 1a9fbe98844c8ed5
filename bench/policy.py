"""Automatic drafting where decodes cost what is written here: real texts, and a clock that moves by these costs alone.

The tokens, the drafts and their margins are those of the bundled checkpoint; the engine's clock is this bench's. So the
rule of depth is compared with every fixed depth on any box, without noise: decode seconds are sums of the table's.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from peers import at_temperatures, make_tasks
from step35 import Engine, EngineOptions, Sampling
from step35.engine.decode_loop import begin, generate
from step35.engine.loading import ON_THIS_BOX, Loading
from step35.native.context import Context
from step35.native.interface import OnExperts
from step35.native.model import Model
from step35.native.rows import Rows
from step35.options import ContextOptions, ModelOptions
from step35.planning.model_header import Header
from step35.sampling.token_chooser import Chooser

MODES = ("off", "auto", "1", "2", "3", "ngram")


@dataclass(frozen=True, slots=True)
class World:
    """Milliseconds: of a decode of 1, 2, 3, 4 tokens and of each more, of a head's run with one row, of each row more."""

    decode: tuple[float, float, float, float]
    token: float
    head: float
    row: float


WORLDS = {
    "widened model in F32, measured": World((41, 56, 65, 78), 9, 3.1, 0.42),
    "the same with faster memory": World((28, 42, 52, 66), 9, 2.8, 0.42),
    "one memory": World((50, 72.5, 94.5, 116), 22, 5.0, 1.5),
    "one memory, experts in common": World((50, 64, 77.5, 91), 13.5, 5.0, 1.5),
    "experts on the CPU": World((50, 94, 137, 178), 42, 4.0, 1.0),
}
"""The second as the first where a wider decode is dearer; the last three: 50 ms times what is counted for the real model."""


class WorldClock:
    """Moves when something is decoded; a look at it costs a microsecond."""

    def __init__(self, world: World) -> None:
        self.world, self.now = world, 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def spend(self, n_rows: int, is_head: bool) -> None:
        w = self.world
        if is_head:
            self.now += (w.head + w.row * (n_rows - 1)) / 1e3
        else:
            self.now += (w.decode[min(n_rows, 4) - 1] + w.token * max(0, n_rows - 4)) / 1e3


def load_on(clock: WorldClock) -> Loading:
    """Returns what Engine takes as `loading`: a real model whose contexts move the clock."""

    def charged(context: Context, is_head: bool) -> Context:
        decode = context.decode

        def spend_and_decode(rows: Sequence[Rows]) -> None:
            clock.spend(sum(len(r.tokens) for r in rows), is_head)
            decode(rows)

        context.decode = spend_and_decode
        return context

    class ChargedModel(Model):
        def open_trunk(self, options: ContextOptions, *, on_experts: OnExperts | None = None) -> Context:
            return charged(super().open_trunk(options, on_experts=on_experts), is_head=False)

        def open_head(self, head: int, options: ContextOptions) -> Context:
            return charged(super().open_head(head, options), is_head=True)

    def load(options: ModelOptions, header: Header) -> Model:
        return ChargedModel(options, header.draft_vocabulary)

    return replace(ON_THIS_BOX, load=load, admit=lambda *_: None)


def tokens_a_second(model: Path, world: World, draft: str) -> dict[tuple[str, float], float]:
    """Returns the speed of decoding by kind of prompt and temperature."""
    clock = WorldClock(world)
    tokens, seconds = defaultdict(int), defaultdict(float)
    options = EngineOptions(model, draft=draft, n_ctx=2048, n_batch=512, n_threads=1)
    with Engine(options, loading=load_on(clock), clock=clock) as engine:
        for task in at_temperatures(make_tasks(4, 8, 192), (0.0, 1.0)):
            sampling = Sampling(temperature=task.temperature, top_k=0, top_p=1.0, min_p=0.0, seed=task.seed)
            with engine.open_session() as session:
                turn = begin(session, task.tokens, Chooser(sampling), task.n_predict)
                for _ in generate(turn):
                    pass
            tokens[task.kind, task.temperature] += turn.stats.n_decoded
            seconds[task.kind, task.temperature] += turn.stats.decode_s
    return {key: tokens[key] / seconds[key] for key in tokens}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--world", "names", multiple=True, type=click.Choice(list(WORLDS)), help="Which worlds; default all.")
def main(model: Path, names: tuple[str, ...]) -> None:
    for name in names or WORLDS:
        speeds = {draft: tokens_a_second(model, WORLDS[name], draft) for draft in MODES}
        table = Table("prompts", *MODES[1:], title=f"{name}: speed in plain decodings")
        for kind, temperature in speeds["off"]:
            plain = speeds["off"][kind, temperature]
            row = (f"{speeds[draft][kind, temperature] / plain:.3f}" for draft in MODES[1:])
            table.add_row(f"{kind}, T = {temperature:g}", *row)
        Console(file=sys.stdout, width=100).print(table)


if __name__ == "__main__":
    main()
