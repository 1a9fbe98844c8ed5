"""`step35 serve` under load, under nonsense, and beside llama-server: the same GGUF, machine and requests.

`load`: clients with mixed requests, some of which leave in the middle; every answer is checked against a
serial run with the same seed, and the server's memory is watched. `nonsense`: thousands of broken bodies,
only 4xx may come back. `peers`: time to the first token of a long prompt, cold and in the follow-up turn,
and tokens a second of one stream and of four. The machine must be quiet for `peers`.
"""

import csv
import http.client
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the server as a process

from live_server import LiveServer

WORDS = [
    "def",
    "class",
    "return",
    "import",
    "for",
    "while",
    "if",
    "else",
    "self",
    "value",
    "name",
    "list",
    "dict",
    "open",
    "read",
    "write",
    "close",
    "key",
    "item",
]
TOOL = {
    "type": "function",
    "function": {"name": "read", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}},
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@click.group()
def main() -> None:
    """Measures the server."""


# one request


@dataclass(frozen=True, slots=True)
class Heard:
    """What came back: the text, the seconds to its first piece and to its end, and the tokens by the server's count.

    `content` is the text without the reasoning and the calls.
    """

    status: int
    text: str
    first_s: float
    total_s: float
    n_tokens: int = 0
    n_cached: int = 0
    content: str = ""


def ask(url: str, path: str, body: dict[str, Any], leave_after: int | None = None) -> Heard | None:
    """Sends a request and reads its answer; None if the client left after so many bytes."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    try:
        response = connection.getresponse()
        if leave_after is not None:
            response.read(leave_after)
            return None
        if not body.get("stream"):
            data = json.loads(response.read())
            total = time.perf_counter() - started
            return Heard(response.status, _whole(data), total, total)
        return _streamed(response, started)
    finally:
        connection.close()


def _streamed(response: http.client.HTTPResponse, started: float) -> Heard:
    pieces, content, first_s, usage = [], [], None, {}
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        data = json.loads(line[6:])
        usage = data.get("usage") or usage
        text = _delta(data)
        if text:
            first_s = first_s or time.perf_counter() - started
            pieces.append(text)
            content += [choice.get("delta", {}).get("content") or "" for choice in data["choices"]]
    total = time.perf_counter() - started
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Heard(
        response.status,
        "".join(pieces),
        first_s or total,
        total,
        usage.get("completion_tokens", 0),
        cached,
        "".join(content),
    )


def _delta(data: dict[str, Any]) -> str:
    texts = []
    for choice in data.get("choices", ()):
        delta = choice.get("delta", {})
        texts += [choice.get("text"), delta.get("reasoning_content"), delta.get("content")]
        texts += [call["function"].get("arguments") for call in delta.get("tool_calls") or ()]
    return "".join(text for text in texts if text)


def _whole(data: dict[str, Any]) -> str:
    """Returns the text of an answer that wasn't streamed, put together as `_delta` does."""
    if "choices" not in data:
        return json.dumps(data)
    choice = data["choices"][0]
    message = choice.get("message", {})
    calls = "".join(call["function"]["arguments"] for call in message.get("tool_calls") or ())
    return (
        (choice.get("text") or "") + (message.get("reasoning_content") or "") + (message.get("content") or "") + calls
    )


# load


