"""The model's text to reasoning, content and tool calls, as it comes. Pure, and linear in the text.

As the template has it, a turn is `REASONING</think>CONTENT` and then any number of

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Models slip. For a declared tool the wrapper, `</parameter>`, `</function>` and the equals sign may be
missing. A tag counts as one where what follows confirms it; else it is text: a file that a model
writes may well contain these tags.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from step35 import markup
from step35.chat.events import (
    AnswerEvent,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
    merged,
)
from step35.chat.messages import Tool
from step35.chat.tags import Tag, TagReader
from step35.chat.tool_arguments import ArgumentWriter

MAX_WHITE_SPACE = 64  # between two tags of which the second confirms the first
_NAME = re.compile(r"[\w.:/-]+", re.ASCII)


@dataclass(slots=True)
class _PendingTag:
    """A tag that is one only if the next tag confirms it; `text` is it and the white space since."""

    text: str
    is_confirmed_by: Callable[[Tag], bool]
    accept: Callable[[], None]
    counts_at_end: bool


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that is being written; `tool` is None if nobody declared it."""

    tool: Tool | None
    arguments: ArgumentWriter

    @property
    def properties(self) -> dict[str, Any]:
        properties = self.tool.parameters.get("properties") if self.tool else None
        return properties if isinstance(properties, dict) else {}

    def accepts(self, tag: Tag) -> bool:
        """Whether a parameter's tag is one of this call."""
        return tag.is_exact or tag.name in self.properties


# where in the turn the text stands


@dataclass(frozen=True, slots=True)
class _Reasoning:
    pass


@dataclass(frozen=True, slots=True)
class _Content:
    pass


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Between the parameters of a call."""

    call: _Call


@dataclass(slots=True)
class _Value:
    """In a parameter's value."""

    call: _Call
    is_empty: bool = True


