"""The runtime's shape: light imports, one module over llama_cpp, pure parts that stay pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import step35

PACKAGE = Path(step35.__file__).parent
PURE = [
    "drafting.acceptance",
    "drafting.decode_costs",
    "drafting.depth_controller",
    "drafting.draft_round",
    "errors",
    "drafting.hidden_ring",
    "drafting.prompt_lookup",
    "options",
    "choices",
    "row_counts",
    "native.rows",
    "sampling.sampler",
    "engine.prefix",
    "engine.detokenize",
]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_one_module_imports_llama_cpp():
    users = {
        path.stem for path in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "llama_cpp" for n in imports_of(path))
    }
    assert users == {"library"}


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_knows_no_clock_no_disk_and_no_model(name):
    allowed = {
        "bisect",
        "codecs",
        "collections",
        "collections.abc",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "numpy",
        "operator",
        "pathlib",
        "typing",
    }
    allowed |= {f"step35.{pure}" for pure in PURE}
    assert imports_of(PACKAGE / f"{name.replace('.', '/')}.py") <= allowed


def test_the_converter_is_not_imported():
    assert not any("convert_step35" in n for path in PACKAGE.rglob("*.py") for n in imports_of(path))


def test_importing_step35_is_light():
    code = "import sys, step35; print([m for m in ('numpy', 'llama_cpp', 'click') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_exported_name_exists():
    for name in step35.__all__:
        assert getattr(step35, name).__name__ == name


def test_a_missing_symbol_is_named():
    """An unstable symbol that a llama.cpp build lacks is reported by its name, with the pinned version."""
    from step35.errors import NativeError
    from step35.native import library

    with pytest.raises(NativeError, match=r"libllama lacks llama_nonesuch .*llama-cpp-python==0\.3\.36"):
        library.bind("llama_nonesuch", "_Z14llama_nonesuchv", [], None)


INSIDE_AN_ENGINE = {"trunk", "drafter", "model"}


def reached_inside(path: Path) -> list[str]:
    """Where a file reaches through an engine: its own options' `model` is a path, a request's a name."""
    reached = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in INSIDE_AN_ENGINE
    ]
    return [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in reached
        if node.attr != "model" or ast.unparse(node.value).split(".")[-1].strip("_") == "engine"
    ]


@pytest.mark.parametrize("folder", ["server", "chat"])
def test_what_stands_above_the_engine_uses_its_methods(folder: str) -> None:
    """An engine's contexts, heads and vocabulary are its own: a request never touches them."""
    assert [place for path in sorted((PACKAGE / folder).rglob("*.py")) for place in reached_inside(path)] == []


def test_a_reach_into_an_engine_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("self._engine.model\nengine.options.model\nx = session.engine.trunk\nrequest.model\n")
    assert reached_inside(path) == ["a.py:1 self._engine.model", "a.py:3 session.engine.trunk"]
