"""A request on its way through the scheduler, and the events that its clients follow."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from step35.chat.answer import Answer
from step35.chat.events import Finished
from step35.chat.prompt_builder import Prompt
from step35.engine.decode_loop import Turn
from step35.server.cache.session_pool import SessionSlot
from step35.server.constrained_chooser import ConstrainedChooser
from step35.server.events import Event, Failed
from step35.server.generation_request import GenerationRequest

_E = TypeVar("_E", bound=Event)
ENDS = (Finished, Failed)


class EventBridge:
    """Carries events from the engine's thread into the event loop: one waking for all that is ready, for whomever."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[tuple[EventLog, Sequence[Event]]] = deque()
        self._is_woken = False

    def post(self, feed: "EventLog", events: Sequence[Event]) -> None:
        """Takes events to the next `send`."""
        self._posted.append((feed, events))

    def send(self) -> None:
        """Wakes the loop for what was posted, unless a waking is on its way."""
        if not self._posted or self._is_woken:
            return
        self._is_woken = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._is_woken = False
            while self._posted:
                self._posted.popleft()[0].is_left = True

    def _deliver(self) -> None:
        self._is_woken = False  # first: what is posted from now on may come too late for this time
        while self._posted:
            feed, events = self._posted.popleft()
            feed.take(events)


class EventLog:
    """A job's events, in order; any number of clients follow them from the first one, in the mail's event loop."""

    def __init__(self, mail: EventBridge) -> None:
        self._mail = mail
        self._events: list[Event] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._n_clients = 0
        self.is_ended = False
        self.is_left = False
        """Whether clients were there and all have gone: nobody wants the rest."""

    def enter(self) -> None:
        """Counts a client in; it may begin to follow later."""
        self._n_clients += 1
        self.is_left = False

    def leave(self) -> None:
        """Counts a client out, whether it has heard everything or not."""
        self._n_clients -= 1
        self.is_left = self._n_clients == 0

    def publish(self, events: Sequence[Event]) -> None:
        """Adds events, in the engine's thread; they come with the mail."""
        self._mail.post(self, events)

    def take(self, events: Sequence[Event]) -> None:
        """Adds events, in the event loop; nothing follows an end."""
        self._events += events
        self.is_ended = self.is_ended or (bool(events) and isinstance(events[-1], ENDS))
        self._wake()

    async def follow(self, every_s: float) -> AsyncIterator[list[Event]]:
        """Yields all events from the first on, as many as are there; and none, every so many seconds.

        One timer for the whole time, and bare futures: what is done here is done for every token.
        """
        n_seen, stop_ticking = 0, self._tick(every_s)
        try:
            while n_seen < len(self._events) or not self.is_ended:
                if n_seen == len(self._events):
                    self._waiting.append(waiting := self._mail.loop.create_future())
                    await waiting
                new = self._events[n_seen:]
                n_seen += len(new)
                yield new
        finally:
            stop_ticking()

    def last(self, kind: type[_E]) -> _E | None:
        """Returns the last event of a kind so far."""
        return next((event for event in reversed(self._events) if isinstance(event, kind)), None)

    def _tick(self, every_s: float) -> Callable[[], None]:
        """Wakes whoever waits, over and over; returns what ends that."""

        def tick() -> None:
            nonlocal timer
            timer = self._mail.loop.call_later(every_s, tick)
            self._wake()

        timer = self._mail.loop.call_later(every_s, tick)
        return lambda: timer.cancel()  # of the latest

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():  # a client that has left has cancelled its own
                future.set_result(None)


@dataclass(slots=True, eq=False)
class Job:
    """A request: what was asked, and how far it is. `held`, `turn` and `answer` are set while it runs."""

    id: str
    ask: GenerationRequest
    prompt: Prompt
    feed: EventLog
    grammar: str | None = None
    n_reasoned: int = 0
    """Tokens of reasoning in earlier turns of the same request."""
    echo: str = ""
    """Text that goes before the answer's."""
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    held: SessionSlot | None = None
    turn: Turn | None = None
    guide: ConstrainedChooser | None = None
    answer: Answer | None = None
    n_seen: int = 0
    n_cached: int = 0
    n_generated: int = 0
    """The turn's own count is another's once its session serves the next request."""
    next_check: int = 0
    finish: str | None = None
    """How it ended: stop, length, tool_calls, cancelled or error."""

    @property
    def is_prefilling(self) -> bool:
        return self.turn is not None and self.turn.n_pending > 1 and self.turn.n_generated == 0
