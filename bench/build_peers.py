"""Builds llama-server and llama-bench from the pinned llama-cpp-python's own llama.cpp sources.

pip fetches the sdist (its digest is checked), cmake builds the two programs as pip builds the wheel: a
Release build for this machine's processor. Ten minutes on two cores, once; the result stays in .cache/.
llama-cpp-python's own server is a script in the sdist; pip fetches the packages that only it needs.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import click
import llama_cpp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]  # the tests' pin of upstream

import upstream

HOME = ROOT / ".cache" / "peers" / upstream.VERSION
PYTHON_PACKAGES = HOME / "python"
PROGRAMS = ("llama-server", "llama-bench")
# What the wheel's build sets or leaves at its default, and none of the web interface.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def program(name: str) -> Path:
    """Returns the path of a built program; builds it on the first call."""
    path = HOME / "build" / "bin" / name
    if not path.is_file():
        build()
    return path


def python_server() -> Path:
    """Returns llama-cpp-python's server; its packages lie in PYTHON_PACKAGES, for its PYTHONPATH."""
    _sources()
    if not PYTHON_PACKAGES.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PYTHON_PACKAGES)]
        subprocess.run([*command, "fastapi", "websockets"], check=True)
    return HOME / f"llama_cpp_python-{upstream.VERSION}" / "examples" / "server" / "server.py"


def environment() -> dict[str, str]:
    """Returns the environment that makes the programs load the wheel's libraries: the same kernels as ours."""
    return os.environ | {"LD_LIBRARY_PATH": str(Path(llama_cpp.__file__).parent / "lib")}


def build() -> None:
    """Fetches, configures and builds; a build that was cut short goes on."""
    build_folder = HOME / "build"
    configure = ["cmake", "-S", str(_sources()), "-B", str(build_folder), *OPTIONS]
    subprocess.run(configure, check=True)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run(["cmake", "--build", str(build_folder), "--parallel", jobs, "--target", *PROGRAMS], check=True)


def _sources() -> Path:
    """Returns llama.cpp's sources, unpacked on the first call."""
    folder = HOME / f"llama_cpp_python-{upstream.VERSION}"
    if not folder.is_dir():
        HOME.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOME) as work:
            with tarfile.open(upstream.sdist()) as archive:
                archive.extractall(work, filter="data")
            (Path(work) / folder.name).rename(folder)
    return folder / "vendor" / "llama.cpp"


@click.command(help=__doc__)
def main() -> None:
    build()
    for name in PROGRAMS:
        click.echo(program(name))


if __name__ == "__main__":
    main()
