"""Text, as it comes, to text and the tags that mark reasoning and tool calls with."""

import re
from dataclasses import dataclass

from step35.markup import (
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
)

FIXED = (THINK, THINK_END, TOOL_CALL, TOOL_CALL_END, FUNCTION_END, PARAMETER_END)
NAMED = (FUNCTION, PARAMETER)
MAX_NAME = 200
_TAG = re.compile(rf"{'|'.join(FIXED)}|({'|'.join(NAMED)})([= ])([^<>\n]{{1,{MAX_NAME}}})>")
_BEGUN = re.compile(rf"(?:{'|'.join(NAMED)})(?:[= ][^<>\n]{{0,{MAX_NAME}}})?")
_LOOSE_NAME = re.compile(r"""\s*(?:name\s*=)?\s*(["']?)(.*?)\1\s*""")


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag. Its kind is its text, or FUNCTION or PARAMETER. It is exact if written as the template writes it."""

    text: str
    kind: str
    name: str = ""
    is_exact: bool = True


class TagReader:
    """Splits text into tags and what stands between them; keeps back what may become a tag.

    Tags never depend on how the text was cut; the texts between them do, joined they don't.
    """

    def __init__(self) -> None:
        self._kept_back = ""

    def feed(self, text: str) -> list[str | Tag]:
        text = self._kept_back + text
        if "<" not in text:
            self._kept_back = ""
            return [text] if text else []
        n_safe = len(text) - _n_begun(text)
        self._kept_back = text[n_safe:]
        return _split(text[:n_safe])

    def rest(self) -> str:
        """Returns what was kept back: text after all."""
        rest, self._kept_back = self._kept_back, ""
        return rest


def _n_begun(text: str) -> int:
    """Returns the length of the end of `text` that may yet become a tag."""
    last = text.rfind("<", -(MAX_NAME + len(PARAMETER) + 1) - 1)
    tail = text[last:] if last >= 0 else ""
    begun = tail and (
        any(tag.startswith(tail) and tag != tail for tag in FIXED)
        or any(tag.startswith(tail) for tag in NAMED)
        or _BEGUN.fullmatch(tail)
    )
    return len(tail) if begun else 0


def _split(text: str) -> list[str | Tag]:
    pieces: list[str | Tag] = []
    end = 0
    for match in _TAG.finditer(text):
        if match.start() > end:
            pieces.append(text[end : match.start()])
        pieces.append(_tag(match))
        end = match.end()
    if end < len(text):
        pieces.append(text[end:])
    return pieces


def _tag(match: re.Match[str]) -> Tag:
    kind, separator, raw = match.groups()
    if kind is None:
        return Tag(match[0], match[0])
    loose = _LOOSE_NAME.fullmatch(raw)
    name = loose[2] if loose else raw
    return Tag(match[0], kind, name, separator == "=" and name == raw)
