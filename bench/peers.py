"""step35 beside llama-server and llama-bench: the same GGUF, tokens, threads, context and kernels.

Four parts: `tiny` (the bundled checkpoint: acceptance per head), `widened` (the same text from a 3.5 GB
model: tokens per second at temperature 0 and 1), `slice` (five layers of the real width, random weights:
milliseconds per decode, per verification, per draft cycle, prefill), `wrecked` (heads of noise: automatic
drafting must not lose). The contenders stay loaded and run each task in turns, so that a machine whose
speed drifts is alike to all; of the slice only one fits into memory at a time. Numbers are medians over the rounds.
The machine must be quiet. Needs 24 GB of memory and 20 GB of disk for the slice.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from contenders import Contender, LlamaServer, Run, Setup, Step35, Task, hold_in_memory, llama_bench
from step35.native.rows import Rows

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the bundled checkpoint and its training text

import real_width
import widen
import wreck
from checkpoints import BUNDLED
from convert import cpu_model
from reference.chats import generate_chats
from reference.corpus import split_sources, standard_library

OPENING = "<|im_start|>assistant\n<think>\n"
CODE_CHARS, HELD_OUT_SEED = 500, 53
DEPTHS = (1, 2, 3)
OURS = ("off", "auto", "1", "2", "3", "ngram")
LONG_PROMPT = 4096
FIRST_TOKEN, PREFILL = "first token of a long prompt", "long prompt and four tokens"


@dataclass(frozen=True, slots=True)
class Result:
    """One task of one contender in one round."""

    part: str
    round: int
    contender: str
    task: Task
    run: Run


# the tasks


def make_tasks(n_code: int, n_chats: int, n_predict: int, code_chars: int = CODE_CHARS) -> list[Task]:
    """Returns prompts the model wasn't trained on: beginnings of source files, and chats before an answer."""
    encode = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode
    _, files = split_sources(standard_library())
    code = [text[: text.rindex("\n", 0, code_chars) + 1] for text in files if len(text) > 4 * CODE_CHARS][:n_code]
    chats = [chat.rpartition(OPENING)[0] + OPENING for chat in generate_chats(n_chats, HELD_OUT_SEED)]
    texts = [*(("code", text) for text in code), *(("chat", text) for text in chats)]
    return [Task(kind, tuple(encode(text).ids), n_predict) for kind, text in texts]


def at_temperatures(tasks: Iterable[Task], temperatures: Iterable[float]) -> list[Task]:
    return [replace(task, temperature=t, seed=i) for t in temperatures for i, task in enumerate(tasks)]


def play(part: str, contenders: Sequence[Contender], tasks: Sequence[Task], rounds: int) -> Iterator[Result]:
    """Runs all tasks by all contenders, who take turns at each task; a round has seeds of its own."""
    with ExitStack() as stack:
        for model in {contender.setup.model for contender in contenders}:
            stack.enter_context(hold_in_memory(model))
        for contender in contenders:
            stack.enter_context(contender).run(tasks[0])
        for number in range(1, rounds + 1):
            for i, task in enumerate(tasks):
                seeded = replace(task, seed=task.seed + 1000 * number)
                for contender in contenders[:: 1 if (number + i) % 2 else -1]:
                    yield Result(part, number, contender.name, seeded, contender.run(seeded))
            click.echo(f"{part}: round {number} of {rounds}", err=True)


# numbers


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender's results of one kind and temperature."""

    results: list[Result]

    @property
    def decode_tps(self) -> dict[int, float]:
        """Tokens a second of each round, decoding alone."""
        return {n: sum(r.n_decoded for r in runs) / sum(r.decode_s for r in runs) for n, runs in self._rounds.items()}

    @property
    def tps(self) -> dict[int, float]:
        """The same from end to end: one reads a prompt with its heads at once, another when it first drafts."""
        return {
            n: sum(r.n_decoded + 1 for r in runs) / sum(r.prefill_s + r.decode_s for r in runs)
            for n, runs in self._rounds.items()
        }

    @property
    def _rounds(self) -> dict[int, list[Run]]:
        return {r.round: [s.run for s in self.results if s.round == r.round] for r in self.results}

    @property
    def acceptance(self) -> list[float]:
        """Shares of verifications in which the draft of each head was accepted."""
        runs = [r.run for r in self.results if r.run.n_cycles]
        n_heads = max((len(run.accepted) for run in runs), default=0)
        accepted = ([run.accepted[head] if head < len(run.accepted) else 0 for run in runs] for head in range(n_heads))
        return [sum(counts) / sum(run.n_cycles for run in runs) for counts in accepted]

    @property
    def tokens_per_decode(self) -> float:
        n_decoded = sum(r.run.n_decoded for r in self.results)
        return n_decoded / (n_decoded - sum(r.run.n_accepted for r in self.results))

    @property
    def head_decodes(self) -> float:
        cycles = sum(r.run.n_cycles for r in self.results)
        return sum(r.run.head_decodes for r in self.results) / cycles if cycles else 0.0


