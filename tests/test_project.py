"""The shape of the project: who imports whom, what an import costs, and that everything stands where it is looked for."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONVERTER, RUNTIME = ROOT / "converter" / "convert_step35", ROOT / "runtime" / "step35"
MODULES = sorted(path.stem for path in CONVERTER.glob("*.py"))
HEAVY = ("torch", "transformers", "llama_cpp", "tokenizers", "safetensors")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield module
                yield from (f"{module}.{name.name}" for name in names)
            case ast.ImportFrom(level=level):
                raise AssertionError(f"{path}: a relative import, {'.' * level}")


def importers(folder: Path, package: str) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*.py") if any(name.split(".")[0] == package for name in imports(path)))


def test_converter_and_runtime_do_not_know_each_other() -> None:
    """Their contract is the GGUF file and models.yaml."""
    assert importers(CONVERTER, "step35") == importers(RUNTIME, "convert_step35") == []


def test_one_module_of_the_runtime_imports_llama_cpp_and_none_of_the_converter() -> None:
    assert importers(RUNTIME, "llama_cpp") == ["native"]
    assert importers(CONVERTER, "llama_cpp") == []


@pytest.mark.parametrize("folder", [CONVERTER, RUNTIME])
def test_neither_package_needs_torch_or_transformers(folder: Path) -> None:
    assert [importers(folder, name) for name in ("torch", "transformers")] == [[], []]


def test_the_imports_of_the_converter_have_no_cycle() -> None:
    graph = {name: {n.split(".")[1] for n in imports(CONVERTER / f"{name}.py") if n.startswith("convert_step35.") and n.split(".")[1] in MODULES} for name in MODULES}
    assert sum(map(len, graph.values())) > 50
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"imports in a circle: {' -> '.join(exc.args[1])}")


def test_a_plan_touches_neither_disk_nor_library() -> None:
    """The pure core: from a shape and wishes to the place of every byte."""
    core = ("architecture", "chunks", "errors", "gguf_header", "mapping", "metadata", "plan", "presets", "recipes", "sizes")
    assert [name for name in core if {"os", "ctypes", "tempfile", "shutil", "io"} & set(imports(CONVERTER / f"{name}.py"))] == []


def loaded(module: str) -> set[str]:
    """The top-level modules in a fresh process that has imported one."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_converter_loads_no_heavy_library() -> None:
    assert loaded("convert_step35.cli") & set(HEAVY) == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_every_module_says_in_a_line_what_it_is_for(name: str) -> None:
    first = import_module(f"convert_step35.{name}").__doc__.splitlines()[0]
    assert 20 < len(first) <= 120 and first.endswith((".", ":"))


def test_the_console_commands_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"convert-step35": "convert_step35.cli:main", "step35": "step35.cli:main"}
    installed = {point.name: point for point in entry_points(group="console_scripts") if point.name in scripts}
    assert installed.keys() == scripts.keys() and all(callable(point.load()) for point in installed.values())


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "convert_step35", "--version"], capture_output=True, text=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"convert-step35, version {version}\n", "")


def test_what_a_reader_looks_for_is_at_the_top() -> None:
    expected = {"converter", "runtime", "patches", "tests", "docs", "bench", "models.yaml", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci"}
    assert {name for name in expected if not (ROOT / name).exists()} == set()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_tests_are_flat() -> None:
    """A tests/converter/__init__.py would shadow a package."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
