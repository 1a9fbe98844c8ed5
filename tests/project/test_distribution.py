"""What is published: the sdist holds all that a build needs, and the wheel made of it works in an empty environment."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "converter" / "convert_step35", ROOT / "runtime" / "step35")
NATIVE = "convert_step35/quantization/native/"
LIBRARIES = (".so", ".dylib", ".dll")
pytestmark = pytest.mark.slow
HAS_COMPILER = bool(os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++"))))


def run(*command: str | Path, compiler: str | None = None) -> str:
    """What a command prints; it sees the modules of its own environment only."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if compiler is not None:
        variables["CXX"] = compiler
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, compiler: str | None = None) -> None:
    """Run pip without a look at any registry."""
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", *arguments, *offline, compiler=compiler)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    return next(folder.glob("*.tar.gz"))


def built(sdist: Path, folder: Path, compiler: str | None = None) -> Path:
    """The wheel that pip makes of the sdist."""
    pip("wheel", sdist, "--no-build-isolation", "--wheel-dir", folder, compiler=compiler)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine without a compiler."""
    return built(sdist, tmp_path_factory.mktemp("pure-wheel"), compiler="no-such-compiler")


def installed(wheel: Path, folder: Path) -> Path:
    """The folder of the commands in a new environment with this wheel.

    Its dependencies are those of the environment that runs the tests, so that none is downloaded again. Pip must not
    see them: they hold this project too.
    """
    venv.create(folder)
    pip("--python", folder, "install", wheel)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    own = Path(run(commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "dependencies.pth").write_text("\n".join(shared))
    return commands


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("installed"))


def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(next(name for name in names(wheel) if name.endswith("/METADATA"))))


def files_of(*folders: Path) -> Iterator[Path]:
    """The files of a checkout under these folders, without what Python and the compiler leave there."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", *LIBRARIES):
                yield path


def test_the_sdist_holds_all_that_a_build_needs_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    top = ("pyproject.toml", "hatch_build.py", "models.yaml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md")
    wanted = {path.relative_to(ROOT).as_posix() for path in files_of(*PACKAGES, ROOT / "patches")}
    assert {*top, *wanted} - found == set()
    assert [name for name in found if name.endswith((".pyc", ".gguf", *LIBRARIES)) or name.startswith(".venv")] == []


def test_the_wheel_holds_both_packages_file_by_file(pure_wheel: Path) -> None:
    expected = {path.relative_to(package.parent).as_posix() for package in PACKAGES for path in files_of(package)}
    patches = {f"step35-patches/{path.relative_to(ROOT / 'patches').as_posix()}" for path in files_of(ROOT / "patches")}
    found = {name for name in names(pure_wheel) if ".dist-info/" not in name}
    assert found == expected | patches | {"step35-models.yaml"}
    assert {"step35/server/http/page.html", "step35/selftest/known_logits.json"} <= found


def test_the_wheel_holds_the_licenses_of_this_project_and_of_what_it_restates(pure_wheel: Path) -> None:
    assert metadata(pure_wheel).get_all("License-File") == ["LICENSE", "NOTICE"]
    licenses = {Path(name).name: name for name in names(pure_wheel) if "/licenses/" in name}
    with ZipFile(pure_wheel) as archive:
        assert "Apache License" in archive.read(licenses["LICENSE"]).decode()
        assert "Copyright (c) 2023-2026 The ggml authors" in archive.read(licenses["NOTICE"]).decode()


def test_what_only_tests_import_is_no_dependency(pure_wheel: Path) -> None:
    required = [line for line in metadata(pure_wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line for line in required if line.startswith(("safetensors", "torch", "transformers", "hatchling"))] == []


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_wheel_holds_the_native_quantizers_where_a_compiler_is(wheel: Path, pure_wheel: Path) -> None:
    native = {name for name in names(wheel) - names(pure_wheel) if ".dist-info/" not in name}
    assert len(native) == 1 and native.pop().startswith(NATIVE)
    assert "py3-none-any" not in wheel.name and "py3-none-any" in pure_wheel.name


def assert_commands_run(commands: Path, version: str) -> None:
    """Every command starts, and finds models.yaml beside its package."""
    assert run(commands / "convert-step35", "--version") == f"convert-step35, version {version}\n"
    assert run(commands / "step35", "--version") == f"step35, version {version}\n"
    assert "MOE_IQ4_XS" in run(commands / "convert-step35", "recipes")
    code = "import convert_step35, step35; print(convert_step35.__file__, step35.__file__)"
    assert all(path.startswith(str(commands.parent)) for path in run(commands / "python", "-c", code).split())


def notes_on_quantizers(commands: Path) -> str:
    code = "from convert_step35.quantization.quantizers import load_quantizers; print(*load_quantizers().notes, end='')"
    return run(commands / "python", "-c", code)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_commands_run_with_native_quantizers_in_an_empty_environment(wheel: Path, commands: Path) -> None:
    assert_commands_run(commands, metadata(wheel)["Version"])
    assert notes_on_quantizers(commands) == ""


def test_the_commands_run_without_a_compiler_too(pure_wheel: Path, tmp_path: Path) -> None:
    commands = installed(pure_wheel, tmp_path)
    assert_commands_run(commands, metadata(pure_wheel)["Version"])
    assert "no native quantizers" in notes_on_quantizers(commands)
