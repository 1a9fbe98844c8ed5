"""A build's self-test: the made-up model's logits, beside the stock wheel's and those of the torch reference."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from step35.errors import BackendError
from step35.native.chosen_build import VARIABLE
from step35.selftest import synthetic_model

TOLERANCE = 0.05
"""Of the logits' spread, as in selftest/doctor.py: a GPU may round products to 10 bits."""
_LOGITS = """\
import json
from step35.selftest.doctor import made_up_logits
from step35.engine.engine import Engine
print(json.dumps(made_up_logits(Engine).tolist()))
"""


def self_test(folder: Path) -> str:
    """Returns what was compared; raises BackendError if the libraries can't run or compute something else."""
    ours, stock = logits_of(folder), logits_of(stock_folder())
    known = synthetic_model.known_logits()
    off = float(np.abs(ours - stock).max()) / known.spread
    if not off <= TOLERANCE or int(ours.argmax()) != known.best:  # a NaN isn't
        raise BackendError(
            f"the build computes something else: {folder} expected token {known.best} and logits within "
            f"{TOLERANCE:.0%} of the stock build's, got token {int(ours.argmax())} and {off:.1%}; "
            "try another driver, toolkit or compiler"
        )
    distance = "bit-equal to" if off == 0 else f"within {off:.2%} of"
    return f"token {known.best} as known, logits {distance} the stock build's"


def stock_folder() -> Path:
    """Returns the folder of the installed llama-cpp-python's own libraries."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BackendError("llama-cpp-python isn't installed; pip install step35 again")
    return Path(spec.origin).parent / "lib"


def logits_of(folder: Path) -> np.ndarray:
    """Returns the made-up model's logits after its prompt, computed by the libraries of a folder."""
    environment = os.environ | {VARIABLE: str(folder)}
    command = [sys.executable, "-c", _LOGITS]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise BackendError(f"the libraries of {folder} don't run: {reason}")
    return np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
