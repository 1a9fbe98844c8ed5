"""`step35 serve` under load and under nonsense.

`load`: clients with mixed requests, some of which leave in the middle; every answer is checked against a
serial run with the same seed, and the server's memory is watched. `nonsense`: thousands of broken bodies,
only 4xx may come back. Beside its peers it is measured by server_peers.py.
"""

import http.client
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from step35.sampling.sampler import gumbel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the server as a process

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
FLOAT_NOISE = 0.5
"""Of logits: 0.002 in the median, but where a router's two best experts are close, rounding moves them by up to 0.2."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@click.group()
def main() -> None:
    """Measures the server."""


# one request


@dataclass(frozen=True, slots=True)
class Heard:
    """What came back: the text, the seconds to its first piece and to its end, and the tokens by the server's count.

    `content` is the text without the reasoning and the calls, `n_pieces` how many pieces came, `tokens` are texts with
    their log-probabilities.
    """

    status: int
    text: str
    first_s: float
    total_s: float
    n_tokens: int = 0
    n_cached: int = 0
    content: str = ""
    n_prompt: int = 0
    n_pieces: int = 0
    finish: str | None = None
    tokens: tuple[tuple[str, float], ...] = ()
    reasoning: str = ""


def ask(url: str, path: str, body: dict[str, Any]) -> Heard:
    """Sends a request and reads its answer."""
    started = time.perf_counter()
    with _sent(url, path, body) as response:
        if body.get("stream"):
            return _streamed(response, started)
        data = json.loads(response.read())
        total = time.perf_counter() - started
        n_prompt = (data.get("usage") or {}).get("prompt_tokens", 0)
        return Heard(response.status, _whole(data), total, total, n_prompt=n_prompt, tokens=tuple(_tokens(data)))


def leave(url: str, path: str, body: dict[str, Any], n_bytes: int) -> None:
    """Sends a request, and hangs up after so many bytes of the answer."""
    with _sent(url, path, body) as response:
        response.read(n_bytes)


@contextmanager
def _sent(url: str, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def _streamed(response: http.client.HTTPResponse, started: float) -> Heard:
    pieces, content, reasoning, tokens, first_s, usage, finish = [], [], [], [], None, {}, None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        data = json.loads(line[6:])
        usage = data.get("usage") or usage
        finish = next(
            (choice["finish_reason"] for choice in data.get("choices", ()) if choice.get("finish_reason")), finish
        )
        tokens += _tokens(data)
        text = _delta(data)
        if text:
            first_s = first_s or time.perf_counter() - started
            pieces.append(text)
            content += [choice.get("delta", {}).get("content") or "" for choice in data["choices"]]
            reasoning += [choice.get("delta", {}).get("reasoning_content") or "" for choice in data["choices"]]
    total = time.perf_counter() - started
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Heard(
        response.status, "".join(pieces), first_s or total, total, usage.get("completion_tokens", 0), cached, "".join(content),
        usage.get("prompt_tokens", 0), len(pieces), finish, tuple(tokens), "".join(reasoning),
    )  # fmt: skip


def _tokens(data: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns the tokens that an answer or a piece of it gives log-probabilities of, as either API writes them."""
    found: list[tuple[str, float]] = []
    for choice in data.get("choices", ()):
        said = choice.get("logprobs") or {}
        found += [(entry["token"], entry["logprob"]) for entry in said.get("content") or ()]
        found += zip(said.get("tokens") or (), said.get("token_logprobs") or (), strict=True)
    return found


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
        "top_p": 1,
        "stream": i % 2 == 0,
        "stream_options": {"include_usage": True},
    }
    if dice.random() < 0.4:
        return TEXT, {"prompt": text, "logprobs": 0, **common}
    tools = {"tools": [TOOL]} if dice.random() < 0.3 else {}
    return CHAT, {"messages": [{"role": "user", "content": text}], "logprobs": True, **tools, **common}


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--clients", default=8, show_default=True)
@click.option("--requests", "n_each", default=50, show_default=True, help="Requests of each client.")
@click.option(
    "--leave", "leave_share", default=0.1, show_default=True, help="Share of the clients that leave in the middle."
)
def load(model: Path, clients: int, n_each: int, leave_share: float) -> None:
    """Many clients at a time; every answer is that of a serial run."""
    requests = make_requests(clients * n_each, seed=1)
    flags = f"--threads 1 --ctx 16384 --kv-type f32 --parallel {clients} --queue {clients}".split()
    with LiveServer(model, *flags) as server:
        server.ready()
        wanted = [ask(server.url, path, body) for path, body in requests]
    with LiveServer(model, *flags) as server:
        server.ready()
        run_load(server, requests, wanted, clients, leave_share)


