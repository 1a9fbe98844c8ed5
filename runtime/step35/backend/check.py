"""A build's self-test: the made-up model's logits, beside the stock wheel's and those of the torch reference."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from step35.errors import BackendError, NativeError
from step35.native.load_failures import DRIVER_IS_MISSING
from step35.planning.hardware import Sources, this_box
from step35.selftest import synthetic_model
from step35.selftest.missing_gpu import missing_gpu
from step35.selftest.trial import Crashed, Trial, run_trial

TOLERANCE = 0.05
"""Of the logits' spread, as in selftest/doctor.py: a GPU may round products to 10 bits."""


def self_test(
    folder: Path,
    *,
    needs_gpu: bool = True,
    try_out: Callable[[Path], Trial] = run_trial,
    box: Callable[[], Sources] = this_box,
) -> str:
    """Returns what was compared and where it ran.

    Raises BackendError if the libraries can't run, compute something else, or are for GPUs and find none; a build for
    another box needs none (`needs_gpu`), nor NVIDIA's driver, without which its libraries can't be loaded here.
    """
    try:
        ours = _trial(folder, try_out)
    except BackendError as error:
        if needs_gpu or DRIVER_IS_MISSING not in str(error):
            raise
        return f"not run: {DRIVER_IS_MISSING}"
    if ours.gpu_backends and not ours.gpus and needs_gpu:
        missing = missing_gpu(box(), ours.gpu_backends)
        raise BackendError(
            f"the build found no GPU: {missing.found}; {missing.remedy}; or, if it is for another box, build it with "
            "--no-gpu-here"
        )
    return f"{_compared(folder, ours.logits, _trial(stock_folder(), try_out).logits)}, on {ours.where}"


def _compared(folder: Path, ours: np.ndarray, stock: np.ndarray) -> str:
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
    return _trial(folder, run_trial).logits


def _trial(folder: Path, try_out: Callable[[Path], Trial]) -> Trial:
    try:
        return try_out(folder)
    except Crashed as error:
        raise BackendError(f"the libraries of {folder} don't run: {error}; try another driver or toolkit") from error
    except NativeError as error:
        raise BackendError(f"the libraries of {folder} don't run: {error}") from error
