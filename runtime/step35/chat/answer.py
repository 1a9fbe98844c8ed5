"""An answer as it grows: from tokens to events, and what the client has of it at the end. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from step35.chat.collected import Collected
from step35.chat.events import (
    AnswerEvent,
    ContentDelta,
    Finished,
    FinishReason,
    Logprobs,
    TokenText,
    TokenUsage,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Message
from step35.chat.output_parser import OutputParser
from step35.engine.detokenize import StopStrings, TextStream
from step35.markup import TOOL_CALL_END
from step35.sampling.token_chooser import TokenLogprobs

MOST_AFTER_CALL = 4
"""Tokens that the end of a call's wrapper may take."""

Piece = Callable[[int], bytes]


@dataclass(slots=True)
class Answer:
    """Turns tokens into events. Without a parser, all text is content.

    Stop strings end the content only: they may occur in the reasoning, or in a file that a call writes.
    """

    piece: Piece
    parser: OutputParser | None
    stop: Sequence[str] = ()
    may_call_twice: bool = True
    n_tokens: int = 0
    n_reasoning: int = 0
    said: Collected = field(default_factory=Collected)
    """Without log-probabilities: they are the events' alone."""
    _text: TextStream = field(init=False)
    _stops: StopStrings = field(init=False)
    _n_after_call: int | None = None

    def __post_init__(self) -> None:
        self._text = TextStream(self.piece)
        self._stops = StopStrings(self.stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stops.found is not None

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
        is_truncated = reason == "length"
        events = self._take(self._text.finish())
        if self.parser:
            events += self._until_stop(self.parser.finish(is_truncated))
        events += self._content(self._stops.finish())
        usage = TokenUsage(n_prompt, n_cached, self.n_tokens, self.n_reasoning)
        return [*events, self._say(Finished(self._reason(is_truncated), usage, self._stops.found))]

    def message(self) -> Message:
        """Returns the answer as a client has it."""
        return self.said.message()

    def _reason(self, is_truncated: bool) -> FinishReason:
        if self.is_stopped:
            return "stop"
        if is_truncated:
            return "length"
        return "tool_calls" if self.said.n_calls else "stop"

    def _take(self, text: str) -> list[AnswerEvent]:
        if not text:
            return []
        if self.parser is None:
            return self._content(self._stops.add(text))
        return self._until_stop(self.parser.feed(text))

    def _until_stop(self, events: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        """Returns events as far as a stop string lets them."""
        return [said for event in events if not self.is_stopped for said in self._pass(event)]

    def _pass(self, event: AnswerEvent) -> list[AnswerEvent]:
        match event:
            case ContentDelta(text):
                return self._content(self._stops.add(text))
            case ToolCallBegin():
                return [*self._content(self._stops.finish()), self._say(event)]  # half a stop string before it was none
            case ToolCallEnd() if not self.may_call_twice:
                self._n_after_call = 0
        return [self._say(event)]

    def _content(self, text: str) -> list[AnswerEvent]:
        return [self._say(ContentDelta(text))] if text else []

    def _say(self, event: AnswerEvent) -> AnswerEvent:
        self.said.add(event)
        return event

    def _logprobs(self, values: TokenLogprobs) -> Logprobs:
        return Logprobs(
            TokenText(self.piece(values.token), values.logprob),
            tuple(TokenText(self.piece(token), logprob) for token, logprob in values.top),
        )
