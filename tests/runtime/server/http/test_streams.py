"""Streams: what is ready goes out together, and a silent stage of any API's answer has its pings."""

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from contextvars import Context
from typing import Any

import pytest
from starlette.types import Message

from server_fakes import ask
from step35.chat.events import ContentDelta, Finished, ReasoningDelta, TokenUsage, ToolCallArguments, ToolCallBegin
from step35.server.api import chat_completions, completions, messages, responses
from step35.server.api.protocol import ApiModule
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


class Callbacks(asyncio.AbstractEventLoop):
    """Stands in for an event loop: keeps what it is to call, until `run_all`."""

    def __init__(self) -> None:
        self.handles: list[asyncio.Handle] = []
        self.is_shut = False

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if self.is_shut:
            raise RuntimeError("Event loop is closed")
        self.handles.append(asyncio.Handle(callback, args, self, context))
        return self.handles[-1]

    def get_debug(self) -> bool:
        return False

    def run_all(self) -> None:
        handles, self.handles = self.handles, []
        for handle in handles:
            handle._run()


def test_all_that_is_ready_comes_with_one_callback():
    """Every token of every stream called the event loop, which took longer than to decode one of a small model."""
    loop = Callbacks()
    bridge = EventBridge(loop)
    logs = [EventLog(bridge) for _ in range(4)]
    for log in logs:
        log.publish([ContentDelta("a")])
    assert not loop.handles, "nothing goes out before it is sent"
    bridge.send()
    logs[0].publish([ContentDelta("b")])
    bridge.send()
    assert len(loop.handles) == 1, "the callback that is on its way brings what came meanwhile"
    loop.run_all()
    assert [log._events for log in logs] == [[ContentDelta("a"), ContentDelta("b")], *[[ContentDelta("a")]] * 3]
    bridge.send()
    assert not loop.handles, "nothing is ready"
    logs[1].publish([ContentDelta("c")])
    bridge.send()
    assert len(loop.handles) == 1


def test_what_is_urgent_goes_out_at_once_and_the_rest_at_intervals():
    loop = Callbacks()
    bridge = EventBridge(loop)
    log, sent = EventLog(bridge), []
    for now_s, is_urgent in ((10.0, False), (10.001, False), (10.0015, True), (10.003, False), (10.0035, False)):
        log.publish([ContentDelta("a")], is_urgent=is_urgent)
        bridge.send_if_due(now_s, at_once=False)
        sent.append(len(loop.handles))
        loop.run_all()
    assert sent == [1, 0, 1, 0, 1]
    log.publish([ContentDelta("a")])
    bridge.send_if_due(10.0036, at_once=True)
    assert len(loop.handles) == 1


def test_a_closed_loop_means_that_everybody_has_left():
    loop = Callbacks()
    bridge = EventBridge(loop)
    loop.is_shut = True
    for log in (EventLog(bridge), EventLog(bridge)):
        log.publish([ContentDelta("a")])
        bridge.send()
        assert log.is_left


def test_a_stream_that_has_ended_leaves_no_timer():
    """A stream of more than a second ticked on for ever, and kept all of its events in memory."""

    async def play() -> int:
        loop = asyncio.get_running_loop()
        log, seen = Counting(EventBridge(loop)), 0
        async with aclosing(log.follow(0.001)) as followed:
            async for _ in followed:
                seen += 1
                if seen == 3:
                    log.extend([Finished("stop", TokenUsage())])
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

    def __init__(self, api: ApiModule, request: GenerationRequest) -> None:
        self.log = EventLog(EventBridge(asyncio.get_running_loop()))
        self.sent: asyncio.Queue[list[dict[str, Any] | str]] = asyncio.Queue()
        self._stream = EventStream(self.log, api.Writer(request, "req", 1700000000), print)

    async def run(self) -> None:
        await self._stream({"type": "http"}, self._never, self._take)

    async def _never(self) -> Message:
        await asyncio.Event().wait()
        return {}

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            lines = [line[6:] for line in message["body"].decode().splitlines() if line.startswith("data: ")]
            await self.sent.put([json.loads(line) if line.startswith("{") else line for line in lines])

    async def next(self) -> list[dict[str, Any] | str]:
        return await asyncio.wait_for(self.sent.get(), LONGEST_WAIT_S)


def is_ping(api: ApiModule, event: dict[str, Any]) -> bool:
    """Whether an event says only that the answer is still being made, in the API's own way."""
    if api is messages:
        return event["type"] == "ping"
    if api is responses:
        return event["type"] == "response.in_progress" and event["sequence_number"] > 1
    [choice] = event["choices"]
    return choice["finish_reason"] is None and choice.get("delta", {}) == {} and not choice.get("text")


@pytest.mark.parametrize("api", [chat_completions, messages, responses, completions])
@pytest.mark.parametrize("stage", STAGES)
def test_a_silent_stage_has_its_pings(api: ApiModule, stage: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "PING_S", 0.0)
    monkeypatch.setattr(streams, "POLL_S", 0.001)

    async def play() -> list[Any]:
        stream = Stream(api, ask([1], stream=True))
        running = asyncio.ensure_future(stream.run())
        stream.log.extend(STAGES[stage])
        seen: list[Any] = []
        while not (seen[2:] and all(is_ping(api, event) for event in seen[-2:])):
            seen += await stream.next()
        stream.log.extend([Finished("stop", TokenUsage(9000, 0, 1))])
        await asyncio.wait_for(running, LONGEST_WAIT_S)
        return seen

    ping = asyncio.run(play())[-1]
    wanted = {"processed": 512, "total": 9000} if stage != "queue" else None
    assert ping.get("prompt_progress") == wanted


@pytest.mark.parametrize("api", [chat_completions, messages, responses, completions])
def test_text_that_is_ready_together_is_one_piece(api: ApiModule):
    async def play() -> list[Any]:
        stream = Stream(api, ask([1], stream=True))
        stream.log.extend([ContentDelta("Hel")])
        stream.log.extend([ContentDelta("lo."), Finished("stop", TokenUsage(3, 0, 2))])
        await asyncio.wait_for(stream.run(), LONGEST_WAIT_S)
        return [event for _ in range(stream.sent.qsize()) for event in stream.sent.get_nowait()]

    text = json.dumps(asyncio.run(play()))
    assert text.count('"Hello."') >= 1 and '"Hel"' not in text
