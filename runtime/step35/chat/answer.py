"""An answer as it grows: from tokens to events, and what the client has of it at the end. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from step35.chat.events import (
    AnswerEvent,
    ContentDelta,
    Finished,
    Logprobs,
    ReasoningDelta,
    TokenText,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Message, ToolCall
from step35.chat.output_parser import OutputParser
from step35.chat.tool_arguments import closed
from step35.engine.detokenize import TextStream
from step35.markup import TOOL_CALL_END
from step35.sampling.token_chooser import TokenLogprobs

MOST_AFTER_CALL = 4
"""Tokens that the end of a call's wrapper may take."""

Piece = Callable[[int], bytes]


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """Turns tokens into events. Without a parser, all text is content.

    Stop strings end the content only: what a model thinks or writes into a file is not held against it.
    """

    piece: Piece
    parser: OutputParser | None
    stop: Sequence[str] = ()
    may_call_twice: bool = True
    n_tokens: int = 0
    n_reasoning: int = 0
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    stop_text: str | None = None
    _text: TextStream = field(init=False)
    _stops: TextStream = field(init=False)
    _fed: list[str] = field(default_factory=list)
    _n_after_call: int | None = None

    def __post_init__(self) -> None:
        self._text = TextStream(self.piece)
        self._stops = TextStream(str.encode, self.stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stops.stopped

    @property
    def is_over(self) -> bool:
        """Whether no more tokens are wanted: after a stop string, or after the one call that was asked for."""
        return self.is_stopped or (self._n_after_call is not None and self._n_after_call >= MOST_AFTER_CALL)

    @property
    def in_reasoning(self) -> bool:
        return self.parser is not None and self.parser.in_reasoning

    def feed(self, token: int, logprobs: TokenLogprobs | None = None) -> list[AnswerEvent]:
        """Returns what a token brings."""
        self.n_tokens += 1
        self.n_reasoning += self.in_reasoning
        events: list[AnswerEvent] = [] if logprobs is None else [self._logprobs(logprobs)]
        text = self._text.add(token)
        if self._n_after_call is not None:
            self._n_after_call += MOST_AFTER_CALL if TOOL_CALL_END in text else 1
        return events + self._take(text)

    def finish(self, reason: str, n_prompt: int, n_cached: int) -> list[AnswerEvent]:
        """Returns the last events; `reason` is stop or length."""
        events = self._take(self._text.finish())
        if self.parser:
            events += self._keep(self.parser.finish(truncated=reason == "length"))
        rest = self._stops.finish()
        events += self._content(rest)
        if self.is_stopped:
            reason = "stop"
        elif reason == "stop" and self.calls:
            reason = "tool_calls"
        usage = TokenUsage(n_prompt, n_cached, self.n_tokens, self.n_reasoning)
        return [*events, Finished(reason, usage, self.stop_text)]

    def message(self) -> Message:
        """Returns the answer as a client has it; a call that was cut short is closed, as they get it."""
        calls = tuple(ToolCall(call.id, call.name, closed(call.arguments)) for call in self.calls)
        return Message("assistant", "".join(self.content), "".join(self.reasoning) or None, calls)

    def _take(self, text: str) -> list[AnswerEvent]:
        if not text:
            return []
        return self._keep(self.parser.feed(text)) if self.parser else self._until_stop(text)

    def _keep(self, events: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        kept: list[AnswerEvent] = []
        for event in events:
            kept += self._keep_one(event)
        return kept

    def _keep_one(self, event: AnswerEvent) -> list[AnswerEvent]:
        if self.is_stopped:
            return []
        match event:
            case ContentDelta(text):
                return self._until_stop(text)
            case ReasoningDelta(text):
                self.reasoning.append(text)
            case ToolCallBegin(_, id_, name):
                self.calls.append(Call(id_, name))
                return [*self._content(self._stops.finish()), event]  # half a stop string before it was none
            case ToolCallEnd() if not self.may_call_twice:
                self._n_after_call = 0
            case ToolCallArguments(index, fragment):
                self.calls[index].arguments += fragment
        return [event]

    def _until_stop(self, text: str) -> list[AnswerEvent]:
        if not self.stop:
            return self._content(text)
        self._fed.append(text)
        events = self._content(self._stops.add(text))
        if self.is_stopped:
            n_shown = sum(map(len, self.content))
            self.stop_text = next(stop for stop in self.stop if stop and "".join(self._fed).startswith(stop, n_shown))
        return events

    def _content(self, text: str) -> list[AnswerEvent]:
        if not text:
            return []
        self.content.append(text)
        return [ContentDelta(text)]

    def _logprobs(self, values: TokenLogprobs) -> Logprobs:
        return Logprobs(
            TokenText(self.piece(values.token), values.logprob),
            tuple(TokenText(self.piece(token), logprob) for token, logprob in values.top),
        )
