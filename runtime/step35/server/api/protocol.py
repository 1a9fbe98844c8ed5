"""What an API's module has for the routes: a reader of bodies, and writers of streams, whole answers and errors."""

from collections.abc import Iterable
from typing import Any, Protocol

from pydantic import BaseModel

from step35.server.errors import ApiError
from step35.server.events import Event, Progress, Sse
from step35.server.generation_request import GenerationRequest


class StreamWriter(Protocol):
    """Writes one answer's events as server-sent events."""

    def open(self) -> list[Sse]:
        """Returns what comes before the first event."""
        ...

    def event(self, event: Event) -> list[Sse]:
        """Returns what an event becomes; it may be nothing."""
        ...

    def ping(self, progress: Progress | None) -> list[Sse]:
        """Returns what says that the answer is still being made, and how far its prompt is."""
        ...

    def close(self) -> list[Sse]:
        """Returns what comes after the last event."""
        ...


class ApiModule(Protocol):
    """A module of this folder; `created` is a time in seconds since 1970."""

    @property
    def REQUEST_BODY(self) -> type[BaseModel]:
        """The model that checks a request's body."""
        ...

    def read(self, data: dict[str, Any], /) -> GenerationRequest:
        """Returns what a body asks; raises ApiError that says what is wrong with it."""
        ...

    def Writer(self, request: GenerationRequest, request_id: str, created: int, /) -> StreamWriter:
        """Returns what writes the answer as a stream."""
        ...

    def whole(
        self, request: GenerationRequest, request_id: str, created: int, events: Iterable[Event], /
    ) -> dict[str, Any]:
        """Returns the body of an answer that isn't streamed; raises the ApiError of one that failed."""
        ...

    def error_body(self, error: ApiError, request_id: str, /) -> dict[str, Any]:
        """Returns the body of an error's answer."""
        ...
