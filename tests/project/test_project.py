"""The shape of the project: who imports whom, what an import costs, and that everything stands where it is looked for."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONVERTER, RUNTIME = ROOT / "converter" / "convert_step35", ROOT / "runtime" / "step35"


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names; a folder's `__init__` has the folder's name."""
    files = sorted(package.rglob("*.py"))
    return {
        ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


MODULES = modules(CONVERTER) | modules(RUNTIME)
HEAVY = ("torch", "transformers", "llama_cpp", "tokenizers", "safetensors")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield module
                yield from (f"{module}.{name.name}" for name in names)
            case ast.ImportFrom(level=level):
                raise AssertionError(f"{path}: a relative import, {'.' * level}")


def importers(folder: Path, package: str) -> list[str]:
    return sorted(
        path.stem for path in folder.rglob("*.py") if any(name.split(".")[0] == package for name in imports(path))
    )


def test_converter_and_runtime_do_not_know_each_other() -> None:
    """Their contract is the GGUF file and models.yaml."""
    assert importers(CONVERTER, "step35") == importers(RUNTIME, "convert_step35") == []


def test_one_module_of_the_runtime_imports_llama_cpp_and_none_of_the_converter() -> None:
    assert importers(RUNTIME, "llama_cpp") == ["library"]
    assert importers(CONVERTER, "llama_cpp") == []


@pytest.mark.parametrize("folder", [CONVERTER, RUNTIME])
def test_neither_package_needs_torch_or_transformers(folder: Path) -> None:
    assert [importers(folder, name) for name in ("torch", "transformers")] == [[], []]


def imported_modules(name: str) -> set[str]:
    """The modules of this project that a module imports anywhere in its text; never the face of a package beside its parts."""
    found = {imported for imported in imports(MODULES[name]) if imported in MODULES} - {name}
    return {imported for imported in found if not any(other.startswith(f"{imported}.") for other in found)}


@pytest.mark.parametrize("package", ["convert_step35", "step35"])
def test_no_imports_run_in_a_circle(package: str) -> None:
    """Between modules, imports inside functions and for types included."""
    graph = {name: imported_modules(name) for name in MODULES if name.split(".")[0] == package}
    assert sum(map(len, graph.values())) > 50
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"imports in a circle: {' -> '.join(exc.args[1])}")


FLOORS = {
    "convert_step35": (
        ("",),
        ("source",),
        ("gguf",),
        ("planning",),
        ("quantization",),
        ("reading",),
        ("writing",),
        ("inspection",),
        ("cli",),
    ),
    "step35": (
        ("",),
        ("native",),
        ("sampling", "planning"),
        ("drafting", "selftest"),
        ("engine", "backend"),
        ("chat",),
        ("llama",),
        ("server",),
        ("cli",),
    ),
}
"""The folders of each package from the ground up: a module imports from its own folder and from floors below."""


def folder_of(name: str) -> str:
    """The folder of a module, seen from its package; `llama` is none, yet stands where its users look for it."""
    _, *rest = name.split(".")
    is_folder = len(rest) > 1 or MODULES[name].name == "__init__.py"
    return rest[0] if rest and (is_folder or rest == ["llama"]) else ""


@pytest.mark.parametrize("name", sorted(MODULES.keys() - FLOORS.keys() - {f"{package}.__main__" for package in FLOORS}))
def test_imports_run_in_one_direction(name: str) -> None:
    """A module imports from its own folder, and from folders on floors below. A package's face may name all."""
    package, folder = name.split(".", maxsplit=1)[0], folder_of(name)
    floors = {folder: floor for floor, folders in enumerate(FLOORS[package]) for folder in folders}
    for imported in imported_modules(name) - {package}:
        assert folder_of(imported) == folder or floors[folder_of(imported)] < floors[folder], (
            f"{name} imports {imported}"
        )


def test_a_plan_touches_neither_disk_nor_library() -> None:
    """The pure core: from a shape and options to the place of every byte."""
    core = [
        *("convert_step35.errors", "convert_step35.sizes"),
        *("convert_step35.source.architecture", "convert_step35.source.mapping", "convert_step35.source.rope_freqs"),
        *("convert_step35.gguf.ggml_types", "convert_step35.gguf.header", "convert_step35.gguf.shard_names"),
        *("convert_step35.gguf.metadata", *(name for name in MODULES if name.startswith("convert_step35.planning."))),
    ]
    assert len(core) > 12
    assert [name for name in core if {"os", "ctypes", "tempfile", "shutil", "io"} & set(imports(MODULES[name]))] == []


def loaded(module: str) -> set[str]:
    """The top-level modules in a fresh process that has imported one."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_converter_loads_no_heavy_library() -> None:
    assert loaded("convert_step35.cli") & set(HEAVY) == set()


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if not name.endswith("__main__")])
def test_every_module_says_in_a_line_what_it_is_for(name: str) -> None:
    first = (ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or "").splitlines()[0]
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
    expected = {
        "converter",
        "runtime",
        "patches",
        "tests",
        "docs",
        "bench",
        "models.yaml",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "CHANGELOG.md",
        "Makefile",
        ".ci",
    }
    assert {name for name in expected if not (ROOT / name).exists()} == set()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_no_folder_of_tests_is_a_package() -> None:
    """A tests/converter/__init__.py would shadow a package."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
