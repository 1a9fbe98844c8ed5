"""A request on its way through the scheduler, and the events that its clients follow."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from step35.generation import Turn
from step35.server.answer import Answer
from step35.server.choosing import Guide
from step35.server.conversation import Ask, Event, Failed, Finished
from step35.server.conversations import Held
from step35.server.prompts import Prompt


class Feed:
    """A job's events, in order; any number of clients follow them from the first one, in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: list[Event] = []
        self._changed: set[asyncio.Event] = set()
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
        """Adds events; callable from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._publish, events)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.is_left = True

    def _publish(self, events: Sequence[Event]) -> None:
        self._events += events
        self.is_ended = self.is_ended or any(isinstance(event, Finished | Failed) for event in events)
        for changed in self._changed:
            changed.set()

    async def follow(self, timeout: float) -> AsyncIterator[Sequence[Event]]:
        """Yields all events from the first on, those there are at a time; none whenever none came for `timeout` seconds."""
        changed, n_seen = asyncio.Event(), 0
        self._changed.add(changed)
        try:
            while n_seen < len(self._events) or not self.is_ended:
                if n_seen < len(self._events):
                    new = self._events[n_seen:]
                    n_seen += len(new)
                    yield new
                    continue
                changed.clear()
                try:
                    async with asyncio.timeout(timeout):  # cheaper than wait_for, which makes a task for every token
                        await changed.wait()
                except TimeoutError:
                    yield ()
        finally:
            self._changed.discard(changed)


@dataclass(slots=True, eq=False)
class Job:
    """A request: what was asked, and how far it is. `held`, `turn` and `answer` are set while it runs."""

    id: str
    ask: Ask
    prompt: Prompt
    feed: Feed
    grammar: str | None = None
    n_reasoned: int = 0
    """Tokens of reasoning in earlier turns of the same request."""
    echo: str = ""
    """Text that goes before the answer's."""
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    held: Held | None = None
    turn: Turn | None = None
    guide: Guide | None = None
    answer: Answer | None = None
    n_seen: int = 0
    n_cached: int = 0
    next_check: int = 0
    finish: str | None = None
    """How it ended: stop, length, tool_calls, cancelled or error."""

    @property
    def is_prefilling(self) -> bool:
        return self.turn is not None and self.turn.n_todo > 1 and self.turn.n_generated == 0
