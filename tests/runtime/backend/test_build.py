"""Making a build, with a cmake of the tests' making: nothing half-made is taken for whole, and a failure is one line."""

import hashlib
import io
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from step35.backend.build import Wanted, build, jobs_for
from step35.backend.flags import BuildHost
from step35.backend.processes import first_error
from step35.backend.sources import cache_folder
from step35.backend.upstream import check, read_upstream
from step35.errors import BackendError
from step35.native import builds

CPU = Wanted()
FAKE_CMAKE = f"""#!{sys.executable}
import os, pathlib, sys, time
arguments = sys.argv[1:]
home = pathlib.Path(__file__).parent
with open(home / "calls", "a") as calls:
    print(*arguments, file=calls)
if "--build" not in arguments:
    pathlib.Path(arguments[arguments.index("-B") + 1]).mkdir(exist_ok=True)
    sys.exit()
out = pathlib.Path(arguments[arguments.index("--build") + 1]) / "bin"
out.mkdir(exist_ok=True)
(out / "half.o").write_text("half")
print("[ 50%] Building CXX object one.cpp.o", flush=True)
while (home / "hang").exists():
    time.sleep(0.02)
if (home / "fail").exists():
    print("one.cpp:3:1: error: expected ';'")
    sys.exit(2)
(out / "libllama.so.0").write_text("library")
if not (out / "libllama.so").is_symlink():
    (out / "libllama.so").symlink_to("libllama.so.0")
(out / "ggml-rpc-server").write_text("server")
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pin of a small sdist, an empty series and a fake cmake; the user's folders are in it, too."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sdist = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("src/llama.cpp", ".git"):
            entry = tarfile.TarInfo(f"llama_cpp_python-0.3.36/vendor/llama.cpp/{name}")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"code"))
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    patches = tmp_path / "patches"
    (patches / "src").mkdir(parents=True)
    (patches / "src" / "step35.cmake").write_text("# links it")
    (patches / "series").write_text("")
    (patches / "UPSTREAM").write_text(f"llama-cpp-python: 0.3.36\nsdist-sha256: {digest}\nllama.cpp: 0c1e57098\n")
    (tmp_path / "cmake").write_text(FAKE_CMAKE)
    (tmp_path / "cmake").chmod(0o755)
    return tmp_path


def make(bench: Path, wanted: Wanted = CPU, test=lambda folder: "well", said: list[str] | None = None) -> builds.Build:
    box = BuildHost("Linux", lambda name: str(bench / "cmake") if name == "cmake" else None, {})
    wanted = replace(wanted, sdist=bench / "llama_cpp_python-0.3.36.tar.gz")
    return build(wanted, box, bench / "patches", (said if said is not None else []).append, test)


def calls(bench: Path) -> list[str]:
    return (bench / "calls").read_text().splitlines()


def test_a_build_has_libraries_server_and_manifest_and_leaves_no_work(bench: Path) -> None:
    said: list[str] = []
    made = make(bench, said=said)
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "backend.json",
        "libllama.so",
        "libllama.so.0",
        "rpc-server",
    ]
    assert (made.folder / "libllama.so").is_symlink()
    assert builds.builds() == [made]
    assert made.name.startswith("0.3.36-cpu-")
    assert [path.name for path in cache_folder().iterdir()] == [f"{made.name}.lock"]
    assert said[-1] == "self-test: well"


def test_the_same_build_is_not_made_twice(bench: Path) -> None:
    made, said = make(bench), []
    assert make(bench, said=said) == made
    assert said == [f"{made.name} is there already"]
    assert len(calls(bench)) == 2


def test_cmake_gets_our_sources_and_builds_only_what_is_used(bench: Path) -> None:
    made = make(bench)
    configure, compile_ = calls(bench)
    work = cache_folder() / made.name
    assert f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={work}/src/step35.cmake" in configure
    assert f"-DSTEP35_BUILD=0.3.36 0c1e57098 {made.name}" in configure
    assert "-DGGML_RPC=ON" in configure
    assert compile_.endswith("--target llama ggml-rpc-server")


def test_patches_flags_and_sources_each_make_another_build(bench: Path) -> None:
    names = [make(bench).name, make(bench, Wanted(extra={"GGML_OPENMP": "OFF"})).name]
    (bench / "patches" / "src" / "more.cpp").write_text("int more;")
    names.append(make(bench).name)
    assert len(set(names)) == len(builds.builds()) == 3


def test_a_failed_compilation_is_one_line_and_the_same_command_goes_on(bench: Path) -> None:
    (bench / "fail").touch()
    with pytest.raises(
        BackendError, match=r"cmake failed: one\.cpp:3:1: error: expected ';'; all of its output: .*build\.log$"
    ):
        make(bench)
    assert builds.builds() == []
    (bench / "fail").unlink()
    made = make(bench)
    assert not (made.folder / "half.o").exists()
    assert builds.builds() == [made]


def test_a_build_that_computes_something_else_gets_no_name(bench: Path) -> None:
    def bad(folder: Path) -> str:
        assert (folder / "libllama.so").exists()
        raise BackendError("the build computes something else")

    with pytest.raises(BackendError, match="something else"):
        make(bench, test=bad)
    assert builds.builds() == []


CHILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
sys.path.insert(0, sys.argv[1])
from test_build import make
make(Path(sys.argv[2]))
"""