def make_requests(n: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Returns requests of mixed sizes and kinds, half of them streaming, all with a seed."""
    dice = random.Random(seed)
    return [_request(dice, i) for i in range(n)]


def _request(dice: random.Random, i: int) -> tuple[str, dict[str, Any]]:
    text = " ".join(dice.choices(WORDS, k=dice.choice((3, 20, 100, 400))))
    common = {
        "max_tokens": dice.choice((1, 8, 32, 96)),
        "seed": i,
        "temperature": dice.choice((0, 0.8)),
        "stream": i % 2 == 0,
    }
    if dice.random() < 0.4:
        return TEXT, {"prompt": text, **common}
    tools = {"tools": [TOOL]} if dice.random() < 0.3 else {}
    return CHAT, {"messages": [{"role": "user", "content": text}], **tools, **common}


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--clients", default=8, show_default=True)
@click.option("--requests", "n_each", default=50, show_default=True, help="Requests of each client.")
@click.option("--leave", default=0.1, show_default=True, help="Share of the clients that leave in the middle.")
def load(model: Path, clients: int, n_each: int, leave: float) -> None:
    """Many clients at a time; every answer is that of a serial run."""
    requests = make_requests(clients * n_each, seed=1)
    flags = (
        "--threads",
        "1",
        "--ctx",
        "16384",
        "--parallel",
        str(clients),
        "--kv-type",
        "f32",
        "--queue",
        str(clients),
    )
    with LiveServer(model, *flags) as server:
        server.ready()
        wanted = [ask(server.url, path, body).text for path, body in requests]
    with LiveServer(model, *flags) as server:
        server.ready()
        run_load(server, requests, wanted, clients, leave)


def run_load(server: LiveServer, requests: Sequence, wanted: Sequence[str], clients: int, leave: float) -> None:
    """Sends all requests from several clients, and exits with 1 if an answer is lost, wrong or mixed up."""
    dice = random.Random(2)
    leaves = [dice.randrange(1, 400) if dice.random() < leave else None for _ in requests]
    at_first = memory(server)

    def play(client: int) -> Counter:
        seen: Counter = Counter()
        for i in range(client, len(requests), clients):
            path, body = requests[i]
            heard = ask(server.url, path, body, leaves[i])
            seen[
                "left" if heard is None else "right" if (heard.status, heard.text) == (200, wanted[i]) else "wrong"
            ] += 1
        return seen

    with ThreadPoolExecutor(clients) as pool:
        seen = sum(pool.map(play, range(clients)), Counter())
    click.echo(f"{dict(seen)}, memory {at_first >> 20} MiB at first, {memory(server) >> 20} MiB at the end")
    if seen["wrong"] or sum(seen.values()) != len(requests):
        raise SystemExit(1)


def memory(server: LiveServer) -> int:
    return server.get("/status")[1]["memory"]["resident_bytes"]


# nonsense


def mutations(dice: random.Random) -> Iterator[bytes]:
    """Yields bodies: good ones with a byte changed, a piece lost, a value of another kind, or deeply nested."""
    strange: list[Any] = [
        None,
        True,
        -1,
        1e308,
        2**70,
        "",
        "\u0000",
        "x" * 5000,
        [],
        {},
        [[]],
        {"a": {"b": []}},
        -0.5,
        "<|im_end|>",
    ]
    while True:
        body = dice.choice(GOOD_BODIES)
        data = json.dumps(body).encode()
        kind = dice.randrange(5)
        if kind == 0:
            at = dice.randrange(len(data))
            yield data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            yield data[: dice.randrange(len(data))]
        elif kind == 2:
            yield b'{"messages":' * dice.randrange(1, 5000)
        else:
            yield json.dumps(_changed(body, dice, strange)).encode()


GOOD_BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "tools": [TOOL], "tool_choice": "auto", "stop": ["x"]},
    {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "system": "s"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "max_output_tokens": 1, "temperature": 0.5},
    {"prompt": [1, 2, 3], "max_tokens": 1, "logit_bias": {"5": 1}, "seed": 4, "logprobs": 1, "stream": True},
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}}}},
]  # fmt: skip


def _changed(value: Any, dice: random.Random, strange: Sequence[Any]) -> Any:
    """Returns a JSON value with one of its parts, at any depth, replaced."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        return {**value, key: _changed(value[key], dice, strange)}
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        return [*value[:at], _changed(value[at], dice, strange), *value[at + 1 :]]
    return dice.choice(strange)


def run_nonsense(server: LiveServer, n: int, seed: int = 0) -> Counter:
    """Sends n broken bodies to all paths; returns how often each status came back."""
    dice, statuses = random.Random(seed), Counter()
    paths = (CHAT, TEXT, "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize")
    bodies = mutations(dice)
    for _ in range(n):
        status, _ = server.post(dice.choice(paths), next(bodies))
        statuses[status] += 1
    return statuses


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-n", default=10000, show_default=True, help="Bodies.")
@click.option(
    "--schemathesis", "with_schemathesis", is_flag=True, help="Let schemathesis make bodies from /openapi.json, too."
)
def nonsense(model: Path, n: int, with_schemathesis: bool) -> None:
    """Broken bodies: whatever comes in, it is the client's fault."""
    with LiveServer(model, "--threads", "1", "--ctx", "2048") as server:
        server.ready()
        statuses = run_nonsense(server, n)
        click.echo(f"answers by status: {dict(sorted(statuses.items()))}")
        broken = any(status >= 500 for status in statuses) or server.get("/health")[0] != 200
        if with_schemathesis:
            broken |= _schemathesis(server.url) != 0
    raise SystemExit(broken)


def _schemathesis(url: str) -> int:
    import subprocess

    command = [
        "schemathesis",
        "run",
        f"{url}/openapi.json",
        "--checks",
        "not_a_server_error",
        "--exclude-path",
        "/v1/embeddings",
    ]
    return subprocess.run([*command, "--max-examples", "200"], check=False).returncode


# peers


@dataclass(slots=True)
class Peer:
    """A server under some name; `start` opens it and returns its address."""

    name: str
    start: Callable[[ExitStack], str]
    stack: ExitStack | None = None
    url: str = ""

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        self.url = self.start(self.stack)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def ours(model: Path, draft: str, n_threads: int, n_ctx: int) -> Peer:
    def start(stack: ExitStack) -> str:
        flags = (
            "--threads",
            str(n_threads),
            "--ctx",
            str(n_ctx),
            "--batch",
            "512",
            "--parallel",
            "4",
            "--draft",
            draft,
        )
        return stack.enter_context(LiveServer(model, *flags)).ready().url

    return Peer(f"step35 serve, drafting {draft}", start)


def llama_server(model: Path, draft: bool, n_threads: int, n_ctx: int) -> Peer:
    def start(stack: ExitStack) -> str:
        import build_peers

        options = ["--spec-type", "draft-mtp"] if draft else []
        return stack.enter_context(_Program(
            [str(build_peers.program("llama-server")), "-m", str(model), "-t", str(n_threads), "-c", str(n_ctx), "-b", "512",
             "-ub", "512", "-np", "4", "-kvu", "--jinja", "--no-webui", *options],
            build_peers.environment(),
        )).url  # fmt: skip

    return Peer(f"llama-server, {'draft-mtp' if draft else 'no drafting'}", start)


class _Program:
    """A server program on a free port, ready when /health says so."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        import socket
        import subprocess

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = open(Path("/tmp") / f"peer-{port}.log", "wb")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=self._log, stderr=self._log
        )

    def __enter__(self) -> Self:
        import urllib.error
        import urllib.request

        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                    if response.status == 200:
                        return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise click.ClickException(f"no answer from {self.url}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


def long_text(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def measure(url: str, n_words: int, n_predict: int, seed: int) -> dict[str, float]:
    """Returns one round's numbers of one server."""
    usage = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    messages = [
        {"role": "system", "content": long_text(n_words, seed)},
        {"role": "user", "content": "Hello, how are you?"},
    ]
    cold = ask(url, CHAT, {"messages": messages, "max_tokens": 64, **usage})
    # as clients do: the answer's content goes back, its reasoning doesn't
    messages += [{"role": "assistant", "content": cold.content}, {"role": "user", "content": "And now?"}]
    follow_up = ask(url, CHAT, {"messages": messages, "max_tokens": 64, **usage})
    plain = {"prompt": long_text(40, seed), "max_tokens": n_predict, **usage}
    one = ask(url, TEXT, plain)
    with ThreadPoolExecutor(4) as pool:
        started = time.perf_counter()
        four = list(pool.map(lambda i: ask(url, TEXT, {**plain, "prompt": long_text(40, seed + i)}), range(4)))
        four_s = time.perf_counter() - started
    return {
        "cold_first_s": cold.first_s,
        "follow_up_first_s": follow_up.first_s,
        "follow_up_cached": follow_up.n_cached,
        "one_stream_tps": (one.n_tokens - 1) / (one.total_s - one.first_s) if one.n_tokens > 1 else 0.0,
        "four_streams_tps": sum(heard.n_tokens for heard in four) / four_s,
    }


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--words", default=6000, show_default=True, help="Words of the long system text.")
@click.option("-n", "--n-predict", default=128, show_default=True)
@click.option("-t", "--threads", "n_threads", default=2, show_default=True)
@click.option("-c", "--ctx", "n_ctx", default=32768, show_default=True)
@click.option("--csv", "csv_file", type=click.File("w"), default="-", help="Where the table goes.")
def peers(model: Path, rounds: int, words: int, n_predict: int, n_threads: int, n_ctx: int, csv_file) -> None:
    """Beside llama-server: medians over rounds, every second round in the other order."""
    contenders = [ours(model, "off", n_threads, n_ctx), ours(model, "auto", n_threads, n_ctx)]
    contenders += [llama_server(model, False, n_threads, n_ctx), llama_server(model, True, n_threads, n_ctx)]
    found: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in contenders}
    for number in range(rounds):
        for peer in contenders[:: -1 if number % 2 else 1]:
            with peer:
                ask(peer.url, TEXT, {"prompt": "warm up", "max_tokens": 8})
                found[peer.name].append(measure(peer.url, words, n_predict, seed=number))
            click.echo(f"{peer.name}: {found[peer.name][-1]}", err=True)
    table = csv.writer(csv_file)
    table.writerow(["server", *found[contenders[0].name][0]])
    for name, results in found.items():
        table.writerow([name, *(round(median(result[key] for result in results), 4) for key in results[0])])


if __name__ == "__main__":
    main()
