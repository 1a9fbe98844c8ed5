"""What happens to a request, in order, from the scheduler to an API's writer. Pure."""

from dataclasses import dataclass

from step35.chat.events import AnswerEvent
from step35.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Progress:
    """Prefill: tokens of the prompt done (the cached ones at first) of all."""

    n_done: int
    n_total: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of an answer that broke after it had begun."""

    error: ApiError


Event = AnswerEvent | Progress | Failed


@dataclass(frozen=True, slots=True)
class Sse:
    """One server-sent event; `event` is its name, if the API names its events."""

    event: str | None
    data: str
