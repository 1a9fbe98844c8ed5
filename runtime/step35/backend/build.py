"""Makes a build: sources, patches, cmake, self-test, and only then its name.

Cut short at any time it leaves nothing that is taken for whole; the same command goes on where that is safe.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from step35.backend import series, upstream
from step35.backend.check import self_test
from step35.backend.flags import BuildHost, Flags, flags_for
from step35.backend.processes import run_logged
from step35.backend.requirements import check_requirements
from step35.backend.sources import cache_folder, pristine
from step35.errors import BackendError
from step35.native import builds
from step35.native.builds import Build
from step35.planning import hardware

LIBRARIES = ("llama", "ggml-rpc-server")
"""The targets: libllama with all of ggml, and the server for a second box."""
GPU_COMPILER_BYTES = 3 * 2**30
"""Room for one nvcc or hipcc: twenty of them may fill a box that has cores and little memory."""
SHADER_S = 60
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be built, and how."""

    target: str = ""
    """One of flags.TARGETS; "" for what the stock wheel is on this system."""
    architectures: Sequence[str] = ()
    extra: Mapping[str, str] | None = None
    """More definitions for cmake."""
    sdist: Path | None = None
    n_jobs: int = 0
    """Compilers at a time; 0 = the cores."""


def this_box() -> BuildHost:
    """Returns the box that this runs on."""
    return BuildHost(platform.system(), shutil.which, os.environ, _read, _compile_shader, hardware.may_open)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _compile_shader(glslc: str, source: str) -> str:
    """Returns glslc's errors; "" where it says nothing or can't be run: cmake meets that again."""
    command = [glslc, "-o", "-", "-fshader-stage=compute", "--target-env=vulkan1.3", "-"]
    try:
        done = subprocess.run(command, check=False, input=source.encode(), capture_output=True, timeout=SHADER_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stderr.decode(errors="replace")


def build(wanted: Wanted, box: BuildHost, patches: Path, say: Say, test: Callable[[Path], str] = self_test) -> Build:
    """Makes the wanted build unless it is there already, and returns it; raises BackendError on any failure."""
    if box.system == "Windows":
        raise BackendError("step35 backend build doesn't run on Windows; use WSL, or the stock wheel")
    pin, patch_list = upstream.read_upstream(patches), series.read_series(patches)
    flags = flags_for(wanted.target, wanted.architectures, wanted.extra or {}, box)
    made = _named(pin, patch_list, patches / "src", flags)
    if made.folder.is_dir():
        say(f"{made.name} is there already")
        return builds.read(made.folder)
    for note in check_requirements(flags.target, wanted.extra or {}, box):
        say(note)
    cmake = find_cmake(box)
    with _locked(made.name) as workplace:
        _prepare(workplace.folder, patches, patch_list, wanted.sdist, say)
        _compile(workplace, cmake, made, flags, wanted.n_jobs or _jobs_here(flags.target), say)
        _finish(workplace.folder, made, say, test)
        shutil.rmtree(workplace.folder, ignore_errors=True)
    return made


def _named(pin: upstream.Upstream, patch_list: list[series.Patch], src: Path, flags: Flags) -> Build:
    """Returns the build that these inputs make; its name holds a digest of all of them."""
    parts = [pin.sha256, *(patch.text for patch in patch_list), json.dumps(flags.definitions, sort_keys=True)]
    parts += [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(src.iterdir()) if path.is_file()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    archs = "-".join(re.findall(r"[a-z0-9]+", flags.architectures.replace("-real", "")))
    name = "-".join(filter(None, [pin.version, flags.target, archs, digest[:8]]))
    today = datetime.now(UTC).date().isoformat()
    names = [patch.name for patch in patch_list]
    return Build(name, pin.version, pin.commit, flags.target, flags.architectures, names, flags.definitions, today)


def find_cmake(box: BuildHost) -> str:
    """Returns cmake's path: in PATH, or of pip's cmake package beside this Python."""
    found = box.which("cmake") or box.which(str(Path(sys.executable).parent / "cmake"))
    if not found:
        raise BackendError(
            "no cmake: expected it in PATH or beside this Python; pip install cmake, or install your system's"
        )
    return found


def _jobs_here(target: str) -> int:
    sources = hardware.this_box()
    memory = hardware.ram(sources)
    return jobs_for(target, sources.n_cpus, None if memory is None else memory.available)


def jobs_for(target: str, n_cores: int, available: int | None) -> int:
    """Returns how many compilers run at a time: the cores, but those for GPUs only as many as the memory has room for.

    `available` is None where it is unknown.
    """
    if target not in ("cuda", "rocm") or available is None:
        return n_cores
    return max(1, min(n_cores, available // GPU_COMPILER_BYTES))


@dataclass(frozen=True, slots=True)
class _Workplace:
    folder: Path
    lock: int
    """A file descriptor; compilers inherit it, so that none of a killed run works beside the next."""


@contextmanager
def _locked(name: str) -> Iterator[_Workplace]:
    """Yields the place to work in, and keeps a second build of the same name out of it."""
    import fcntl

    work = cache_folder() / name
    work.mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BackendError(f"{name} is being built by another process; wait for it") from error
        yield _Workplace(work, lock.fileno())


# the steps


def _prepare(work: Path, patches: Path, patch_list: list[series.Patch], sdist: Path | None, say: Say) -> None:
    """Makes work/llama.cpp, which appears with all patches in it, and work/src."""
    tree, new = work / "llama.cpp", work / "new"
    shutil.rmtree(work / "src", ignore_errors=True)
    shutil.copytree(patches / "src", work / "src")
    if tree.is_dir():
        return
    shutil.rmtree(new, ignore_errors=True)
    say("unpacking llama.cpp's sources" if sdist else "fetching llama.cpp's sources with pip, 77 MB")
    pristine(upstream.read_upstream(patches), new, sdist)
    for name in series.apply(patch_list, new):
        say(f"applied {name}")
    new.rename(tree)


def _compile(place: _Workplace, cmake: str, made: Build, flags: Flags, n_jobs: int, say: Say) -> None:
    """Configures and builds; after a run that was killed, from the start."""
    work, out, unclean = place.folder, place.folder / "build", place.folder / "unclean"
    if unclean.exists():  # killed, or the power went: a compiler's output may be half of one
        shutil.rmtree(out, ignore_errors=True)
    unclean.touch()
    try:
        # ccache, where there is one, then takes objects of another build's folder; and no repository around this one
        # is asked for llama.cpp's commit
        own = {"CCACHE_BASEDIR": str(work), "GIT_CEILING_DIRECTORIES": str(work)}
        environment = own | dict(os.environ) | flags.environment
        say(f"configuring {made.name}")
        run_logged(configure(cmake, work, made, flags), work / "configure.log", environment, place.lock, say)
        say(f"compiling with {n_jobs} jobs; Ctrl-C stops it, and the same command goes on")
        command = [cmake, "--build", str(out), "--parallel", str(n_jobs), "--target", *LIBRARIES]
        run_logged(command, work / "build.log", environment, place.lock, say)
    finally:
        unclean.unlink()


def configure(cmake: str, work: Path, made: Build, flags: Flags) -> list[str]:
    """Returns the command that configures work/build."""
    own = {
        "LLAMA_BUILD_COMMIT": made.commit,
        "LLAMA_BUILD_NUMBER": "0",
        "CMAKE_PROJECT_llama.cpp_INCLUDE": str(work / "src" / "step35.cmake"),
        "STEP35_BUILD": f"{made.version} {made.commit} {made.name}",
    }
    definitions = made.definitions | own | flags.toolchain
    command = [cmake, "-S", str(work / "llama.cpp"), "-B", str(work / "build")]
    return [*command, *(f"-D{name}={value}" for name, value in definitions.items())]


def _finish(work: Path, made: Build, say: Say, test: Callable[[Path], str]) -> None:
    """Puts the libraries into a folder, tests them there, and gives it its name."""
    builds.home().mkdir(parents=True, exist_ok=True)
    partial = builds.home() / f"{builds.PARTIAL}{made.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    binaries = work / "build" / "bin"
    for path in sorted([*binaries.glob("lib*.so*"), *binaries.glob("lib*.dylib"), *binaries.glob("*.metallib")]):
        shutil.copy2(path, partial / path.name, follow_symlinks=False)
    shutil.copy2(binaries / "ggml-rpc-server", partial / builds.SERVER)
    builds.write(made, partial)
    say(f"self-test: {test(partial)}")
    for path in partial.iterdir():
        _sync(path)
    partial.rename(made.folder)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
