"""The real client packages in front of an API's module: its reader and writer, and a fixed answer in between."""

import json
from collections.abc import Sequence

import anthropic
import httpx2
import openai

from narrowed import of
from step35.chat.events import (
    ContentDelta,
    Finished,
    ReasoningDelta,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Conversation
from step35.server.api.protocol import ApiModule
from step35.server.errors import ApiError
from step35.server.events import Event, Failed, Progress, Sse
from step35.server.generation_request import GenerationRequest

USAGE = TokenUsage(n_prompt=100, n_cached=80, n_generated=20, n_reasoning=5)
ANSWER: list[Event] = [
    Progress(80, 100),
    ReasoningDelta("Let me "),
    ReasoningDelta("see."),
    ContentDelta("Hel"),
    ContentDelta("lo."),
    Finished("stop", USAGE),
]
CALLS: list[Event] = [
    ReasoningDelta("Two."),
    ContentDelta("I look."),
    ToolCallBegin(0, "call_a", "weather"),
    ToolCallArguments(0, "{"),
    ToolCallArguments(0, '"city": "Be'),
    ToolCallArguments(0, 'rn"}'),
    ToolCallEnd(0),
    ToolCallBegin(1, "call_b", "now"),
    ToolCallArguments(1, "{}"),
    ToolCallEnd(1),
    Finished("tool_calls", USAGE),
]
TOOL_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Served:
    """An API of the server whose model always says the same; `requests` are what it understood."""

    def __init__(self, api: ApiModule, events: Sequence[Event]) -> None:
        self.api, self.events = api, events
        self.requests: list[GenerationRequest] = []

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url="http://step35/v1", api_key="none", http_client=self._client(), max_retries=0)

    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url="http://step35", api_key="none", http_client=self._client(), max_retries=0)

    def _client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self._answer))

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        try:
            asked = self.api.read(json.loads(request.content))
            self.requests.append(asked)
            if asked.stream:
                return httpx2.Response(
                    200, text=stream(self.api, asked, self.events), headers={"content-type": "text/event-stream"}
                )
            return httpx2.Response(200, json=self.api.whole(asked, "req", 1700000000, self.events))
        except ApiError as error:
            return httpx2.Response(error.status, json=self.api.error_body(error, "req"))


def conversation(request: GenerationRequest) -> Conversation:
    """The conversation of a request that is one."""
    return of(Conversation, request.prompt)


def written(api: ApiModule, asked: GenerationRequest, events: Sequence[Event]) -> list[Sse]:
    """All server-sent events of an answer, with a ping after each."""
    writer = api.Writer(asked, "req", 1700000000)
    out = [*writer.open(), *writer.ping(None)]
    for event in events:
        out += writer.event(event)
        if not isinstance(event, Finished | Failed):
            out += writer.ping(event if isinstance(event, Progress) else None)
    return out + writer.close()


def stream(api: ApiModule, asked: GenerationRequest, events: Sequence[Event]) -> str:
    return "".join(
        (f"event: {sse.event}\n" if sse.event else "") + f"data: {sse.data}\n\n" for sse in written(api, asked, events)
    )
