"""The made-up model run in a child process: a driver that crashes or hangs ends the child, not its caller."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from step35.errors import NativeError
from step35.native.chosen_build import VARIABLE
from step35.native.rows import Rows
from step35.options import EngineOptions
from step35.planning.model_header import Headers, read_headers
from step35.selftest import synthetic_model

FIRST_RUN_S = 20 * 60.0
"""A GPU's driver may compile shaders for minutes before the first token."""
N_BATCH = 64
LISTING = "before it listed its devices"
_CHILD = """\
from step35.selftest.trial import report
def load(*loading):
    from step35.engine.engine import Engine
    return Engine(*loading)
report(load)
"""


class TestedTrunk(Protocol):
    """What a self-test does with an engine's trunk; see native.context.Context."""

    def truncate(self, seq: int, n_keep: int) -> None: ...

    def decode(self, rows: Sequence[Rows]) -> None: ...

    def logits(self) -> np.ndarray: ...


class TestedEngine(Protocol):
    """What a self-test needs of an engine."""

    @property
    def trunk(self) -> TestedTrunk: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


LoadEngine = Callable[[EngineOptions, Headers], TestedEngine]


class Crashed(NativeError):
    """llama.cpp crashed or didn't end; another driver or build may do better."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the libraries computed after the made-up model's prompt, and where."""

    logits: np.ndarray
    gpu_backends: tuple[str, ...] = ()
    """ggml's names of the GPU backends that the libraries have, such as vulkan."""
    gpus: tuple[str, ...] = ()
    """The devices that llama.cpp takes."""

    @property
    def where(self) -> str:
        return ", ".join(self.gpus) or "the CPU"


def run_trial(
    folder: Path | None = None,
    *,
    timeout_s: float = FIRST_RUN_S,
    command: Sequence[str] = (sys.executable, "-c", _CHILD),
) -> Trial:
    """Runs the made-up model on the libraries of a folder, or on those that this process would take.

    Raises Crashed where llama.cpp crashes or doesn't end, and NativeError with its reason where it refuses.
    """
    environment = os.environ | ({VARIABLE: str(folder)} if folder else {})
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        minutes = f"{timeout_s / 60:.3g} minutes"
        raise Crashed(f"llama.cpp didn't end within {minutes}{_place(error.stdout)}") from error
    if done.returncode < 0 or done.returncode > 255:
        raise Crashed(f"llama.cpp crashed with {_signal(done.returncode)}{_place(done.stdout)}")
    lines = _lines(done.stdout)
    if done.returncode or len(lines) < 2:
        raise NativeError(_refusal(lines, done.stderr, done.returncode))
    return Trial(np.array(lines[1]["logits"], np.float32), tuple(lines[0]["gpu_backends"]), tuple(lines[0]["gpus"]))


def _lines(output: bytes | None) -> list[dict]:
    """Returns the child's JSON lines; drivers may print others between them."""
    texts = (output or b"").decode(errors="replace").splitlines()
    return [json.loads(text) for text in texts if text.startswith('{"step35"')]


def _place(output: bytes | None) -> str:
    lines = _lines(output)
    if not lines:
        return f" {LISTING}"
    return f" on {', '.join(lines[0]['gpus']) or 'the CPU'}"


def _signal(code: int) -> str:
    """Returns the words for a return code that no program chooses: a signal, or Windows' exception."""
    if code > 0:
        return f"exception 0x{code:08X}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def _refusal(lines: list[dict], errors: bytes, code: int) -> str:
    """Returns the child's own reason, else its last line."""
    if lines and "error" in lines[-1]:
        return lines[-1]["error"]
    said = errors.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"it ended with {code}"


# in the child


def report(load_engine: LoadEngine) -> None:
    """Prints where the made-up model runs, before it runs, and then its logits: a JSON line each."""
    try:
        from step35.native.devices import gpu_backends, used_devices

        names = [device.name for device in used_devices()]
        _print({"gpu_backends": gpu_backends(), "gpus": names})
        _print({"logits": made_up_logits(load_engine).tolist()})
    except Exception as error:  # whatever it is, the caller's one line tells it
        _print({"error": str(error) or type(error).__name__})
        raise SystemExit(1) from error


def _print(fields: dict) -> None:
    print(json.dumps({"step35": "trial"} | fields), flush=True)


def made_up_logits(load_engine: LoadEngine) -> np.ndarray:
    """Returns the logits that the made-up model gives after its prompt."""
    with tempfile.TemporaryDirectory(prefix="step35-doctor-") as folder:
        path = Path(folder) / "made-up.gguf"
        synthetic_model.write(path)
        options = EngineOptions(path, draft="off", n_ctx=512, n_batch=N_BATCH)
        with load_engine(options, read_headers(path)) as engine:
            prompt = synthetic_model.PROMPT
            parts = [list(prompt[i : i + N_BATCH]) for i in range(0, len(prompt), N_BATCH)]
            return last_logits(engine, parts)


def last_logits(engine: TestedEngine, parts: list[list[int]]) -> np.ndarray:
    """Returns the logits after the last token of a prompt that is decoded in parts."""
    start = 0
    engine.trunk.truncate(0, 0)
    for part in parts:
        engine.trunk.decode([Rows(0, start, part, outputs=1)])
        start += len(part)
    return engine.trunk.logits()[-1].copy()
