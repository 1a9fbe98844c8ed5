"""Drives upstream's own converter and quantizer: the oracles of the converter's tests.

The converter's scripts come from the sdist of the pinned llama-cpp-python (patches/UPSTREAM), fetched once
by pip into .cache/ (77 MB, a few seconds). The quantizer is the installed wheel's `llama_model_quantize`.
"""

import ctypes
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._logger import llama_log_callback

from step35.backend.upstream import fetch, patches_folder, read_upstream

TESTS = Path(__file__).parent
CACHE = TESTS.parents[1] / ".cache" / "upstream"
PIN = read_upstream(patches_folder())
VERSION = PIN.version
WANTED = ("conversion/", "gguf-py/", "convert_hf_to_gguf.py")
C: Any = llama_cpp  # its annotations are of other types than its structures and their fields
TYPE_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[\d, ]+\], type = +(\w+), size = .*?(?:\((\w+)\))?\n")


# the sources


def sdist() -> Path:
    """Returns the pinned sdist, fetched by pip on the first call."""
    return fetch(PIN, CACHE)


def sources() -> Path:
    """Returns a folder with llama.cpp's conversion scripts and gguf-py, unpacked on the first call."""
    home = CACHE / VERSION
    if not home.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            _unpack(sdist(), Path(work) / "llama.cpp")
            (Path(work) / "llama.cpp").rename(home)
    return home


def _unpack(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.startswith(tuple(PIN.root + wanted for wanted in WANTED)):
                member.name = member.name.removeprefix(PIN.root)
                archive.extract(member, folder, filter="data")


# the converter


def convert(checkpoint: Path, out: Path, outtype: str, *flags: str) -> Path:
    """Runs convert_hf_to_gguf.py and returns `out`; raises RuntimeError with the end of its log."""
    command = [sys.executable, str(TESTS / "upstream_convert.py"), str(sources()), str(checkpoint)]
    command += ["--outtype", outtype, "--outfile", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"upstream's converter failed: {done.stderr[-2000:]}")
    return out


# the quantizer


def quantize(
    source: Path,
    out: Path,
    preset: str,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    tensor_types: Mapping[str, int] | None = None,
    keys: Mapping[str, int | str] | None = None,
    keep_split: bool = False,
    n_threads: int = 2,
) -> Path:
    """Quantizes a GGUF with `llama_model_quantize` and returns `out`.

    `tensor_types` are --tensor-type's, from pattern to ggml type; `keys` are set as --override-kv sets them.
    """
    extra = C.llama_model_quantize_default_params()
    if tensor_types:
        overrides = [C.llama_model_tensor_override(k.encode(), v) for k, v in tensor_types.items()]
        extra.tt_overrides = (C.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
    if keys:
        entries = [_kv_override(key, value) for key, value in keys.items()]
        extra.kv_overrides = (C.llama_model_kv_override * (len(entries) + 1))(*entries)
    extra.keep_split = keep_split
    _run_quantizer(source, out, preset, imatrix or {}, n_threads=n_threads, params=extra)
    return out


def _kv_override(key: str, value: int | str) -> Any:
    entry = C.llama_model_kv_override(key=key.encode())
    if isinstance(value, str):
        entry.tag, entry.value.val_str = C.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    else:
        entry.tag, entry.value.val_i64 = C.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return entry


def planned_types(source: Path, preset: str, *, imatrix: Mapping[str, np.ndarray] | None = None) -> dict[str, str]:
    """Returns the ggml type upstream gives every tensor, in its own order; reads no tensor data."""
    log = _run_quantizer(source, source, preset, imatrix or {}, dry_run=True)
    return {name: new or old for name, old, new in TYPE_LINE.findall(log)}


def _run_quantizer(
    source: Path,
    out: Path,
    preset: str,
    imatrix: Mapping[str, np.ndarray],
    *,
    n_threads: int = 1,
    dry_run: bool = False,
    params: Any = None,
) -> str:
    params = params or C.llama_model_quantize_default_params()
    params.ftype = ftype(preset)
    params.nthread = n_threads
    params.dry_run = dry_run
    weights = {name: np.ascontiguousarray(values, np.float32) for name, values in imatrix.items()}
    if weights:
        params.imatrix = imatrix_entries(weights)
    with captured_log() as lines:
        failed = C.llama_model_quantize(bytes(source), bytes(out), params)
    log = "".join(lines)
    if failed:
        raise RuntimeError(f"upstream's quantizer failed on {preset}: {log[-2000:]}")
    return log


def ftype(preset: str) -> int:
    """Returns llama.cpp's number of a preset such as Q4_K_M or F32."""
    kind = "ALL" if preset == "F32" else "MOSTLY"
    return getattr(llama_cpp, f"LLAMA_FTYPE_{kind}_{preset}")


def imatrix_entries(imatrix: Mapping[str, np.ndarray]) -> Any:
    """Returns the C array of float32 weights per tensor name, ended by an empty entry; it points into the weights."""
    entries = (C.llama_model_imatrix_data * (len(imatrix) + 1))()
    for entry, (name, weights) in zip(entries, imatrix.items(), strict=False):
        entry.name = name.encode()
        entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = weights.size
    return entries


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collects llama.cpp's log lines, and gives the log back to llama_cpp afterwards."""
    lines: list[str] = []

    @C.llama_log_callback
    def collect(level: int, text: bytes, user_data: object) -> None:
        lines.append(text.decode(errors="replace"))

    C.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        C.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
