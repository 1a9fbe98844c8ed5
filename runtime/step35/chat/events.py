"""What an answer says, piece by piece, in order. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeVar

_E = TypeVar("_E")
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A call begins; `index` counts the turn's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of a call's arguments; all pieces joined are its JSON."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as bytes of text, with its log-probability."""

    piece: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.piece.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The token that was chosen and the most probable ones there; comes before the deltas it led to."""

    chosen: TokenText
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Counts of tokens; the cached ones are among the prompt's, the reasoning among the generated."""

    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    n_reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. `stop_text` is the stop string that ended it, if one did."""

    reason: FinishReason
    usage: TokenUsage
    stop_text: str | None = None


AnswerEvent = ReasoningDelta | ContentDelta | ToolCallBegin | ToolCallArguments | ToolCallEnd | Logprobs | Finished


def merged(events: Sequence[_E]) -> list[_E | ReasoningDelta | ContentDelta | ToolCallArguments]:
    """Joins neighbours of the same kind; events of other kinds stay as they are."""
    if len(events) < 2:  # as after most tokens
        return [*events]
    joined: list[_E | ReasoningDelta | ContentDelta | ToolCallArguments] = []
    for kind, group in groupby(events, type):
        same = list(group)
        if kind is ReasoningDelta:
            joined.append(ReasoningDelta("".join(event.text for event in same if isinstance(event, ReasoningDelta))))
        elif kind is ContentDelta:
            joined.append(ContentDelta("".join(event.text for event in same if isinstance(event, ContentDelta))))
        elif kind is ToolCallArguments:
            fragments = [event for event in same if isinstance(event, ToolCallArguments)]
            joined.append(ToolCallArguments(fragments[0].index, "".join(event.fragment for event in fragments)))
        else:
            joined += same
    return joined