def run_load(
    server: LiveServer,
    requests: Sequence[tuple[str, dict[str, Any]]],
    wanted: Sequence[Heard],
    clients: int,
    leave_share: float,
) -> None:
    """Sends all requests from several clients, and exits with 1 if an answer is lost, wrong or mixed up.

    An answer differs by rounding where it parts from the serial run at two tokens whose scores were closer than the noise
    of llama.cpp's floats, which depend on how many rows are decoded together; more than one in 20 is too many.
    """
    dice = random.Random(2)
    leaves = [dice.randrange(1, 400) if dice.random() < leave_share else None for _ in requests]
    memories = [memory(server)]

    def play(client: int) -> Counter:
        seen: Counter = Counter()
        for i in range(client, len(requests), clients):
            path, body = requests[i]
            if (n_bytes := leaves[i]) is not None:
                leave(server.url, path, body, n_bytes)
                seen["left"] += 1
            else:
                seen[judged(server, body, wanted[i], ask(server.url, path, body))] += 1
            if i == len(requests) // 4:
                memories.append(memory(server))
        return seen

    with ThreadPoolExecutor(clients) as pool:
        seen = sum(pool.map(play, range(clients)), Counter())
    memories.append(memory(server))
    said = "at first, after a quarter, at the end"
    click.echo(f"{dict(seen)}, memory in MiB {', '.join(str(n >> 20) for n in memories)} {said}")
    if seen["wrong"] or seen["rounding"] * 20 > len(requests) or memories[-1] > 1.1 * memories[1]:
        raise SystemExit(1)


def judged(server: LiveServer, body: dict[str, Any], wanted: Heard, heard: Heard) -> str:
    """Returns right, rounding or wrong."""
    if (heard.status, heard.text) == (200, wanted.text):
        return "right"
    verdict = "rounding" if differs_by_rounding(server, body, wanted, heard) else "wrong"
    click.echo(f"{verdict}: {json.dumps(body)}\nwanted {wanted.text!r}\ngot {heard.status} {heard.text!r}", err=True)
    return verdict


def differs_by_rounding(server: LiveServer, body: dict[str, Any], wanted: Heard, heard: Heard) -> bool:
    """Whether two answers part where their tokens' scores, the seed's noise included, lie closer than FLOAT_NOISE."""
    pairs = list(zip(wanted.tokens, heard.tokens, strict=False))
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours[0] != theirs[0]), None)
    if at is None:
        return False
    position, temperature = wanted.n_prompt + at, body["temperature"]
    scores = []
    for text, logprob in pairs[at]:
        ids = server.post("/tokenize", {"content": text})[1]["tokens"]
        noise = float(gumbel(body["seed"], position, np.array(ids[:1]))[0]) if temperature else 0.0
        scores.append(logprob + noise * temperature)
    return scores[0] - scores[1] < FLOAT_NOISE


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
            broken |= run_schemathesis(server.url, n_examples=200) != 0
    raise SystemExit(broken)


def run_schemathesis(url: str, n_examples: int, phases: str = "coverage,fuzzing") -> int:
    """Lets schemathesis make requests from /openapi.json; returns 0 if none of them was the server's fault."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--exclude-path", "/v1/embeddings", "--max-examples", str(n_examples), "--seed", "1"]
    command += ["--phases", phases]
    with tempfile.TemporaryDirectory(prefix="step35-schemathesis-") as folder:  # it keeps what it found where it runs
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    main()
