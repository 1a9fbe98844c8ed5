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
missing. A tag counts as one where what follows bears it out; else it is text: a file that a model
writes may well contain these tags.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

MAX_WHITE_SPACE = 64  # between two tags that bear each other out
_NAME = re.compile(r"[\w.:/-]+", re.ASCII)


@dataclass(slots=True)
class _Doubt:
    """A tag that is one only if the next tag is as expected; `text` is it and the white space since."""

    text: str
    is_borne_out: Callable[[Tag], bool]
    accept: Callable[[], None]
    counts_at_end: bool


class Parser:
    """Turns a turn's text into events; call `feed` with each piece of text and `finish` at the end."""

    def __init__(self, tools: Sequence[Tool], in_reasoning: bool, new_id: Callable[[], str]) -> None:
        """Without tools, tags of calls are text."""
        self._tools = {tool.name: tool for tool in tools}
        self._new_id = new_id
        self._reader = TagReader()
        self._events: list[AnswerEvent] = []
        self._state: Callable[[str | Tag], None] = self._reasoning if in_reasoning else self._content
        self._doubt: _Doubt | None = None
        self._held = ""  # a newline that may belong to the tag after it
        self._white: list[str] = []  # white space that is content only if content follows
        self._at_start = False  # the next newline belongs to the tag before it
        self._has_content = False
        self._after_call = False
        self._is_wrapped = False
        self._n_calls = 0
        self._tool: Tool | None = None
        self._arguments: ArgumentWriter | None = None
        self._value_is_empty = True

    @property
    def in_reasoning(self) -> bool:
        return self._state == self._reasoning

    @property
    def in_call(self) -> bool:
        return self._arguments is not None

    @property
    def n_calls(self) -> int:
        """Number of calls begun."""
        return self._n_calls

    def feed(self, text: str) -> list[AnswerEvent]:
        """Returns what a piece of text makes certain."""
        for piece in self._reader.feed(text):
            self._take(piece)
        return self._taken()

    def finish(self, truncated: bool) -> list[AnswerEvent]:
        """Returns what is left at the end of the turn; a call that was cut short stays open-ended JSON."""
        rest, doubt = self._reader.rest(), self._doubt
        if doubt and doubt.counts_at_end:
            self._doubt = None
            doubt.accept()
        elif truncated and (doubt or self.in_call or self._after_call):
            self._doubt = None  # half a tag
        else:
            self._give_back()
            if rest:
                self._take(rest)
        self._end_turn(truncated)
        return self._taken()

    def _end_turn(self, truncated: bool) -> None:
        if self.in_call:
            if not truncated:
                self._end_value()
                self._write(self._arguments.close())
            self._emit(ToolCallEnd(self._n_calls - 1))
            self._arguments = None
        elif self.in_reasoning:
            self._emit_text(ReasoningDelta, self._held)
        elif self._has_content and not self._after_call:
            self._emit_text(ContentDelta, "".join(self._white))

    # one piece at a time

    def _take(self, piece: str | Tag) -> None:
        if self._doubt and not self._settle(piece):
            return
        self._state(piece)

    def _settle(self, piece: str | Tag) -> bool:
        """Returns whether the doubt is over; if not, the piece is among what is in doubt."""
        doubt = self._doubt
        assert doubt is not None
        if isinstance(piece, Tag):
            if doubt.is_borne_out(piece):
                self._doubt = None
                doubt.accept()
            else:
                self._give_back()
            return True
        n_white = len(piece) - len(piece.lstrip())
        if n_white == len(piece) and len(doubt.text) + n_white <= MAX_WHITE_SPACE:
            doubt.text += piece
            return False
        self._give_back()
        return True

    def _give_back(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt:
            self._state(doubt.text)

    def _reasoning(self, piece: str | Tag) -> None:
        match piece:
            case str(text):
                self._add_reasoning(text)
            case Tag(kind=markup.THINK_END):
                self._end_reasoning()
            case Tag(kind=markup.TOOL_CALL) if self._tools:
                self._expect_function(piece)
            case _:
                self._add_reasoning(piece.text)

    def _content(self, piece: str | Tag) -> None:
        match piece:
            case str(text):
                self._add_content(text)
            case Tag(kind=markup.THINK) if not self._has_content and not self._n_calls:
                self._state, self._at_start = self._reasoning, True
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

    def _function(self, piece: str | Tag) -> None:
        """Between the parameters of a call; text has no place here."""
        match piece:
            case Tag(kind=markup.PARAMETER) if self._accepts_parameter(piece):
                self._begin_value(piece)
            case Tag(kind=markup.FUNCTION_END):
                self._end_call()
            case Tag(kind=markup.TOOL_CALL_END | markup.TOOL_CALL):
                self._end_call()
                self._content(piece)
            case Tag(kind=markup.FUNCTION) if self._accepts(piece):
                self._end_call()
                self._begin_call(piece)

    def _value(self, piece: str | Tag) -> None:
        match piece:
            case str(text):
                self._add_value(text)
            case Tag(kind=markup.PARAMETER_END):
                self._doubt_value_end(piece, self._follows_value, self._end_value)
            case Tag(kind=markup.PARAMETER) if self._is_next_parameter(piece):
                self._end_value()
                self._begin_value(piece)
            case Tag(kind=markup.FUNCTION_END) if self._may_end_line():
                self._doubt_value_end(piece, self._follows_call, self._end_value_and_call)
            case Tag(kind=markup.TOOL_CALL_END) if self._may_end_line():
                self._doubt_value_end(piece, lambda tag: tag.kind == markup.TOOL_CALL, self._end_value_and_call)
            case _:
                self._add_value(piece.text)

    # reasoning and content

    def _end_reasoning(self) -> None:
        self._state, self._held, self._at_start = self._content, "", True
        self._white.clear()

    def _expect_function(self, tag: Tag) -> None:
        """A wrapper ends the reasoning, and is one at all, only around a function's tag."""
        self._doubt = _Doubt(tag.text, lambda tag: self._accepts(tag, is_wrapped=True), self._open_wrapper, False)

    def _open_wrapper(self) -> None:
        self._state, self._is_wrapped = self._content, True

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
        """Returns what was held and the text, but for a newline at its end, which is held: a tag may follow."""
        text = self._held + self._without_newline(text)
        kept = text.removesuffix("\n")
        self._held = text[len(kept) :]
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
        self._tool = self._tools.get(tag.name)
        self._arguments = ArgumentWriter(self._tool.parameters if self._tool else {})
        self._state, self._held, self._at_start = self._function, "", False
        self._white.clear()
        self._emit(ToolCallBegin(self._n_calls, self._new_id(), tag.name))
        self._n_calls += 1
        self._write(self._arguments.open())

    def _end_call(self) -> None:
        self._write(self._arguments.close())
        self._emit(ToolCallEnd(self._n_calls - 1))
        self._arguments, self._state, self._after_call = None, self._content, True

    def _accepts_parameter(self, tag: Tag) -> bool:
        return tag.is_exact or tag.name in self._properties()

    def _properties(self) -> dict:
        properties = self._tool.parameters.get("properties") if self._tool else None
        return properties if isinstance(properties, dict) else {}

    def _begin_value(self, tag: Tag) -> None:
        self._arguments.begin(tag.name)
        self._state, self._held, self._at_start, self._value_is_empty = self._value, "", True, True

    def _add_value(self, text: str) -> None:
        if kept := self._without_last_newline(text):
            self._value_is_empty = False
            self._write(self._arguments.add(kept))

    def _end_value(self) -> None:
        """Ends a value, if one is open; the newline before its end belongs to the tag."""
        self._write(self._arguments.end())
        self._state, self._held, self._at_start = self._function, "", False

    def _end_value_and_call(self) -> None:
        self._end_value()
        self._end_call()

    def _doubt_value_end(self, tag: Tag, is_borne_out: Callable[[Tag], bool], accept: Callable[[], None]) -> None:
        self._doubt = _Doubt(tag.text, is_borne_out, accept, True)

    def _follows_value(self, tag: Tag) -> bool:
        if tag.kind == markup.PARAMETER:
            return self._accepts_parameter(tag)
        return tag.kind in (markup.FUNCTION_END, markup.TOOL_CALL_END, markup.TOOL_CALL) or self._accepts(tag)

    def _follows_call(self, tag: Tag) -> bool:
        return (
            tag.kind == markup.TOOL_CALL_END if self._is_wrapped else tag.kind == markup.TOOL_CALL or self._accepts(tag)
        )

    def _may_end_line(self) -> bool:
        """Whether a tag here may stand for a missing `</parameter>`: a declared tool's, at a line's start."""
        return self._tool is not None and (self._held == "\n" or self._value_is_empty)

    def _is_next_parameter(self, tag: Tag) -> bool:
        is_known = tag.name in self._properties() and self._arguments.is_new(tag.name)
        return tag.is_exact and is_known and self._may_end_line()

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
