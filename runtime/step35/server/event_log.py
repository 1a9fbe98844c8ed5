"""The events of an answer: out of the engine's thread into the event loop, and there to the clients that follow."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from step35.chat.events import Finished
from step35.server.events import Event, Failed

_E = TypeVar("_E", bound=Event)
ENDS = (Finished, Failed)
MIN_SEND_INTERVAL_S = 0.002
"""To send a token costs as much as to decode one of a small model: those of quick decodes go out together."""


class EventBridge:
    """Carries events from the engine's thread into the event loop, with one callback for all that is ready."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[tuple[EventLog, Sequence[Event]]] = deque()
        self._is_scheduled = False
        self._is_urgent = False
        self._last_sent_s = 0.0

    def post(self, log: "EventLog", events: Sequence[Event], *, is_urgent: bool = False) -> None:
        """Takes events to the next `send`; an urgent one doesn't wait for MIN_SEND_INTERVAL_S."""
        self._posted.append((log, events))
        if is_urgent:
            self._is_urgent = True

    def send_if_due(self, now_s: float, *, at_once: bool) -> None:
        """Sends what was posted, unless nothing is urgent and the last time is too short ago."""
        if at_once or self._is_urgent or now_s - self._last_sent_s >= MIN_SEND_INTERVAL_S:
            self.send()
            self._last_sent_s, self._is_urgent = now_s, False

    def send(self) -> None:
        """Schedules the delivery of what was posted, unless one is scheduled."""
        if not self._posted or self._is_scheduled:
            return
        self._is_scheduled = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody follows any more
            self._is_scheduled = False
            while self._posted:
                self._posted.popleft()[0].is_left = True

    def _deliver(self) -> None:
        self._is_scheduled = False  # first: what is posted from now on may come too late for this time
        while self._posted:
            log, events = self._posted.popleft()
            log.extend(events)


class EventLog:
    """A job's events, in order; any number of clients follow them from the first one, in the bridge's event loop."""

    def __init__(self, bridge: EventBridge) -> None:
        self._bridge = bridge
        self._events: list[Event] = []
        self._followers: list[asyncio.Future[None]] = []
        self._n_clients = 0
        self.is_ended = False
        self.is_left = False
        """Whether clients were there and all have gone: nobody reads what follows."""

    def enter(self) -> None:
        """Counts a client in; it may begin to follow later."""
        self._n_clients += 1
        self.is_left = False

    def leave(self) -> None:
        """Counts a client out, whether it has read everything or not."""
        self._n_clients -= 1
        self.is_left = self._n_clients == 0

    def publish(self, events: Sequence[Event], *, is_urgent: bool = False) -> None:
        """Adds events, in the engine's thread; the bridge brings them."""
        self._bridge.post(self, events, is_urgent=is_urgent)

    def extend(self, events: Sequence[Event]) -> None:
        """Adds events, in the event loop; nothing follows an end."""
        self._events += events
        self.is_ended = self.is_ended or (bool(events) and isinstance(events[-1], ENDS))
        self._notify()

    async def follow(self, every_s: float) -> AsyncGenerator[list[Event], None]:
        """Yields all events from the first on, as many as are there; and none, every so many seconds.

        One timer for the whole time, and bare futures: what is done here is done for every token.
        """
        n_seen, stop_ticking = 0, self._tick(every_s)
        try:
            while n_seen < len(self._events) or not self.is_ended:
                if n_seen == len(self._events):
                    self._followers.append(follower := self._bridge.loop.create_future())
                    await follower
                new = self._events[n_seen:]
                n_seen += len(new)
                yield new
        finally:
            stop_ticking()

    def last(self, kind: type[_E]) -> _E | None:
        """Returns the last event of a kind so far."""
        return next((event for event in reversed(self._events) if isinstance(event, kind)), None)

    def _tick(self, every_s: float) -> Callable[[], None]:
        """Notifies the followers over and over; returns what ends that."""

        def tick() -> None:
            nonlocal timer
            timer = self._bridge.loop.call_later(every_s, tick)
            self._notify()

        def stop() -> None:
            timer.cancel()  # the latest

        timer = self._bridge.loop.call_later(every_s, tick)
        return stop

    def _notify(self) -> None:
        followers, self._followers = self._followers, []
        for future in followers:
            if not future.done():  # a client that has left has cancelled its own
                future.set_result(None)
