"""`step35 serve` beside llama-server and llama-cpp-python's server: the same GGUF, kernels, threads and requests.

`run` starts every server in turn, every second round in the other order, and adds a line a server and
round to a CSV; rounds may be run in pieces. `show` prints the medians of a CSV, and each server's share of
step35's. In one round a server gets, at temperature 0 and streaming:

cold      a chat with a long system's text; `cold_s` is the time to the first token
next      the conversation's next turn, sent as clients send it, without the reasoning
other     a new conversation with the same system's text
loop      an agent's turn: back with a tool's result, reasoning kept; the median of LOOP_TURNS
after     the user's next message after that loop, for which the template drops the loop's reasoning
one       a piece of code to continue, alone: tokens a second after the first
four      four of those at a time: tokens a second of all

The machine must be quiet. A stream's tokens are those that were asked for; where it ended early, those of
its usage.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any, Self

import click

from server import CHAT, ROOT, TEXT, Heard, ask

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the server as a process, the text

import build_peers
from contenders import free_port
from live_server import LiveServer
from reference.corpus import split_sources, standard_library

START_S = 120
N_WARM_UP = 16
LOOP_TURNS = 6


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for all servers."""

    model: Path
    n_ctx: int
    n_threads: int
    n_batch: int = 512
    n_parallel: int = 4


# the servers


@dataclass(frozen=True, slots=True)
class Contender:
    """A server under a name; `start` puts a running one on the stack and returns its address."""

    name: str
    start: Callable[[ExitStack], str]


def contenders(setup: Setup) -> list[Contender]:
    found = [
        Contender(f"step35 {draft}", lambda stack, draft=draft: _ours(stack, setup, draft)) for draft in ("off", "auto")
    ]
    found += [
        Contender(f"llama-server {draft}", lambda stack, draft=draft: _llama_server(stack, setup, draft))
        for draft in ("off", "draft-mtp")
    ]
    found += [
        Contender(f"llama-cpp-python {draft}", lambda stack, draft=draft: _python_server(stack, setup, draft))
        for draft in ("off", "draft-mtp")
    ]
    return found


def _ours(stack: ExitStack, s: Setup, draft: str) -> str:
    flags = {"threads": s.n_threads, "ctx": s.n_ctx, "batch": s.n_batch, "parallel": s.n_parallel, "draft": draft}
    options = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return stack.enter_context(LiveServer(s.model, *options)).ready().url


def _llama_server(stack: ExitStack, s: Setup, draft: str) -> str:
    port = free_port()
    command = [str(build_peers.program("llama-server")), "-m", str(s.model), "--port", str(port), "--jinja"]
    command += ["-c", str(s.n_ctx), "-b", str(s.n_batch), "-ub", str(s.n_batch), "-np", str(s.n_parallel), "-kvu"]
    command += ["-t", str(s.n_threads), "-tb", str(s.n_threads)]
    command += ["--spec-type", draft] if draft != "off" else []
    return stack.enter_context(_Program(command, build_peers.environment(), port, "/health")).url


def _python_server(stack: ExitStack, s: Setup, draft: str) -> str:
    port = free_port()
    model = {
        "path": str(s.model), "n_ctx": s.n_ctx, "n_seq_max": s.n_parallel + 2, "n_batch": s.n_batch, "n_ubatch": s.n_batch,
        "threads": s.n_threads, "threads_batch": s.n_threads, "kv_unified": True, "max_output_tokens": s.n_ctx,
    }  # fmt: skip
    if draft != "off":
        model |= {"draft_model": draft, "draft_model_num_pred_tokens": 3}
    config = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="step35-peers-"))) / "config.json"
    config.write_text(json.dumps({"server": {"port": port}, "model": model}))
    command = [sys.executable, str(build_peers.python_server()), "-C", str(config)]
    environment = os.environ | {"PYTHONPATH": str(build_peers.PYTHON_PACKAGES)}
    return stack.enter_context(_Program(command, environment, port, "/healthz")).url


class _Program(AbstractContextManager):
    """A server's program, ready when its health says so."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], port: int, health: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._health = health
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the program)
        self._process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)

    def __enter__(self) -> Self:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + self._health, timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self._log.seek(0)
        self.__exit__()
        raise click.ClickException(f"no server: {self._log.read()[-2000:].decode(errors='replace')}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


# what they are asked


def code(n_chars: int, number: int) -> str:
    """Returns the beginning of a source file that the bundled model hasn't seen, whole lines."""
    long_ones = [text for text in _unseen_files() if len(text) > n_chars + 1000]
    text = long_ones[number % len(long_ones)]
    return text[: text.rindex("\n", 0, n_chars) + 1]


@cache
def _unseen_files() -> list[str]:
    return split_sources(standard_library())[1]


