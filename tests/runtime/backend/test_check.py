"""A build's self-test: it names the device, and a build for GPUs that finds none does not pass unseen."""

from pathlib import Path

import numpy as np
import pytest

from step35.backend.check import self_test, stock_folder
from step35.errors import BackendError, NativeError
from step35.native.load_failures import library_remedy
from step35.planning.hardware import Sources
from step35.selftest import synthetic_model
from step35.selftest.trial import Crashed, Trial

FOLDER = Path("/builds/ours")
GPU = ("AMD Radeon 8060S",)


def logits(off: float = 0.0) -> np.ndarray:
    known = synthetic_model.known_logits()
    values = np.full(synthetic_model.N_VOCAB, -10, np.float32)
    values[list(known.logits)] = list(known.logits.values())
    return values + np.float32(off * known.spread)


def box(**nodes: bool) -> Sources:
    paths = {f"/dev/dri/{name}": is_open for name, is_open in nodes.items()}
    return Sources({}.get, list, lambda n_threads: 1e9, 2, "Linux", may_open=paths.get)


def verdict(ours: Trial, *, needs_gpu: bool = True, **nodes: bool) -> str:
    trials = {FOLDER: ours, stock_folder(): Trial(logits())}
    return self_test(FOLDER, needs_gpu=needs_gpu, try_out=trials.__getitem__, box=lambda: box(**nodes))


def test_a_build_for_the_cpu_says_so() -> None:
    best = synthetic_model.known_logits().best
    want = f"token {best} as known, logits bit-equal to the stock build's, on the CPU"
    assert verdict(Trial(logits())) == want


def test_the_device_is_named() -> None:
    assert verdict(Trial(logits(0.01), ("vulkan",), GPU)).endswith(" of the stock build's, on AMD Radeon 8060S")


def test_a_build_for_gpus_that_finds_none_fails_with_the_cause() -> None:
    """Symptom: bit-equal, as known, and all of it computed on the CPU."""
    with pytest.raises(BackendError, match=r"found no GPU: .*may not read.*renderD128; .*usermod.*--no-gpu-here$"):
        verdict(Trial(logits(), ("vulkan",)), renderD128=False)


def test_a_build_for_another_box_needs_none() -> None:
    assert verdict(Trial(logits(), ("vulkan",)), needs_gpu=False).endswith("on the CPU")


def test_a_build_for_another_box_needs_no_driver_here() -> None:
    """A CUDA build can't even be loaded without libcuda.so.1."""
    error = "can't load llama.cpp from /builds/ours: libcuda.so.1: cannot open shared object file: No such file; "

    def fail(folder: Path) -> Trial:
        raise NativeError(error + (library_remedy(error) or ""))

    assert self_test(FOLDER, needs_gpu=False, try_out=fail) == "not run: NVIDIA's driver isn't installed here"
    with pytest.raises(BackendError, match="libcuda"):
        self_test(FOLDER, try_out=fail)


def test_a_build_that_computes_something_else_is_refused() -> None:
    with pytest.raises(BackendError, match=r"computes something else: /builds/ours .*got token \d+ and 320"):
        verdict(Trial(logits(3.2), ("vulkan",), GPU))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Crashed("llama.cpp crashed with signal 11 (SIGSEGV)"), "SIGSEGV\\); try another driver"),
        (NativeError("libllama lacks x"), "lacks x$"),
    ],
)
def test_libraries_that_do_not_run_are_one_line(error: NativeError, said: str) -> None:
    def fail(folder: Path) -> Trial:
        raise error

    with pytest.raises(BackendError, match=f"the libraries of /builds/ours don't run: .*{said}"):
        self_test(FOLDER, try_out=fail)
