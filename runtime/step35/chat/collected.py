"""What an answer has said: its events joined to text, calls and how it ended. Pure."""

from dataclasses import dataclass, field

from step35.chat.events import (
    AnswerEvent,
    ContentDelta,
    Finished,
    FinishReason,
    Logprobs,
    ReasoningDelta,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
)
from step35.chat.messages import Message, ToolCall
from step35.chat.tool_arguments import closed


@dataclass(frozen=True, slots=True)
class _Call:
    id: str
    name: str
    fragments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Collected:
    """An answer, event by event; a call that was cut short has its arguments closed, so that they are JSON."""

    logprobs: list[Logprobs] = field(default_factory=list)
    reason: FinishReason = "length"
    usage: TokenUsage = field(default_factory=TokenUsage)
    stop_text: str | None = None
    _reasoning: list[str] = field(default_factory=list)
    _content: list[str] = field(default_factory=list)
    _calls: list[_Call] = field(default_factory=list)

    def add(self, event: AnswerEvent) -> None:
        match event:
            case ReasoningDelta(text):
                self._reasoning.append(text)
            case ContentDelta(text):
                self._content.append(text)
            case ToolCallBegin(_, id_, name):
                self._calls.append(_Call(id_, name))
            case ToolCallArguments(index, fragment):
                self._calls[index].fragments.append(fragment)
            case Logprobs():
                self.logprobs.append(event)
            case Finished(reason, usage, stop_text):
                self.reason, self.usage, self.stop_text = reason, usage, stop_text

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def n_calls(self) -> int:
        return len(self._calls)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(call.id, call.name, closed("".join(call.fragments))) for call in self._calls)

    def message(self) -> Message:
        """Returns the answer as a client has it."""
        return Message("assistant", self.content, self.reasoning or None, self.calls)