def measure(url: str, n_long: int, n_predict: int, number: int) -> dict[str, float]:
    """Returns one round's numbers of one server."""
    common = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    system = {"role": "system", "content": "".join(code(n_long // 4, number + i) for i in range(4))}

    def chat(*messages: dict[str, str]) -> Heard:
        return ask(url, CHAT, {"messages": [system, *messages], "max_tokens": 48, **common})

    hello = {"role": "user", "content": "Hello, how are you?"}
    cold = chat(hello)
    following = chat(hello, {"role": "assistant", "content": _said(cold)}, {"role": "user", "content": "And now?"})
    other = chat({"role": "user", "content": "What is the capital of France?"})
    loop, after = _agent(chat, number)
    pieces = [{"prompt": code(500, number + i), "max_tokens": n_predict, **common} for i in range(5)]
    one = ask(url, TEXT, pieces[0])
    with ThreadPoolExecutor(4) as pool:
        started = time.perf_counter()
        four = list(pool.map(lambda piece: ask(url, TEXT, piece), pieces[1:]))
        four_s = time.perf_counter() - started
    return {
        "n_prompt": cold.n_prompt,
        "cold_s": _first_s(cold),
        "next_s": _first_s(following),
        "next_cached": following.n_cached,
        "other_s": _first_s(other),
        "loop_s": median(map(_first_s, loop)),
        "after_s": _first_s(after),
        "after_cached": after.n_cached,
        "one_tps": (_n_tokens(one, n_predict) - 1) / (one.total_s - one.first_s),
        "four_tps": sum(_n_tokens(heard, n_predict) for heard in four) / four_s,
    }


def _agent(chat: Callable[..., Heard], number: int) -> tuple[list[Heard], Heard]:
    """Plays a loop of tool calls, each with a page of text as its result, and the user's next message after it."""
    messages = [{"role": "user", "content": "Read all the files."}]
    turns = []
    for i in range(LOOP_TURNS):
        turns.append(chat(*messages))
        messages += _turn_back(turns[-1], f"call_{i}", code(1500, number + 10 + i))
    turns.append(chat(*messages))
    said = {"role": "assistant", "content": _said(turns[-1])}
    return turns[1:], chat(*messages, said, {"role": "user", "content": "And what did you see?"})


def _first_s(heard: Heard) -> float:
    return heard.first_s if heard.status == 200 else float("nan")  # a request that a server refuses is no time


def _said(heard: Heard) -> str:
    return heard.content.rpartition("</think>")[2].strip()  # one of the servers knows no reasoning


def _turn_back(heard: Heard, call_id: str, result: str) -> list[dict[str, Any]]:
    """Returns a turn as an agent sends it back, and the result of the tool that it is said to have called."""
    call = {"id": call_id, "type": "function", "function": {"name": "read", "arguments": '{"path": "a.py"}'}}
    said = {"role": "assistant", "content": _said(heard), "reasoning_content": heard.reasoning}
    return [said | {"tool_calls": [call]}, {"role": "tool", "tool_call_id": call_id, "content": result}]


def _n_tokens(heard: Heard, n_predict: int) -> int:
    return n_predict if heard.finish == "length" else heard.n_tokens or heard.n_pieces


# the commands


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("table", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rounds", default="0", show_default=True, help="Numbers of the rounds, such as 0,1,2.")
@click.option("--only", help="Servers whose names contain this.")
@click.option("--long", "n_long", default=26000, show_default=True, help="Characters of the system's text.")
@click.option("-n", "--n-predict", default=128, show_default=True)
@click.option("-t", "--threads", "n_threads", default=2, show_default=True)
@click.option("-c", "--ctx", "n_ctx", default=32768, show_default=True)
def run(
    model: Path, table: Path, rounds: str, only: str | None, n_long: int, n_predict: int, n_threads: int, n_ctx: int
) -> None:
    """Measures all servers with MODEL and adds to TABLE."""
    _unseen_files()
    chosen = [c for c in contenders(Setup(model, n_ctx, n_threads)) if only is None or only in c.name]
    for number in map(int, rounds.split(",")):
        for contender in chosen[:: -1 if number % 2 else 1]:
            with ExitStack() as stack:
                url = contender.start(stack)
                ask(url, TEXT, {"prompt": code(200, 9), "max_tokens": N_WARM_UP, "stream": True})
                result = measure(url, n_long, n_predict, number)
            click.echo(f"{contender.name}: { {key: round(value, 3) for key, value in result.items()} }", err=True)
            _add(table, {"model": model.stem, "round": number, "server": contender.name, **result})


def _add(table: Path, line: dict[str, Any]) -> None:
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line))
        if is_new:
            writer.writeheader()
        writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})


@main.command()
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def show(table: Path) -> None:
    """Prints medians, by model and server."""
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for model in dict.fromkeys(line["model"] for line in lines):
        _show_model(model, [line for line in lines if line["model"] == model])


def _show_model(model: str, lines: Sequence[dict[str, str]]) -> None:
    columns = list(lines[0])[3:]
    click.echo(f"| {model} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for server in dict.fromkeys(line["server"] for line in lines):
        own = [line for line in lines if line["server"] == server]
        click.echo(f"| {server} ({len(own)}) | {' | '.join(_medians(own, columns))} |")


def _medians(lines: Iterable[dict[str, str]], columns: Iterable[str]) -> list[str]:
    values = [median(float(line[column]) for line in lines) for column in columns]
    return ["-" if isnan(value) else f"{value:.4g}" for value in values]


if __name__ == "__main__":
    main()
