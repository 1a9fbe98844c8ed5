"""The contenders of bench/peers.py: step35 in this process, and upstream's llama-server and llama-bench.

All get the same file, the same tokens as a prompt, the same threads, context, batch and KV type. A speed
counts the tokens after the first, which comes with the prompt's logits, and the time after the prompt.
"""

import ctypes
import json
import mmap
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

import build_peers
from step35 import Engine, EngineOptions, Sampling
from step35.engine.decode_loop import begin, generate
from step35.engine.detokenize import stream_text
from step35.sampling.token_chooser import Chooser

START_S, REQUEST_S = 600, 3600


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for all contenders."""

    model: Path
    n_ctx: int = 4096
    n_batch: int = 512
    n_threads: int = 2
    mtp: Path | None = None
    """A side file of heads, for step35."""


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt to continue by at most `n_predict` tokens; it ends earlier at an end token."""

    kind: str
    tokens: tuple[int, ...]
    n_predict: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What a task took.

    `n_cycles` counts verifications of heads' drafts, `accepted` those in which each head's draft was
    accepted, `n_accepted` tokens accepted from any source, `head_decodes` the decodes of MTP heads (0 where that can't
    be seen from outside).
    """

    n_prompt: int
    prefill_s: float
    n_decoded: int
    decode_s: float
    n_cycles: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    accepted: tuple[int, ...] = ()
    head_decodes: int = 0


class Contender(Protocol):
    """A loaded model that runs tasks, one after the other."""

    setup: Setup

    @property
    def name(self) -> str: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, task: Task) -> Run: ...


@contextmanager
def hold_in_memory(path: Path) -> Iterator[None]:
    """Locks a file's pages, which all contenders map: none waits for a page that the kernel took back meanwhile."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        start = np.frombuffer(pages, np.uint8)
        if ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(len(pages))):
            print(f"{path} may leave the memory: {os.strerror(ctypes.get_errno())}; see ulimit -l", file=sys.stderr)
        del start  # a mapping with a view can't be closed
        yield


# step35


@dataclass(slots=True)
class Step35:
    """This project's engine with one draft mode."""

    setup: Setup
    draft: str
    engine: Engine = field(init=False)
    n_head_decodes: int = 0

    @property
    def name(self) -> str:
        return f"step35 {self.draft}"

    def __enter__(self) -> Self:
        s = self.setup
        self.engine = Engine(
            EngineOptions(s.model, s.mtp, self.draft, n_ctx=s.n_ctx, n_batch=s.n_batch, n_threads=s.n_threads)
        )
        for context in self.engine.drafter.heads.contexts if self.engine.drafter.heads else ():
            context.decode = self._counted(context.decode)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def _counted(self, decode: Callable) -> Callable:
        def counted(rows: Sequence) -> None:
            self.n_head_decodes += 1
            decode(rows)

        return counted

    def run(self, task: Task) -> Run:
        sampling = Sampling(temperature=task.temperature, top_k=0, top_p=1.0, min_p=0.0, seed=task.seed)
        n_before = self.n_head_decodes
        with self.engine.open_session() as session:
            turn = begin(session, task.tokens, Chooser(sampling), task.n_predict)
            started = time.perf_counter()
            "".join(stream_text(generate(turn), self.engine.model.piece))
            wall_s = time.perf_counter() - started
            stats, n_decoded = turn.stats, len(turn.generated) - 1
        return Run(
            stats.n_prompt, stats.prefill_s, n_decoded, wall_s - stats.prefill_s,
            max(stats.drafted_per_head, default=0), stats.n_drafted, stats.n_accepted, tuple(stats.accepted_per_head),
            self.n_head_decodes - n_before,
        )  # fmt: skip


# llama-server


@dataclass(slots=True)
class LlamaServer:
    """Upstream's server with draft-mtp at a fixed depth; depth 0 decodes plainly."""

    setup: Setup
    depth: int
    _stack: ExitStack = field(default_factory=ExitStack)
    _url: str = ""

    @property
    def name(self) -> str:
        return f"llama-server {self.depth or 'off'}"

    def __enter__(self) -> Self:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        log = self._stack.enter_context(self.setup.model.with_suffix(".server.log").open("wb"))
        process = subprocess.Popen(
            self._command(port), env=build_peers.environment(), stdout=log, stderr=subprocess.STDOUT
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        _wait_until_healthy(self._url, process)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _command(self, port: int) -> list[str]:
        s = self.setup
        command = [str(build_peers.program("llama-server")), "-m", str(s.model), "--port", str(port), "-np", "1"]
        command += ["-c", str(s.n_ctx), "-b", str(s.n_batch), "-ub", str(s.n_batch)]
        command += ["-t", str(s.n_threads), "-tb", str(s.n_threads), "--cache-ram", "0", "--metrics"]
        return command + (["--spec-type", "draft-mtp", "--spec-draft-n-max", str(self.depth)] if self.depth else [])

    def run(self, task: Task) -> Run:
        before = self._acceptance()
        body = {"prompt": list(task.tokens), "n_predict": task.n_predict, "cache_prompt": False}
        body |= {"temperature": task.temperature, "seed": task.seed, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        timings = json.loads(_fetch(f"{self._url}/completion", body))["timings"]
        n_cycles, *accepted = (now - then for now, then in zip(self._acceptance(), before, strict=True))
        return Run(
            timings["prompt_n"], timings["prompt_ms"] / 1e3, timings["predicted_n"] - 1, timings["predicted_ms"] / 1e3,
            n_cycles, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0), tuple(accepted),
        )  # fmt: skip

    def _acceptance(self) -> list[int]:
        """Returns the number of verifications so far, and how often each position was accepted."""
        lines = [
            line for line in _fetch(f"{self._url}/metrics").splitlines() if line.startswith("llamacpp:spec_decode")
        ]
        values = {name: int(float(value)) for name, value in (line.rsplit(" ", 1) for line in lines)}
        position = 'llamacpp:spec_decode_num_accepted_tokens_per_pos_total{{position="{}"}}'.format
        accepted = [values.get(position(i), 0) for i in range(self.depth)]
        return [values["llamacpp:spec_decode_num_drafts_total"], *accepted]


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _fetch(f"{url}/health")
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError(
        f"llama-server didn't start within {START_S} s, exit status {process.poll()}; see its log beside the model"
    )


def _fetch(url: str, body: dict[str, Any] | None = None) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_S) as reply:
        return reply.read().decode()


# llama-bench


def llama_bench(setup: Setup, arguments: Sequence[str]) -> dict[tuple[int, int], list[float]]:
    """Runs llama-bench; returns seconds of each repetition by (prompt tokens, generated tokens)."""
    command = [str(build_peers.program("llama-bench")), "-m", str(setup.model), "-t", str(setup.n_threads)]
    command += ["-b", str(setup.n_batch), "-ub", str(setup.n_batch), "-o", "json", *arguments]
    done = subprocess.run(command, env=build_peers.environment(), capture_output=True, text=True, check=True)
    return {(r["n_prompt"], r["n_gen"]): [ns / 1e9 for ns in r["samples_ns"]] for r in json.loads(done.stdout)}
