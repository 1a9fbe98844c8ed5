"""All events of an answer, collected: what a client gets that doesn't stream. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from step35.chat.events import (
    ContentDelta,
    Finished,
    Logprobs,
    ReasoningDelta,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
)
from step35.chat.messages import ToolCall
from step35.chat.tool_arguments import closed
from step35.server.events import Event, Failed


@dataclass(slots=True)
class Collected:
    """An answer; a call that was cut short has its arguments closed, so that they are JSON."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    reason: str = "length"
    stop_text: str | None = None
    usage: TokenUsage = field(default_factory=TokenUsage)


def collect(events: Iterable[Event]) -> Collected:
    """Returns what the events say, joined; raises the ApiError of one that failed."""
    answer = Collected()
    reasoning, content, arguments = [], [], []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallBegin(_, id_, name):
                answer.calls.append(ToolCall(id_, name, ""))
                arguments.append([])
            case ToolCallArguments(index, fragment):
                arguments[index].append(fragment)
            case Logprobs():
                answer.logprobs.append(event)
            case Finished(reason, usage, stop_text):
                answer.reason, answer.usage, answer.stop_text = reason, usage, stop_text
            case Failed(error):
                raise error
    answer.reasoning, answer.content = "".join(reasoning), "".join(content)
    joined = [closed("".join(pieces)) for pieces in arguments]
    answer.calls = [ToolCall(call.id, call.name, text) for call, text in zip(answer.calls, joined, strict=True)]
    return answer
