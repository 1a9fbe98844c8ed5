"""The module map of docs/design.md, from the first lines of the modules' docstrings.

python tests/support/module_map.py    writes it after its heading in docs/design.md
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs" / "design.md"
MARK = "<!-- From here on written by python tests/support/module_map.py -->\n"
PACKAGES = (ROOT / "converter" / "convert_step35", ROOT / "runtime" / "step35")
SOURCES = (".py", ".cpp", ".hpp")
KERNELS = "The kernels in C++: libggml's formulas on one block in each SIMD lane; hatch_build.py compiles them."
WIDTH = 120


def floors() -> dict[str, tuple[tuple[str, ...], ...]]:
    """The folders of each package from the ground up, as tests/project/test_project.py has them."""
    statements = ast.parse((ROOT / "tests" / "project" / "test_project.py").read_text(encoding="utf-8")).body
    values: dict[str, Any] = {
        target.id: statement.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    return ast.literal_eval(values["FLOORS"])


def module_map() -> str:
    """The map of both packages, folders in the order of their imports."""
    return "\n".join(line for package in PACKAGES for line in _package(package))


def _package(package: Path) -> Iterator[str]:
    order = [folder for floor in floors()[package.name] for folder in floor]
    yield f"\n### {package.relative_to(ROOT).as_posix()}\n"
    yield from _folder(package, package, "", order)


def _folder(package: Path, folder: Path, indent: str, order: list[str]) -> Iterator[str]:
    """The lines of a folder's modules, and of the folders in it."""
    modules = [path for path in folder.iterdir() if path.suffix in SOURCES and not path.name.startswith("__")]
    for path in sorted(modules):
        yield _line(path.relative_to(package).as_posix(), _purpose(path), indent)
    folders = [path for path in folder.iterdir() if any(p.suffix in SOURCES for p in path.rglob("*"))]
    for path in sorted(folders, key=lambda path: (order.index(path.name) if path.name in order else 0, path.name)):
        face = path / "__init__.py"
        yield _line(f"{path.relative_to(package).as_posix()}/", _purpose(face) if face.exists() else KERNELS, indent)
        yield from _folder(package, path, f"{indent}  ", [])


def _purpose(path: Path) -> str:
    """The first line of a module's docstring, or the first sentence of a C++ file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    comment = re.match(r"(?://.*\n)*", text)
    words = " ".join(line.removeprefix("//").strip() for line in comment[0].splitlines()) if comment else ""
    return words.split(". ")[0].removesuffix(".") + "."


def _line(name: str, purpose: str, indent: str) -> str:
    bullet = f"{indent}- `{name}`: {purpose}"
    return textwrap.fill(bullet, WIDTH, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)


def main() -> None:
    text, mark, _ = DESIGN.read_text(encoding="utf-8").partition(MARK)
    DESIGN.write_text(f"{text}{mark}{module_map()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
