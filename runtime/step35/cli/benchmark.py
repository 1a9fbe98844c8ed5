"""`step35 bench`: prefill and decode speed at growing contexts, with and without drafting."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TextIO

from step35.engine.decode_loop import begin, generate
from step35.engine.engine import Engine
from step35.errors import SettingsError
from step35.planning.autoplan import EnginePlan
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser


@dataclass(frozen=True, slots=True)
class Measurement:
    """One frontier with one way to draft. `prefill_tps` covers the tokens since the last frontier."""

    draft: str
    n_context: int
    prefill_tps: float
    decode_tps: float
    n_decoded: int
    n_drafted: int
    n_accepted: int
    mean_depth: float


def measure(
    plan: EnginePlan, drafts: Sequence[str], frontiers: Sequence[int], n_predict: int, sampling: Sampling
) -> Iterator[Measurement]:
    """Yields a measurement for each way to draft at each frontier, which must grow."""
    for draft in drafts:
        with Engine(replace(plan.options, draft=draft), plan.headers) as engine:
            yield from _measure_engine(engine, frontiers, n_predict, sampling)


def _measure_engine(
    engine: Engine, frontiers: Sequence[int], n_predict: int, sampling: Sampling
) -> Iterator[Measurement]:
    if frontiers[-1] + n_predict > engine.n_ctx:
        raise SettingsError(f"frontier too far: {frontiers[-1]} + {n_predict} tokens expected at most {engine.n_ctx}")
    text = _text_tokens(engine, frontiers[-1] + 16)
    with engine.open_session() as session:
        for frontier in frontiers:
            turn = begin(session, text[: frontier + 16], Chooser(sampling), n_predict)
            for _ in generate(turn):
                pass
            s = turn.stats
            rates = (round(s.prefill_tps, 2), round(s.decode_tps, 2))
            counts = (s.n_decoded, s.n_drafted, s.n_accepted, round(s.mean_depth, 3))
            yield Measurement(engine.options.draft, frontier, *rates, *counts)


def _text_tokens(engine: Engine, n: int) -> list[int]:
    """This package's own source, over and over: ordinary code."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    tokens = engine.tokenize("\n".join(f.read_text(encoding="utf-8") for f in files), parse_special=False)
    return (tokens * (n // len(tokens) + 1))[:n]


def write_csv(out: TextIO, measurements: Sequence[Measurement]) -> None:
    """Writes a header and one line for each measurement."""
    writer = csv.DictWriter(out, [field.name for field in fields(Measurement)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(measurement) for measurement in measurements)


def plot(path: Path, measurements: Sequence[Measurement], title: str = "") -> None:
    """Draws prefill and decode speed over the context, a line for each way to draft."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("can't plot: matplotlib isn't installed; pip install 'step35[plot]'") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("prefill_tps", "decode_tps"), strict=True):
        for draft in dict.fromkeys(m.draft for m in measurements):
            points = [(m.n_context, getattr(m, name)) for m in measurements if m.draft == draft]
            axes.plot(*zip(*points, strict=True), marker="o", label=f"draft {draft}")
        axes.set(xlabel="context, tokens", ylabel=f"{name.removesuffix('_tps')}, tokens/s", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