def cells(results: Sequence[Result], kind: str, temperature: float) -> dict[str, Cell]:
    wanted = [r for r in results if (r.task.kind, r.task.temperature) == (kind, temperature)]
    return {
        name: Cell([r for r in wanted if r.contender == name]) for name in dict.fromkeys(r.contender for r in wanted)
    }


def ratio(over: dict[int, float], under: dict[int, float]) -> float:
    """Returns the median of the rounds' ratios of speed."""
    return median(over[n] / under[n] for n in over)


def show(part: str, results: Sequence[Result]) -> None:
    """Prints a table for each kind of prompt and temperature: tokens a second of decoding, and from end to end."""
    for kind, temperature in dict.fromkeys((r.task.kind, r.task.temperature) for r in results):
        table = Table(
            "contender", "decode", "tok/s", "of plain", "tokens a decode", "accepted per head", "MTP decodes a cycle"
        )
        by_name = cells(results, kind, temperature)
        for name, cell in by_name.items():
            plain = by_name[f"{name.split()[0]} off"]
            accepted = " ".join(f"{share:.3f}" for share in cell.acceptance)
            decodes = f"{cell.head_decodes:.2f}" if cell.head_decodes else ""
            table.add_row(name, *_speeds(cell, plain), f"{cell.tokens_per_decode:.2f}", accepted, decodes)
        Console(width=120).print(f"{part}, {kind}, temperature {temperature:g}", table)
        for line in _verdicts(by_name):
            click.echo(line)


def _speeds(cell: Cell, plain: Cell) -> tuple[str, ...]:
    medians = (f"{median(speeds.values()):.2f}" for speeds in (cell.decode_tps, cell.tps))
    return *medians, f"{ratio(cell.tps, plain.tps):.3f}x"


def _verdicts(by_name: dict[str, Cell]) -> Iterator[str]:
    auto = by_name["step35 auto"]
    yield f"  auto / plain: {_ratios(auto, by_name['step35 off'])} (wanted 0.98x or more)"
    peers = {name: cell for name, cell in by_name.items() if name.startswith("llama-server")}
    if peers:
        best = max(peers, key=lambda name: median(peers[name].tps.values()))
        yield f"  auto / {best}: {_ratios(auto, peers[best])} (wanted 1.15x on the widened model)"


def _ratios(over: Cell, under: Cell) -> str:
    rounds = " ".join(f"{over.tps[n] / under.tps[n]:.2f}" for n in over.tps)
    decoding = ratio(over.decode_tps, under.decode_tps)
    return f"{ratio(over.tps, under.tps):.3f}x from end to end ({rounds}), decoding {decoding:.3f}x"


# the parts


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the models lie, and how often things are measured."""

    work: Path
    rounds: int
    n_threads: int
    skipped: tuple[str, ...] = ()
    n_long: int = LONG_PROMPT

    def tiny(self) -> list[Result]:
        setup = Setup(self._tiny_model(), n_threads=self.n_threads)
        tasks = at_temperatures(make_tasks(4, 6, 192), (0.0, 1.0))
        return list(play("tiny", self._contenders(setup), tasks, self.rounds))

    def widened(self) -> list[Result]:
        setup = Setup(self._widened_model(), n_threads=self.n_threads)
        tasks = at_temperatures(make_tasks(2, 3, 64, code_chars=200), (0.0,))
        tasks += at_temperatures(make_tasks(4, 3, 64, code_chars=200), (1.0,))  # texts differ most in code at T = 1
        return list(play("widened", self._contenders(setup), tasks, self.rounds))

    def wrecked(self) -> list[Result]:
        results = []
        for part, source in (("wrecked tiny", self._tiny_model()), ("wrecked widened", self._widened_model())):
            model = self._made(
                source.with_name(f"wrecked-{source.name}"), lambda path, source=source: wreck.wreck(source, path)
            )
            setup = Setup(model, n_threads=self.n_threads)
            tasks = at_temperatures(make_tasks(2, 4, 64), (0.0, 1.0))
            results += play(part, [Step35(setup, draft) for draft in ("off", "auto")], tasks, self.rounds)
        return results

    def _contenders(self, setup: Setup) -> list[Contender]:
        contenders = [*(Step35(setup, draft) for draft in OURS), *(LlamaServer(setup, depth) for depth in (0, *DEPTHS))]
        return [contender for contender in contenders if contender.name not in self.skipped]

    def slice(self) -> "list[Timing]":
        model = self._made(self.work / "slice-Q4_K_S.gguf", real_width.write_model)
        setup = Setup(model, n_ctx=self.n_long + 512, n_threads=self.n_threads)
        return [timing for number in range(1, self.rounds + 1) for timing in time_slice(setup, number, self.n_long)]

    def _tiny_model(self) -> Path:
        return self._made(self.work / "tiny-Q8_0.gguf", lambda path: _convert(BUNDLED, path, "Q8_0"))

    def _widened_model(self) -> Path:
        return self._made(self.work / "widened-F32.gguf", self._make_widened)

    def _make_widened(self, path: Path) -> None:
        """F32: on a CPU too a decode is bound by memory then, and a wider one costs what it does on step35's boxes."""
        checkpoint = path.with_suffix(".checkpoint")
        shutil.rmtree(checkpoint, ignore_errors=True)
        _convert(widen.widen_checkpoint(BUNDLED, checkpoint, widen.Factors()), path, "F32")
        shutil.rmtree(checkpoint)

    @staticmethod
    def _made(path: Path, make: Callable[[Path], object]) -> Path:
        if not path.is_file():
            click.echo(f"making {path.name}", err=True)
            make(path)
        return path


