"""Compiles the native quantizers when the package is installed; without a compiler libggml does their work."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCES = Path("converter/convert_step35/quantization/native")
_LIBRARY = {"darwin": "libquantizers.dylib", "win32": "quantizers.dll"}.get(sys.platform, "libquantizers.so")
# Contracted or reordered arithmetic would give other bytes than libggml's.
_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wno-psabi"),
]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


class NativeQuantizers(BuildHookInterface):
    """Builds the library in the source tree, where an editable install finds it, and packs it into a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        library = Path(self.root) / _SOURCES / _LIBRARY
        try:
            compile_library(Path(self.root) / _SOURCES, library)
        except OSError as exc:
            library.unlink(missing_ok=True)
            self.app.display_warning(
                f"step35: native quantizers were not built: {exc}; libggml's are used, about 10 times slower"
            )
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(f"/{_SOURCES}/{_LIBRARY}")


def compile_library(sources: Path, library: Path) -> None:
    """Compile the kernels once for each instruction set, and link them; OSError where that fails."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: neither c++, g++ nor clang++ is in PATH, and CXX is not set")
    with TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compile_kernels(lanes: int, flags: list[str]) -> str:
            out = str(Path(folder) / f"{lanes}.o")
            _run(compiler, *_FLAGS, *flags, f"-DLANES={lanes}", "-c", str(sources / "kernels.cpp"), "-o", out)
            return out

        objects = list(pool.map(compile_kernels, _widths().keys(), _widths().values()))
        # A process may run the old library, so its file must not be written into.
        linked = library.with_suffix(".new")
        _run(compiler, *_FLAGS, "-shared", str(sources / "dispatch.cpp"), *objects, "-o", str(linked))
        linked.replace(library)


def _widths() -> dict[int, list[str]]:
    """Blocks at once, and the flags of the instruction set that has vectors of so many."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {4: []}
    return {4: [], 8: ["-mavx2"], 16: ["-mavx2", *_AVX512]}


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