def start(bench: Path) -> subprocess.Popen[bytes]:
    """Starts a build in a process of its own and waits until it compiles."""
    (bench / "hang").touch()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(bench)])
    while not list(cache_folder().glob("*/build/bin/half.o")):
        assert child.poll() is None
        time.sleep(0.02)
    return child


def test_a_second_build_of_the_same_waits_for_nobody(bench: Path) -> None:
    with start(bench) as child:
        with pytest.raises(BackendError, match="is being built by another process"):
            make(bench)
        (bench / "hang").unlink()
        assert child.wait(60) == 0
    assert len(builds.builds()) == 1


def test_a_killed_build_leaves_nothing_and_its_half_objects_are_not_used(bench: Path) -> None:
    """Whoever is killed had no time to stop its compilers: the next run waits for them, and then starts anew."""
    with start(bench) as child:
        child.kill()
    assert builds.builds() == []
    with pytest.raises(BackendError, match="is being built by another process"):
        make(bench)
    (bench / "hang").unlink()
    half = next(cache_folder().glob("*/build/bin/half.o"))
    half.with_name("stale.o").write_text("from before")
    made = _retried(bench)
    assert builds.builds() == [made]
    assert not half.with_name("stale.o").exists()


def _retried(bench: Path) -> builds.Build:
    for _ in range(500):
        try:
            return make(bench)
        except BackendError as error:
            if "another process" not in str(error):
                raise
            time.sleep(0.02)
    raise AssertionError("the compilers of a killed build never ended")


@pytest.mark.slow
def test_ctrl_c_stops_the_compilers_and_what_is_done_stays(bench: Path) -> None:
    with start(bench) as child:
        kept = next(cache_folder().glob("*/build/bin/half.o")).with_name("done.o")
        kept.write_text("done")
        child.send_signal(signal.SIGINT)
    assert builds.builds() == []
    (bench / "hang").unlink()
    said: list[str] = []
    seen: list[bool] = []
    make(bench, test=lambda folder: str(seen.append(kept.exists())), said=said)
    assert seen == [True]
    assert not any("unpacking" in line for line in said)


def test_compilers_for_gpus_are_as_many_as_the_memory_holds() -> None:
    gib = 2**30
    assert jobs_for("cpu", 16, 4 * gib) == 16
    assert jobs_for("cuda", 20, 118 * gib) == 20
    assert jobs_for("cuda", 16, 10 * gib) == 3
    assert jobs_for("rocm", 16, gib) == 1
    assert jobs_for("cuda", 16, None) == 16  # unknown
    assert jobs_for("cuda", 16, 0) == 1


# the sources


def test_another_sdist_is_refused_with_both_digests(bench: Path) -> None:
    pin, sdist = read_upstream(bench / "patches"), bench / "llama_cpp_python-0.3.36.tar.gz"
    check(pin, sdist)
    sdist.write_bytes(b"something else")
    with pytest.raises(BackendError, match=f"expected llama-cpp-python 0.3.36 with sha256 {pin.sha256}, got "):
        make(bench)
    with pytest.raises(BackendError, match="can't read the sdist: .*gone.tar.gz: No such file"):
        check(pin, bench / "gone.tar.gz")


def test_without_cmake_it_is_said_where_to_get_one(bench: Path) -> None:
    box = BuildHost("Linux", lambda name: None, {})
    with pytest.raises(BackendError, match="no cmake: .*; pip install cmake"):
        build(Wanted(), box, bench / "patches", print)
    assert not cache_folder().exists()


def test_the_first_error_of_a_log_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("-- ok\nCMake Error at CMakeLists.txt:3 (find_package):\n  Could not find hip\n-- errors\n")
    assert first_error(log) == "CMake Error at CMakeLists.txt:3 (find_package): Could not find hip"
    log.write_text(
        "-- Warning: NCCL not found, an error for some\nCMake Error at a/CMakeLists.txt:178 (target_link_libraries):\n"
        '  Target "ggml-cuda" links to:\n\n    CUDA::cublas\n\n  but the target was not found.\n\n'
        "Call Stack (most recent call first):\n  CMakeLists.txt:3 (include)\n\n\n-- Configuring incomplete\n"
    )
    want = 'CMake Error at a/CMakeLists.txt:178 (target_link_libraries): Target "ggml-cuda" links to: CUDA::cublas '
    want += "but the target was not found."
    assert first_error(log) == want
    log.write_text("CMake Error: the source directory is gone\n" + 99 * "  more\n")
    assert first_error(log) == "CMake Error: the source directory is gone" + 23 * " more"
    log.write_text("[ 3%] x\n/usr/bin/ld: cannot find -lcuda\ncollect2: error: ld returned 1\n")
    assert first_error(log) == "/usr/bin/ld: cannot find -lcuda"
    log.write_text("a\nb\n")
    assert first_error(log) == "b"
    log.write_text("")
    assert first_error(log) == "no output"