def _convert(checkpoint: Path, out: Path, type_name: str) -> None:
    command = [sys.executable, "-m", "convert_step35", "run", str(checkpoint), str(out), "--type", type_name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# the slice of the real width


Job = Callable[[], Iterator[tuple[str, str, float]]]
"""Yields contenders, what was timed, and seconds."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one thing, by one contender, in one round; a round may have several."""

    round: int
    contender: str
    what: str
    ms: float


def time_slice(setup: Setup, number: int, n_long: int) -> Iterator[Timing]:
    """Times everything once, in the other order in every second round, and plain decodes before, between and after."""
    random = np.random.default_rng(number)
    short = Task("random", random_tokens(random, 64), 48)
    plain: list[Job] = [
        lambda: _time_llama_bench(setup),
        lambda: time_cycle(Step35(setup, "off"), short),
        lambda: time_cycle(LlamaServer(setup, 0), short),
    ]
    ours: list[Job] = [lambda draft=draft: time_cycle(Step35(setup, draft), short) for draft in ("1", "2", "3", "auto")]
    theirs: list[Job] = [lambda depth=depth: time_cycle(LlamaServer(setup, depth), short) for depth in DEPTHS]
    jobs = [*plain, *ours, lambda: _time_verification(setup, random), *plain, *theirs, *plain]
    if n_long:
        long = Task("random", random_tokens(random, n_long), 4)  # four tokens: the heads read the prompt for the second
        contenders = [Step35(setup, "off"), Step35(setup, "3"), LlamaServer(setup, 0), LlamaServer(setup, 3)]
        jobs += [lambda contender=contender: _time_prefill(contender, long) for contender in contenders]
    for job in jobs[:: 1 if number % 2 else -1]:
        for contender, what, seconds in job():
            yield Timing(number, contender, what, 1e3 * seconds)
            click.echo(f"slice round {number}: {contender} {what} {1e3 * seconds:.1f} ms", err=True)


def random_tokens(random: np.random.Generator, n: int) -> tuple[int, ...]:
    return tuple(random.integers(3, 2000, n).tolist())


def _time_llama_bench(setup: Setup) -> Iterator[tuple[str, str, float]]:
    for (n_prompt, n_gen), seconds in llama_bench(setup, ["-p", "0", "-n", "48", "-r", "3"]).items():
        yield "llama-bench", "decode" if n_gen else f"verify {n_prompt}", median(seconds) / max(n_gen, 1)


def time_cycle(contender: Contender, short: Task) -> Iterator[tuple[str, str, float]]:
    """Times decode cycles after a short prompt, three times."""
    with contender:
        contender.run(replace(short, n_predict=8))
        runs = [contender.run(short) for _ in range(3)]
        yield contender.name, "cycle", median(run.decode_s / (run.n_decoded - run.n_accepted) for run in runs)
        yield contender.name, "token", median(run.decode_s / run.n_decoded for run in runs)


def _time_prefill(contender: Contender, long: Task) -> Iterator[tuple[str, str, float]]:
    with contender:
        run = contender.run(long)
        yield contender.name, FIRST_TOKEN, run.prefill_s
        yield contender.name, PREFILL, run.prefill_s + run.decode_s


def _time_verification(setup: Setup, random: np.random.Generator) -> Iterator[tuple[str, str, float]]:
    """Times decodes of 1 to 4 random tokens with all their logits, behind a short prompt."""
    with Step35(setup, "1") as ours:
        trunk, clock, n_past = ours.engine.trunk, ours.engine.clock, 64
        trunk.extract_hidden(True)
        trunk.decode([Rows(0, 0, random_tokens(random, n_past), outputs=1)])
        for width in (1, *(depth + 1 for depth in DEPTHS)):
            times = []
            for _ in range(9):
                rows = Rows(0, n_past, random_tokens(random, width), outputs=width)
                started = clock()
                trunk.decode([rows])
                trunk.logits()
                times.append(clock() - started)
                trunk.truncate(0, n_past)
            yield "step35", f"verify {width}", median(times[1:])


def show_slice(timings: Sequence[Timing]) -> None:
    """Prints the medians and what follows from them."""
    ms = {}
    for key in dict.fromkeys((t.contender, t.what) for t in timings):
        ms[key] = median(t.ms for t in timings if (t.contender, t.what) == key)
    table = Table("contender", "what", "ms")
    for (contender, what), value in ms.items():
        table.add_row(contender, what, f"{value:.1f}")
    Console().print(table)
    for line in _slice_verdicts(ms):
        click.echo(line)


def _slice_verdicts(ms: dict[tuple[str, str], float]) -> Iterator[str]:
    plain = ms["step35 off", "cycle"]
    for peer, what in (("llama-bench", "decode"), ("llama-server off", "cycle")):
        yield f"  plain decode: {plain / ms[peer, what] - 1:+.1%} of {peer} (wanted +2 % of llama-bench at most)"
    for depth in DEPTHS:
        ours, theirs = (_mtp_ms(ms, name, depth) for name in ("step35", "llama-server"))
        yield f"  MTP of a cycle, depth {depth}: {ours:.1f} ms, llama-server {theirs:.1f} ms: {ours / theirs - 1:+.1%} (wanted -15 %)"
    for name in ("step35", "llama-server") if ("step35 3", PREFILL) in ms else ():
        for what in (FIRST_TOKEN, PREFILL):
            more = ms[f"{name} 3", what] / ms[f"{name} off", what] - 1
            yield f"  {what}, with MTP: {name} {more:+.1%} (wanted +2 % at most)"
    yield f"  auto / plain: {ms['step35 off', 'token'] / ms['step35 auto', 'token']:.3f}x (wanted 0.98x or more)"


def _mtp_ms(ms: dict[tuple[str, str], float], name: str, depth: int) -> float:
    """What a cycle takes over a plain one, less what the wider verification takes over a plain decode.

    The difference of two differences: a contender's own cost per cycle cancels out.
    """
    verification = ms["step35", f"verify {depth + 1}"] - ms["step35", "verify 1"]
    return ms[f"{name} {depth}", "cycle"] - ms[f"{name} off", "cycle"] - verification


# the command


def write_csv(path: Path, rows: Sequence[dict[str, object]], n_threads: int) -> None:
    """Writes one line for each measurement, with the facts of the run in front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"cpu": cpu_model(), "n_threads": n_threads}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(facts | row for row in rows)


def _row(result: Result) -> dict[str, object]:
    task, run = result.task, asdict(result.run)
    run["accepted"] = " ".join(map(str, run["accepted"]))
    run |= {key: round(run[key], 5) for key in ("prefill_s", "decode_s")}
    where = {"part": result.part, "round": result.round, "contender": result.contender}
    return where | {"kind": task.kind, "temperature": task.temperature, "seed": task.seed} | run


PARTS = ("tiny", "widened", "slice", "wrecked")


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Rounds, each in the other order.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Which parts; default all.")
@click.option("--skip", multiple=True, metavar="NAME", help="A contender to leave out, such as 'step35 1'.")
@click.option(
    "--long",
    "n_long",
    default=LONG_PROMPT,
    show_default=True,
    type=click.IntRange(0),
    help="Tokens of the slice's long prompt; 0 leaves it out.",
)
@click.option(
    "--work",
    default=ROOT / "build" / "peers",
    type=click.Path(path_type=Path),
    show_default="build/peers",
    help="Folder for the models; they stay there.",
)
@click.option(
    "--results",
    default=ROOT / "bench" / "results",
    type=click.Path(path_type=Path),
    show_default="bench/results",
    help="Folder for peers-PART.csv.",
)
@click.option(
    "--threads", default=len(os.sched_getaffinity(0)), show_default="all cores", help="CPU threads of every contender."
)
def main(
    rounds: int, only: tuple[str, ...], skip: tuple[str, ...], n_long: int, work: Path, results: Path, threads: int
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, rounds, threads, skip, n_long)
    for part in only or PARTS:
        csv_path = results / f"peers-{part}.csv"
        if part == "slice":
            timings = bench.slice()
            write_csv(csv_path, [asdict(timing) for timing in timings], threads)
            show_slice(timings)
            continue
        measured = getattr(bench, part)()
        write_csv(csv_path, [_row(result) for result in measured], threads)
        for name in dict.fromkeys(result.part for result in measured):
            show(name, [result for result in measured if result.part == name])


if __name__ == "__main__":
    main()