class OutputParser:
    """Turns a turn's text into events; call `feed` with each piece of text and `finish` at the end."""

    def __init__(self, tools: Sequence[Tool], in_reasoning: bool, new_id: Callable[[], str]) -> None:
        """Without tools, tags of calls are text."""
        self._tools = {tool.name: tool for tool in tools}
        self._new_id = new_id
        self._reader = TagReader()
        self._events: list[AnswerEvent] = []
        self._state: _Reasoning | _Content | _Parameters | _Value = _Reasoning() if in_reasoning else _Content()
        self._pending: _PendingTag | None = None
        self._newline = ""  # one that may belong to the tag after it
        self._white: list[str] = []  # white space that is content only if content follows
        self._at_start = False  # the next newline belongs to the tag before it
        self._has_content = False
        self._after_call = False
        self._is_wrapped = False
        self._n_calls = 0

    @property
    def in_reasoning(self) -> bool:
        return isinstance(self._state, _Reasoning)

    def feed(self, text: str) -> list[AnswerEvent]:
        """Returns what a piece of text makes certain."""
        for piece in self._reader.feed(text):
            self._take(piece)
        return self._taken()

    def finish(self, truncated: bool) -> list[AnswerEvent]:
        """Returns what is left at the end of the turn; a call that was cut short stays open-ended JSON."""
        rest, pending = self._reader.rest(), self._pending
        if pending and pending.counts_at_end:
            self._pending = None
            pending.accept()
        elif truncated and (pending or self._after_call or isinstance(self._state, _Parameters | _Value)):
            self._pending = None  # half a tag
        else:
            self._give_back()
            if rest:
                self._take(rest)
        self._end_turn(truncated)
        return self._taken()

    def _end_turn(self, truncated: bool) -> None:
        match self._state:
            case _Parameters(call) | _Value(call):
                if not truncated:
                    self._write(call.arguments.end() + call.arguments.close())
                self._emit(ToolCallEnd(self._n_calls - 1))
            case _Reasoning():
                self._emit_text(ReasoningDelta, self._newline)
            case _Content() if self._has_content and not self._after_call:
                self._emit_text(ContentDelta, "".join(self._white))

    # one piece at a time

    def _take(self, piece: str | Tag) -> None:
        if self._pending and not self._resolve(self._pending, piece):
            return
        self._read(piece)

    def _resolve(self, pending: _PendingTag, piece: str | Tag) -> bool:
        """Returns whether it is clear what the pending tag is; if not, the piece waits with it."""
        if isinstance(piece, Tag):
            if pending.is_confirmed_by(piece):
                self._pending = None
                pending.accept()
            else:
                self._give_back()
            return True
        n_white = len(piece) - len(piece.lstrip())
        if n_white == len(piece) and len(pending.text) + n_white <= MAX_WHITE_SPACE:
            pending.text += piece
            return False
        self._give_back()
        return True

    def _give_back(self) -> None:
        """Reads what is pending as text."""
        pending, self._pending = self._pending, None
        if pending:
            self._read(pending.text)

    def _read(self, piece: str | Tag) -> None:
        match self._state:
            case _Reasoning():
                self._read_reasoning(piece)
            case _Content():
                self._read_content(piece)
            case _Parameters(call):
                self._read_parameters(call, piece)
            case _Value() as value:
                self._read_value(value, piece)

    def _read_reasoning(self, piece: str | Tag) -> None:
        match piece:
            case str(text):
                self._add_reasoning(text)
            case Tag(kind=markup.THINK_END):
                self._end_reasoning()
            case Tag(kind=markup.TOOL_CALL) if self._tools:
                self._expect_function(piece)
            case _:
                self._add_reasoning(piece.text)

    def _read_content(self, piece: str | Tag) -> None:
        match piece:
            case str(text):
                self._add_content(text)
            case Tag(kind=markup.THINK) if not self._has_content and not self._n_calls:
                self._state, self._at_start = _Reasoning(), True
            case Tag(kind=markup.THINK_END) if not self._has_content:
                self._end_reasoning()
            case Tag(kind=markup.TOOL_CALL) if self._tools:
                self._expect_function(piece)
            case Tag(kind=markup.FUNCTION) if self._accepts(piece) and (self._is_wrapped or self._begins_line()):
                self._begin_call(piece)
            case Tag(kind=markup.TOOL_CALL_END | markup.FUNCTION_END) if self._after_call:
                self._is_wrapped = False
                self._white.clear()
            case _:
                self._add_content(piece.text)

    def _read_parameters(self, call: _Call, piece: str | Tag) -> None:
        """Text has no place here."""
        match piece:
            case Tag(kind=markup.PARAMETER) if call.accepts(piece):
                self._begin_value(call, piece)
            case Tag(kind=markup.FUNCTION_END):
                self._end_call(call)
            case Tag(kind=markup.TOOL_CALL_END | markup.TOOL_CALL):
                self._end_call(call)
                self._read_content(piece)
            case Tag(kind=markup.FUNCTION) if self._accepts(piece):
                self._end_call(call)
                self._begin_call(piece)

    def _read_value(self, value: _Value, piece: str | Tag) -> None:
        call = value.call
        match piece:
            case str(text):
                self._add_value(value, text)
            case Tag(kind=markup.PARAMETER_END):
                self._wait_for_next(piece, lambda tag: self._follows_value(call, tag), lambda: self._end_value(call))
            case Tag(kind=markup.PARAMETER) if self._is_next_parameter(value, piece):
                self._end_value(call)
                self._begin_value(call, piece)
            case Tag(kind=markup.FUNCTION_END) if self._may_end_line(value):
                self._wait_for_next(piece, self._follows_call, lambda: self._end_value_and_call(call))
            case Tag(kind=markup.TOOL_CALL_END) if self._may_end_line(value):
                self._wait_for_next(piece, _begins_wrapper, lambda: self._end_value_and_call(call))
            case _:
                self._add_value(value, piece.text)

    # reasoning and content

    def _end_reasoning(self) -> None:
        self._state, self._newline, self._at_start = _Content(), "", True
        self._white.clear()

    def _expect_function(self, tag: Tag) -> None:
        """A wrapper ends the reasoning, and is one at all, only around a function's tag."""
        self._pending = _PendingTag(
            tag.text, lambda tag: self._accepts(tag, is_wrapped=True), self._open_wrapper, counts_at_end=False
        )

    def _open_wrapper(self) -> None:
        self._state, self._is_wrapped = _Content(), True

    def _add_reasoning(self, text: str) -> None:
        self._emit_text(ReasoningDelta, self._without_last_newline(text))

    def _add_content(self, text: str) -> None:
        """White space waits for what follows: before a call, and between calls, it isn't content."""
        text = self._without_newline(text)
        kept = text.rstrip()
        if kept:
            self._emit(ContentDelta("".join(self._white) + kept))
            self._white.clear()
            self._has_content, self._after_call, self._is_wrapped = True, False, False
        self._white.append(text[len(kept) :])

    def _begins_line(self) -> bool:
        return not self._has_content or self._after_call or any("\n" in white for white in self._white)

    def _without_newline(self, text: str) -> str:
        """Returns the text without the newline that belongs to the tag before it."""
        at_start, self._at_start = self._at_start, False
        return text.removeprefix("\n") if at_start else text

    def _without_last_newline(self, text: str) -> str:
        """Returns the text with the newline kept back before it, but keeps back one at its end: a tag may follow."""
        text = self._newline + self._without_newline(text)
        kept = text.removesuffix("\n")
        self._newline = text[len(kept) :]
        return kept

    # calls

    def _accepts(self, tag: Tag, is_wrapped: bool | None = None) -> bool:
        """Whether a tag begins a call: of a declared tool, or written exactly as it should be."""
        if tag.kind != markup.FUNCTION:
            return False
        is_exact = tag.is_exact and _NAME.fullmatch(tag.name) is not None
        is_wrapped = self._is_wrapped if is_wrapped is None else is_wrapped
        return tag.name in self._tools or (bool(self._tools) and is_exact and is_wrapped)

    def _begin_call(self, tag: Tag) -> None:
        tool = self._tools.get(tag.name)
        call = _Call(tool, ArgumentWriter(tool.parameters if tool else {}))
        self._state, self._newline, self._at_start = _Parameters(call), "", False
        self._white.clear()
        self._emit(ToolCallBegin(self._n_calls, self._new_id(), tag.name))
        self._n_calls += 1
        self._write(call.arguments.open())

    def _end_call(self, call: _Call) -> None:
        self._write(call.arguments.close())
        self._emit(ToolCallEnd(self._n_calls - 1))
        self._state, self._after_call = _Content(), True

    def _begin_value(self, call: _Call, tag: Tag) -> None:
        call.arguments.begin(tag.name)
        self._state, self._newline, self._at_start = _Value(call), "", True

    def _add_value(self, value: _Value, text: str) -> None:
        if kept := self._without_last_newline(text):
            value.is_empty = False
            self._write(value.call.arguments.add(kept))

    def _end_value(self, call: _Call) -> None:
        """Ends a value; the newline before its end belongs to the tag."""
        self._write(call.arguments.end())
        self._state, self._newline, self._at_start = _Parameters(call), "", False

    def _end_value_and_call(self, call: _Call) -> None:
        self._end_value(call)
        self._end_call(call)

    def _wait_for_next(self, tag: Tag, is_confirmed_by: Callable[[Tag], bool], accept: Callable[[], None]) -> None:
        self._pending = _PendingTag(tag.text, is_confirmed_by, accept, counts_at_end=True)

    def _follows_value(self, call: _Call, tag: Tag) -> bool:
        if tag.kind == markup.PARAMETER:
            return call.accepts(tag)
        return tag.kind in (markup.FUNCTION_END, markup.TOOL_CALL_END, markup.TOOL_CALL) or self._accepts(tag)

    def _follows_call(self, tag: Tag) -> bool:
        return tag.kind == markup.TOOL_CALL_END if self._is_wrapped else _begins_wrapper(tag) or self._accepts(tag)

    def _may_end_line(self, value: _Value) -> bool:
        """Whether a tag here may stand for a missing `</parameter>`: a declared tool's, at a line's start."""
        return value.call.tool is not None and (self._newline == "\n" or value.is_empty)

    def _is_next_parameter(self, value: _Value, tag: Tag) -> bool:
        is_known = tag.name in value.call.properties and value.call.arguments.is_new(tag.name)
        return tag.is_exact and is_known and self._may_end_line(value)

    # events

    def _write(self, fragment: str) -> None:
        if fragment:
            self._emit(ToolCallArguments(self._n_calls - 1, fragment))

    def _emit_text(self, kind: type[ReasoningDelta] | type[ContentDelta], text: str) -> None:
        if text:
            self._emit(kind(text))

    def _emit(self, event: AnswerEvent) -> None:
        self._events.append(event)

    def _taken(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return merged(events)


def _begins_wrapper(tag: Tag) -> bool:
    return tag.kind == markup.TOOL_CALL
