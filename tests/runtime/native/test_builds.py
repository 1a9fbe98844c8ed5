"""Builds are listed, chosen and removed; what is gone, damaged or of another version is one line with the remedy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from step35.errors import BackendError
from step35.native import builds
from step35.native.builds import Build
from step35.native.chosen_build import VARIABLE, check_identity, chosen_libraries

BUILD = Build("0.3.36-cpu-0123abcd", "0.3.36", "0c1e57098", "cpu", "", [], {"GGML_RPC": "ON"}, "2026-11-25")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "step35" / "backends"


def make(build: Build = BUILD) -> Path:
    build.folder.mkdir(parents=True)
    builds.write(build, build.folder)
    return build.folder


def step35(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "step35.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


def test_without_any_build_the_stock_one_runs() -> None:
    assert builds.builds() == []
    assert builds.chosen() is None
    assert inside({}) == {}


def inside(environment: dict[str, str]) -> dict[str, str]:
    """Returns the environment in which llama_cpp is imported."""
    before = dict(environment)
    with chosen_libraries("0.3.36", environment):
        seen = dict(environment)
    assert environment == before  # other programs that this process starts are not concerned
    return seen


def test_a_chosen_build_is_where_llama_cpp_looks() -> None:
    folder = make()
    builds.use(BUILD.name)
    assert inside({}) == {VARIABLE: str(folder)}


def test_the_users_own_variable_wins() -> None:
    make()
    builds.use(BUILD.name)
    assert inside({VARIABLE: "/mine"}) == {VARIABLE: "/mine"}


def test_a_build_goes_and_the_stock_one_is_chosen() -> None:
    folder = make()
    builds.use(BUILD.name)
    builds.remove(BUILD.name)
    assert not folder.exists()
    assert builds.chosen() is None


def test_a_folder_that_is_being_made_or_removed_is_no_build(home: Path) -> None:
    make()
    (home / f"{builds.PARTIAL}0.3.36-cpu-ffffffff").mkdir()
    assert [build.name for build in builds.builds()] == [BUILD.name]
    with pytest.raises(BackendError, match="no such backend"):
        builds.use(f"{builds.PARTIAL}0.3.36-cpu-ffffffff")


@pytest.mark.parametrize("name", ["nonsense", "../backends", "", "."])
def test_an_unknown_name_is_told_the_known_ones(name: str) -> None:
    make()
    for change in (builds.use, builds.remove):
        with pytest.raises(BackendError, match=f"expected one of stock, {BUILD.name}, got {name!r}"):
            change(name)


def test_the_stock_one_is_not_removed() -> None:
    with pytest.raises(BackendError, match="no such backend"):
        builds.remove(builds.STOCK)


def test_a_build_of_another_version_is_refused_before_it_is_loaded() -> None:
    make(replace(BUILD, version="0.3.35"))
    builds.use(BUILD.name)
    with pytest.raises(BackendError, match=r"expected llama-cpp-python 0\.3\.36, got 0\.3\.35; step35 backend build"):
        inside({})


def test_a_library_of_another_version_is_refused_wherever_it_lies() -> None:
    check_identity(BUILD.folder, "", "0.3.36")
    check_identity(BUILD.folder, "0.3.36 0c1e57098 0.3.36-cpu-0123abcd", "0.3.36")
    with pytest.raises(BackendError, match=r"expected llama-cpp-python 0\.3\.37, got 0\.3\.36"):
        check_identity(BUILD.folder, "0.3.36 0c1e57098 0.3.36-cpu-0123abcd", "0.3.37")


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"name": "x"})])
def test_a_damaged_manifest_is_one_line(text: str) -> None:
    folder = make()
    (folder / builds.MANIFEST).write_text(text)
    builds._choice().write_text(BUILD.name)
    with pytest.raises(BackendError, match="not a build of step35's.*step35 backend remove") as caught:
        builds.chosen()
    assert "\n" not in str(caught.value)


# as a user meets it


@pytest.mark.slow
def test_the_commands_list_use_and_remove() -> None:
    make()
    assert step35("backend", "use", BUILD.name).returncode == 0
    listed = step35("backend", "list").stdout
    assert listed == (
        f"  stock  llama-cpp-python's own\n* {BUILD.name}  cpu, no patches, llama.cpp 0c1e57098, built 2026-11-25\n"
    )
    assert step35("backend", "remove", BUILD.name).returncode == 0
    assert step35("backend", "list").stdout == "* stock  llama-cpp-python's own\n"


RUN = ["generate", "x.gguf", "-p", "x", "--ngl", "0"]


def refused(*command: str, **environment: str) -> str:
    """Returns what generate says in its one line, which doctor finds as well."""
    done, doctor = step35(*(command or RUN), **environment), step35("doctor", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    said = done.stderr.removeprefix("step35: error: ").rstrip("\n")
    assert doctor.returncode == 1
    assert doctor.stdout.startswith(f"BAD  llama-cpp-python: {said}\n"), doctor.stderr
    return said


@pytest.mark.slow
def test_a_chosen_build_that_is_gone_is_one_line(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "chosen").write_text("0.3.36-cpu-gone\n")
    said = refused()
    assert said.startswith(f"the chosen backend is gone: expected {home}/0.3.36-cpu-gone; ")
    assert said.endswith("step35 backend use stock does without")
    assert "gone; step35 backend use stock" in step35("backend", "list").stdout


@pytest.mark.slow
def test_a_chosen_build_that_does_not_load_is_one_line() -> None:
    folder = make()
    (folder / "libllama.so").write_bytes(b"not a library")
    builds.use(BUILD.name)
    said = refused()
    assert said.startswith(f"can't load llama.cpp from {folder}: ")
    assert f"step35 backend remove {BUILD.name} and build it again" in said


@pytest.mark.slow
def test_a_variable_that_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    assert f"unset {VARIABLE}" in refused(**{VARIABLE: str(tmp_path)})


def test_without_a_build_there_is_no_rpc_server() -> None:
    done = step35("rpc-server")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "step35: error: no rpc-server: the stock llama-cpp-python has none; step35 backend build"
    )
