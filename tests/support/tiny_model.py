"""The bundled checkpoint as a GGUF: converted once a test run, for all tests of the runtime."""

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import checkpoints

_FOLDER = tempfile.TemporaryDirectory(prefix="step35-tests-")


def tiny_gguf(type_name: str = "Q8_0", mtp: str = "keep") -> Path:
    """Returns the converted checkpoint; `mtp` as of convert-step35 run."""
    return _convert_once(type_name, mtp)


@cache
def _convert_once(type_name: str, mtp: str) -> Path:
    out = Path(_FOLDER.name) / f"tiny-{type_name}-{mtp}.gguf"
    command = [sys.executable, "-m", "convert_step35", "run", str(checkpoints.BUNDLED), str(out)]
    subprocess.run([*command, "--type", type_name, "--mtp", mtp], check=True, capture_output=True)
    return out
