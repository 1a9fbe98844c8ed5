"""Streams: what is ready goes out together, and a silent stage of any API's answer has its signs of life."""

import asyncio
import json
from contextlib import aclosing
from types import ModuleType
from typing import Any

import pytest

from server_fakes import ask
from step35.chat.events import ContentDelta, Finished, ReasoningDelta, TokenUsage, ToolCallArguments, ToolCallBegin
from step35.server.api import chat_completions, completions, messages, responses
from step35.server.event_log import EventBridge, EventLog
from step35.server.events import Event, Progress
from step35.server.generation_request import GenerationRequest
from step35.server.http import streams
from step35.server.http.streams import EventStream

LONGEST_WAIT_S = 60
PREFILL: list[Event] = [Progress(0, 9000), Progress(512, 9000)]
REASONING: list[Event] = [*PREFILL, ReasoningDelta("Let me see.")]
ANSWER: list[Event] = [*PREFILL, ContentDelta("Hello")]
ARGUMENTS: list[Event] = [*ANSWER, ToolCallBegin(0, "call_1", "write"), ToolCallArguments(0, '{"text": "a long')]
STAGES = {"queue": [], "prefill": PREFILL, "reasoning": REASONING, "answer": ANSWER, "arguments": ARGUMENTS}


class Wakings:
    """Stands in for an event loop: keeps what it is called for, until it is let go."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_closed = False

    def call_soon_threadsafe(self, call: Any) -> None:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        self.calls.append(call)

    def run(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_all_that_is_ready_comes_with_one_waking():
    """Every token of every stream woke the event loop, which took longer than to decode one of a small model."""
    loop = Wakings()
    mail = EventBridge(loop)
    feeds = [EventLog(mail) for _ in range(4)]
    for feed in feeds:
        feed.publish([ContentDelta("a")])
    assert not loop.calls, "nothing goes out before it is sent"
    mail.send()
    feeds[0].publish([ContentDelta("b")])
    mail.send()
    assert len(loop.calls) == 1, "the waking that is on its way brings what came meanwhile"
    loop.run()
    assert [feed._events for feed in feeds] == [[ContentDelta("a"), ContentDelta("b")], *[[ContentDelta("a")]] * 3]
    mail.send()
    assert not loop.calls, "nothing is ready"
    feeds[1].publish([ContentDelta("c")])
    mail.send()
    assert len(loop.calls) == 1


def test_a_closed_loop_means_that_everybody_has_left():
    loop = Wakings()
    mail = EventBridge(loop)
    loop.is_closed = True
    for feed in (EventLog(mail), EventLog(mail)):
        feed.publish([ContentDelta("a")])
        mail.send()
        assert feed.is_left


def test_a_stream_that_has_ended_leaves_no_timer():
    """A stream of more than a second ticked on for ever, and kept all of its events in memory."""

    async def play() -> int:
        loop = asyncio.get_running_loop()
        feed, seen = Counting(EventBridge(loop)), 0
        async with aclosing(feed.follow(0.001)) as followed:
            async for _ in followed:
                seen += 1
                if seen == 3:
                    feed.extend([Finished("stop", TokenUsage())])
        n_ticks = len(ticks)
        await asyncio.sleep(0.02)
        return len(ticks) - n_ticks

    ticks: list[int] = []

    class Counting(EventLog):
        def _notify(self) -> None:
            ticks.append(1)
            super()._notify()

    assert asyncio.run(play()) == 0


class Stream:
    """An answer's stream into a queue of its parsed events, fed by hand."""

    def __init__(self, api: ModuleType, request: GenerationRequest) -> None:
        self.feed = EventLog(EventBridge(asyncio.get_running_loop()))
        self.sent: asyncio.Queue[list[dict[str, Any] | str]] = asyncio.Queue()
        self._stream = EventStream(self.feed, api.Writer(request, "req", 1700000000), print)

    async def run(self) -> None:
        await self._stream({"type": "http"}, self._never, self._take)

    async def _never(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            lines = [line[6:] for line in message["body"].decode().splitlines() if line.startswith("data: ")]
            await self.sent.put([json.loads(line) if line.startswith("{") else line for line in lines])

    async def next(self) -> list[dict[str, Any] | str]:
        return await asyncio.wait_for(self.sent.get(), LONGEST_WAIT_S)


def is_ping(api: ModuleType, event: dict[str, Any]) -> bool:
    """Whether an event says nothing but that the server is alive, in the API's own way."""
    if api is messages:
        return event["type"] == "ping"
    if api is responses:
        return event["type"] == "response.in_progress" and event["sequence_number"] > 1
    [choice] = event["choices"]
    return choice["finish_reason"] is None and choice.get("delta", {}) == {} and not choice.get("text")


@pytest.mark.parametrize("api", [chat_completions, messages, responses, completions])
@pytest.mark.parametrize("stage", STAGES)
def test_a_silent_stage_has_its_signs_of_life(api: ModuleType, stage: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "PING_S", 0.0)
    monkeypatch.setattr(streams, "POLL_S", 0.001)

    async def play() -> list[Any]:
        stream = Stream(api, ask([1], stream=True))
        running = asyncio.ensure_future(stream.run())
        stream.feed.extend(STAGES[stage])
        seen: list[Any] = []
        while not (seen[2:] and all(is_ping(api, event) for event in seen[-2:])):
            seen += await stream.next()
        stream.feed.extend([Finished("stop", TokenUsage(9000, 0, 1))])
        await asyncio.wait_for(running, LONGEST_WAIT_S)
        return seen

    ping = asyncio.run(play())[-1]
    wanted = {"processed": 512, "total": 9000} if stage != "queue" else None
    assert ping.get("prompt_progress") == wanted


@pytest.mark.parametrize("api", [chat_completions, messages, responses, completions])
def test_text_that_is_ready_together_is_one_piece(api: ModuleType):
    async def play() -> list[Any]:
        stream = Stream(api, ask([1], stream=True))
        stream.feed.extend([ContentDelta("Hel")])
        stream.feed.extend([ContentDelta("lo."), Finished("stop", TokenUsage(3, 0, 2))])
        await asyncio.wait_for(stream.run(), LONGEST_WAIT_S)
        return [event for _ in range(stream.sent.qsize()) for event in stream.sent.get_nowait()]

    text = json.dumps(asyncio.run(play()))
    assert text.count('"Hello."') >= 1 and '"Hel"' not in text
