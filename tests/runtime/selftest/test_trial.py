"""The made-up model runs in a child: whatever a driver does to it, the caller gets logits or one line."""

import sys

import pytest

from step35.errors import NativeError, SettingsError
from step35.selftest import synthetic_model
from step35.selftest.trial import Crashed, report, run_trial

DEVICE = """print('{"step35": "trial", "gpu_backends": ["vulkan"], "gpus": ["AMD Radeon 8060S"]}', flush=True)"""
LOGITS = """print('{"step35": "trial", "logits": [0.5, 1.5]}')"""
SEGFAULT = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def trial(*code: str, timeout_s: float = 60):
    return run_trial(command=[sys.executable, "-c", "\n".join(code)], timeout_s=timeout_s)


def test_the_running_libraries_give_the_known_token():
    done = run_trial()
    assert int(done.logits.argmax()) == synthetic_model.known_logits().best
    assert done.where == (", ".join(done.gpus) or "the CPU")


def test_what_a_driver_prints_is_passed_over():
    done = trial("print('radv: a warning')", DEVICE, "print('{}')", LOGITS)
    assert (done.logits.tolist(), done.gpu_backends, done.where) == ([0.5, 1.5], ("vulkan",), "AMD Radeon 8060S")


@pytest.mark.parametrize(("said", "where"), [(DEVICE, "on AMD Radeon 8060S"), ("", "before it listed its devices")])
def test_a_crash_names_the_signal_and_the_device(said: str, where: str):
    with pytest.raises(Crashed, match=rf"^llama.cpp crashed with signal 11 \(SIGSEGV\) {where}$"):
        trial(said, SEGFAULT)


def test_a_driver_that_hangs_is_ended_and_named():
    with pytest.raises(Crashed, match=r"^llama.cpp didn't end within 0.05 minutes on AMD Radeon 8060S$"):
        trial(DEVICE, "import time; time.sleep(60)", timeout_s=3)


def test_a_refusal_is_its_own_reason(capsys):
    def refuse(*_):
        raise SettingsError("doesn't fit")

    with pytest.raises(SystemExit):
        report(refuse)
    said = capsys.readouterr().out
    with pytest.raises(NativeError, match="^doesn't fit$") as caught:
        trial(f"print({said!r}); raise SystemExit(1)")
    assert not isinstance(caught.value, Crashed)


def test_an_end_without_logits_is_its_last_line():
    with pytest.raises(NativeError, match="^ValueError: odd$"):
        trial(DEVICE, "raise ValueError('odd')")
    with pytest.raises(NativeError, match="^it ended with 0$"):
        trial(DEVICE)
