"""All events of an answer, collected: what a client gets that doesn't stream. Pure."""

from collections.abc import Iterable

from step35.chat.collected import Collected
from step35.server.events import Event, Failed, Progress


def collect(events: Iterable[Event]) -> Collected:
    """Returns what the events say, joined; raises the ApiError of one that failed."""
    answer = Collected()
    for event in events:
        match event:
            case Failed(error):
                raise error
            case Progress():
                pass
            case _:
                answer.add(event)
    return answer
