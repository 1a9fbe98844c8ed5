"""HTTP for the routes: bodies with limits, errors in each API's form, streams that notice when nobody listens."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from step35.chat.events import merged
from step35.server.api.protocol import StreamWriter
from step35.server.errors import INVALID, ApiError, bad_request, too_large
from step35.server.event_log import EventLog
from step35.server.events import Event, Failed, Progress, Sse

_T = TypeVar("_T")

MAX_BODY = 64 << 20
PING_S = 5.0
POLL_S = 1.0
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


@dataclass(slots=True)
class LogEntry:
    """What the log says about one request."""

    id: str
    method: str
    path: str
    started_s: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Returns a request's body; raises ApiError 413 as soon as it is too long, 415 if it is compressed."""
    packed = request.headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
        raise ApiError(
            415, INVALID, f"packed body: content-encoding expected none, got {packed[:40]!r}; send it as it is"
        )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large(f"body too long: expected at most {max_bytes} bytes, got {length}")
    pieces, n_bytes = [], 0
    async for piece in request.stream():
        n_bytes += len(piece)
        if n_bytes > max_bytes:
            raise too_large(f"body too long: expected at most {max_bytes} bytes, got more")
        pieces.append(piece)
    return b"".join(pieces)


def parse_json(data: bytes) -> dict[str, Any]:
    """Returns a body's JSON object; raises ApiError 400 on anything else."""
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"bad body: expected JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad_request(f"bad body: expected a JSON object, got {type(body).__name__}")
    if b"\\u" in data and not _is_unicode(body):
        raise bad_request("bad body: expected Unicode text, got half of a surrogate pair")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _is_unicode(body: Any) -> bool:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def error_response(error: ApiError, body: dict[str, Any]) -> Response:
    """Returns an error in an API's form; `body` is that form."""
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status >= 500 and error.status != 503:
        headers["x-should-retry"] = "false"  # another try would break alike
    return JSONResponse(body, error.status, headers)


async def until_left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(work: Awaitable[_T], receive: Receive) -> tuple[_T | None, bool]:
    """Returns the work's result, and False; or None and True if the client went before it was done."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(until_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return (task.result(), False) if task.done() else (None, True)
    finally:
        for future in (task, left):
            future.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def all_events(log: EventLog) -> list[Event]:
    """Returns all events of an answer, once it has ended."""
    events: list[Event] = []
    async with aclosing(log.follow(POLL_S)) as followed:
        async for new in followed:
            events += new
    return events


def failure(events: Sequence[Event]) -> ApiError | None:
    """Returns the error that ended an answer, if one did."""
    return next((event.error for event in events if isinstance(event, Failed)), None)


def encode(events: Sequence[Sse]) -> bytes:
    """Returns server-sent events as they go over the wire."""
    return "".join((f"event: {e.event}\n" if e.event else "") + f"data: {e.data}\n\n" for e in events).encode()


class EventStream(Response):
    """A job's answer as server-sent events: headers at once, a ping every few seconds."""

    def __init__(self, log: EventLog, writer: StreamWriter, on_end: Callable[[bool], None]) -> None:
        """`on_end` is called at the end, with whether the client had left before it."""
        super().__init__(headers=SSE_HEADERS)
        del self.headers["content-length"]
        self._log, self._writer, self._on_end = log, writer, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_left = True
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            _, is_left = await unless_left(self._write(send), receive)
        finally:
            self._on_end(is_left)

    async def _write(self, send: Send) -> None:
        async def out(events: Sequence[Sse], *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": encode(events), "more_body": more})

        writer, log = self._writer, self._log
        await out(writer.open())
        last_sent = time.monotonic()
        async with aclosing(log.follow(POLL_S)) as followed:
            async for new in followed:
                written = [sse for event in merged(new) for sse in writer.event(event)]
                if not written and time.monotonic() - last_sent >= PING_S:
                    written = writer.ping(log.last(Progress))
                if written:
                    await out(written)
                    last_sent = time.monotonic()
        await out(writer.close(), more=False)
