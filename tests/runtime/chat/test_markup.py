"""The model's markup is spelt in one module of the runtime."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from step35 import markup

RUNTIME = Path(markup.__file__).parent
MARKUP = re.compile(r"</?(think|tool_call|tool_response)|</?(function|parameter)\b|<\|im_\w+\|>|im_(start|end)")


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text and every bytes constant of a module, but for docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, bytes):
                yield node.value.decode(errors="replace")
            elif isinstance(node.value, str):
                yield node.value


def spelt(path: Path) -> list[str]:
    return [text for text in texts(ast.parse(path.read_text(encoding="utf-8"))) if MARKUP.search(text)]


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda path: str(path.relative_to(RUNTIME)))
def test_no_other_module_spells_a_tag_or_a_control_token(path: Path) -> None:
    """Ten modules did."""
    assert bool(spelt(path)) == (path.name == "markup.py")


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Not <think>."""\nA = f"x</think>{1}"\nB = b"<|im_end|>"\nC = "<function=f>", "a < think"\n')
    assert set(spelt(module)) == {"x</think>", "<|im_end|>", "<function=f>"}


def test_the_template_writes_this_markup() -> None:
    """The names are those of the checkpoint's own template."""
    template = (Path(__file__).parents[2] / "data" / "tiny-step35" / "chat_template.jinja").read_text(encoding="utf-8")
    spelt = {text for name, text in vars(markup).items() if name.isupper()}
    assert [text for text in spelt if text.strip() not in template and text != markup.ASSISTANT_START] == []
    assert markup.function_tag("' + tool_call.name + '") in template
    assert markup.parameter_tag("' + args_name + '") in template
    assert repr(markup.ASSISTANT_START)[1:-1] in template
