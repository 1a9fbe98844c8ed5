"""A request on its way through the scheduler: a job waits, runs, perhaps waits again, and ends."""

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from step35.chat.answer import Answer
from step35.chat.prompt_builder import Prompt
from step35.engine.turn import Turn
from step35.server.cache.session_pool import SessionSlot
from step35.server.constrained_chooser import ConstrainedChooser
from step35.server.event_log import EventLog
from step35.server.generation_request import GenerationRequest

End = Literal["stop", "length", "tool_calls", "cancelled", "error"]


@dataclass(slots=True)
class JobStatus:
    """How far a job is, for the log and the page. The engine's thread writes it, the event loop reads it."""

    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    run: "Run | None" = None
    """None until the job runs, and while it waits again; stays when it has ended."""
    end: End | None = None
    """How it ended."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request with its prompt, as it waits for a session; its clients follow `events`."""

    id: str
    request: GenerationRequest
    prompt: Prompt
    events: EventLog
    grammar: str | None = None
    n_reasoned: int = 0
    """Tokens of reasoning in earlier turns of the same request."""
    echo: str = ""
    """Text that goes before the answer's."""
    status: JobStatus = field(default_factory=JobStatus)

    def without_echo(self) -> Self:
        """Returns the job as it waits again: its clients have the echo."""
        return replace(self, echo="")


@dataclass(slots=True, eq=False)
class Run:
    """A job that a session serves."""

    job: Job
    slot: SessionSlot
    turn: Turn
    chooser: ConstrainedChooser
    answer: Answer
    n_cached: int
    n_seen: int
    """Tokens of the session that the answer has taken, the prompt's included."""
    n_generated: int = 0
    """The turn's own count is another's once its session serves the next request."""
    next_check: int = 0
    first_token_s: float | None = None

    @property
    def is_prefilling(self) -> bool:
        """Whether it still reads its prompt."""
        return self.turn.n_pending > 1 and self.turn.n_generated == 0


@dataclass(frozen=True, slots=True)
class Jobs:
    """The jobs that the engine's thread has; others may look at them."""

    waiting: deque[Job] = field(default_factory=deque)
    running: list[Run] = field(default_factory=list)
