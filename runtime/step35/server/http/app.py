"""The routes: each reads a request, calls the service, and answers in its API's form."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step35.server.api import chat_completions, completions, messages, responses
from step35.server.api.protocol import ApiModule
from step35.server.errors import BROKEN, FORBIDDEN, INVALID, NOT_FOUND, UNAUTHORIZED, ApiError, bad_request
from step35.server.generation_request import GenerationRequest
from step35.server.http.openapi import description
from step35.server.http.streams import (
    MAX_BODY,
    EventStream,
    LogEntry,
    all_events,
    error_response,
    failure,
    parse_json,
    read_body,
    unless_left,
)
from step35.server.job import Job
from step35.server.service import Service

APIS: dict[str, ApiModule] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
}
OPEN_PATHS = ("/health", "/")
"""Served without a key: what watches a server shouldn't need one, and the page has no data; it asks for the key."""
PATH_HINT = "; a base URL ends with /v1 for OpenAI's clients, and without it for Anthropic's"
PAGE = Path(__file__).with_name("page.html")

log = logging.getLogger("step35.server")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may send requests, how long they may be, and where they are recorded."""

    api_key: str | None = None
    cors_origin: str | None = None
    max_body: int = MAX_BODY
    record_dir: Path | None = None


def make_app(service: Service, access: Access) -> ASGIApp:
    """Returns the server as an ASGI application."""
    routes = _Routes(service, access)
    table = [
        *(Route(path, routes.answer, methods=["POST"]) for path in APIS),
        Route("/v1/messages/count_tokens", routes.count_tokens, methods=["POST"]),
        Route("/v1/embeddings", routes.embeddings, methods=["POST"]),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/tokenize", routes.tokenize, methods=["POST"]),
        Route("/detokenize", routes.detokenize, methods=["POST"]),
        Route("/health", routes.health),
        Route("/status", routes.status),
        Route("/metrics", routes.metrics),
        Route("/openapi.json", routes.openapi),
        Route("/", routes.page),
    ]
    handlers = dict.fromkeys((ApiError, HTTPException), routes.on_error)
    return Gate(Starlette(routes=table, exception_handlers=handlers), service, access, {route.path for route in table})


class Gate:
    """Around every request: an id, the key, the origin, one line in the log, and no error without a form."""

    def __init__(self, app: ASGIApp, service: Service, access: Access, paths: Collection[str]) -> None:
        self._app, self._service, self._access, self._paths = app, service, access, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        entry = LogEntry(f"req_{uuid.uuid4().hex[:24]}", scope["method"], scope["path"])
        scope.setdefault("state", {})["log_entry"] = entry
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *self._headers(scope, entry)]}
            await send(message)

        try:
            response = self._refusal(scope)
            await (response or self._app)(scope, receive, send_on)
        except ClientDisconnect:
            entry.facts["left"] = True
        except Exception as error:
            log.exception("request %s broke", entry.id)
            if not status:
                broken = ApiError(500, BROKEN, f"the server broke: {type(error).__name__}")
                await _error(scope["path"], entry, broken)(scope, receive, send_on)
        finally:
            self._log(entry, status)

    def _headers(self, scope: Scope, entry: LogEntry) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", entry.id.encode()), (b"request-id", entry.id.encode())]
        origin = self._access.cors_origin
        if origin:
            headers += [
                (b"access-control-allow-origin", origin.encode()),
                (b"access-control-allow-headers", b"*, authorization"),
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
                (b"access-control-expose-headers", b"x-request-id, retry-after"),
                (b"access-control-max-age", b"600"),
                (b"vary", b"origin"),
            ]
        return headers

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] == "OPTIONS" and self._access.cors_origin:
            return Response(status_code=204)  # a browser asks before it sends a key
        headers = dict(scope["headers"])
        if scope["path"] in OPEN_PATHS:
            return None
        entry = scope["state"]["log_entry"]
        if reason := self._why_foreign(headers):
            return _error(scope["path"], entry, ApiError(403, FORBIDDEN, reason))
        if not self._has_key(headers):
            reason = f"{'wrong' if _given_key(headers) else 'no'} API key: expected the one of --api-key"
            return _error(scope["path"], entry, ApiError(401, UNAUTHORIZED, reason))
        return None

    def _why_foreign(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Says why a request isn't let in: a page of another site, or a name that a foreign DNS server points here."""
        origin, host = (headers.get(name, b"").decode("latin-1")[:200] for name in (b"origin", b"host"))
        if origin and self._access.cors_origin not in (origin, "*") and origin.partition("://")[2] != host:
            return f"foreign origin: expected this server's own page, or the one that --cors names, got {origin!r}"
        if self._access.api_key is None and not _is_address(host):
            return f"unknown host: without --api-key expected an IP address or localhost, got {host!r}"
        return None

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        key = self._access.api_key
        return key is None or hmac.compare_digest(_given_key(headers), key.encode())

    def _log(self, entry: LogEntry, status: int) -> None:
        path = entry.path if entry.path in self._paths else "other"
        self._service.metrics.requests.labels(path, status).inc()
        line = {"id": entry.id, "method": entry.method, "path": entry.path[:200], "status": status}
        line |= {"ms": round((time.monotonic() - entry.started_s) * 1000), **entry.facts}
        is_quiet = entry.method == "GET" and (status < 400 or entry.path in OPEN_PATHS)
        level = logging.DEBUG if is_quiet else logging.INFO
        log.log(level, "request %s", json.dumps(line))


def _given_key(headers: Mapping[bytes, bytes]) -> bytes:
    """Returns the key that a client sent, in either API's way; empty if none."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return headers.get(b"x-api-key") or (key.strip() if scheme.lower() == b"bearer" else b"")


def _is_address(host: str) -> bool:
    """Whether a Host header is an IP address or localhost, which no DNS server can give away."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _of_route(request: Request, error: HTTPException) -> ApiError:
    kind, hint = (NOT_FOUND, PATH_HINT) if error.status_code == 404 else (INVALID, "")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}{hint}"
    return ApiError(error.status_code, kind, message)


def _error(path: str, entry: LogEntry, error: ApiError) -> Response:
    entry.facts["error"] = error.message[:300]
    api = messages if path.startswith("/v1/messages") else APIS.get(path, chat_completions)
    return error_response(error, api.error_body(error, entry.id))


class _Routes:
    """The handlers, by name as in `make_app`."""

    def __init__(self, service: Service, access: Access) -> None:
        self._service, self._access = service, access

    # errors

    async def on_error(self, request: Request, error: Exception) -> Response:
        """Puts an ApiError, or an error of a route's path or method, in the API's form."""
        path, entry = request.url.path, request.state.log_entry
        if isinstance(error, ApiError):
            return _error(path, entry, error)
        if isinstance(error, HTTPException):
            response = _error(path, entry, _of_route(request, error))
            response.headers.update(error.headers or {})
            return response
        raise error

    # answers

    async def answer(self, request: Request) -> Response:
        entry, api = request.state.log_entry, APIS[request.url.path]
        data = await read_body(request, self._access.max_body)
        asked = api.read(parse_json(data))
        asked = replace(asked, model=asked.model or self._service.serving.name)
        self._record(entry, "request.json", data)
        job, joined = await self._service.submit(asked, entry.id, self._join_key(request, data, asked))

        def on_end(is_left: bool) -> None:
            job.events.leave()
            self._note(entry, job, joined, is_left)

        created = int(time.time())
        if asked.stream:
            return EventStream(job.events, api.Writer(asked, entry.id, created), on_end)
        events, is_left = None, True
        try:
            events, is_left = await unless_left(all_events(job.events), request.receive)
        finally:
            on_end(is_left)
        if is_left or events is None:
            return Response(status_code=499)
        if error := failure(events):
            raise error
        return JSONResponse(api.whole(asked, entry.id, created, events))

    def _join_key(self, request: Request, data: bytes, asked: GenerationRequest) -> str | None:
        """Returns what two tries of one request have in common; None if a second one wants an answer of its own.

        Without a seed, the same body twice may mean two samples, unless the client says that it tries again.
        """
        is_retry = request.headers.get("x-stainless-retry-count", "0") != "0"
        if not (is_retry or asked.has_seed or asked.sampling.temperature == 0):
            return None
        return hashlib.sha256(request.url.path.encode() + b"\0" + data).hexdigest()

    def _note(self, entry: LogEntry, job: Job, joined: bool, is_left: bool) -> None:
        status, run = job.status, job.status.run
        facts: dict[str, Any] = {"finish": status.end or ("left" if is_left else "running")}
        if run is not None:
            facts |= {"n_prompt": run.turn.n_prompt, "n_cached": run.n_cached, "n_generated": run.n_generated}
            facts |= {"n_turns": len(job.prompt.turns), "n_turns_known": job.prompt.n_known}
        if status.started_s is not None:
            facts["wait_ms"] = round((status.started_s - status.arrived_s) * 1000)
        if run is not None and run.first_token_s is not None:
            facts["first_token_ms"] = round((run.first_token_s - status.arrived_s) * 1000)
        entry.facts |= facts | ({"left": True} if is_left else {}) | ({"joined": job.id} if joined else {})
        if run is not None:
            self._record(entry, "answer.txt", repr(run.answer.message()).encode(errors="replace"))

    def _record(self, entry: LogEntry, name: str, data: bytes) -> None:
        if self._access.record_dir:
            (self._access.record_dir / f"{entry.id}-{name}").write_bytes(data)

    async def count_tokens(self, request: Request) -> Response:
        self._service.scheduler.check_ready()
        body = parse_json(await read_body(request, self._access.max_body))
        n_tokens = await asyncio.to_thread(self._service.count, messages.read_count(body))
        return JSONResponse(messages.counted(n_tokens))

    async def embeddings(self, request: Request) -> Response:
        raise ApiError(
            501,
            INVALID,
            "embeddings are not supported: Step-3.5 is a generator without a pooling head; use an embedding model",
        )

    # models

    def _model(self) -> dict[str, Any]:
        service = self._service
        entry = {"id": service.serving.name, "object": "model", "created": service.created, "owned_by": "step35"}
        entry |= {"type": "model", "display_name": service.serving.name}
        return entry | ({"context_length": service.engine.n_ctx} if service.scheduler.state == "ready" else {})

    async def models(self, request: Request) -> Response:
        entry = self._model()
        return JSONResponse(
            {"object": "list", "data": [entry], "has_more": False, "first_id": entry["id"], "last_id": entry["id"]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._service.serving.name:
            raise ApiError(404, NOT_FOUND, f"no such model: expected {self._service.serving.name}, got {name[:200]!r}")
        return JSONResponse(self._model())

    # texts and tokens

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        text = body.get("content", body.get("prompt"))
        if not isinstance(text, str):
            raise bad_request(f"bad content: expected a text, got {type(text).__name__}", "content")
        add_bos = body.get("add_special", False)
        if not isinstance(add_bos, bool):
            raise bad_request(f"bad add_special: expected true or false, got {type(add_bos).__name__}", "add_special")
        tokens = await asyncio.to_thread(self._service.engine.tokenize, text, add_bos=add_bos)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        tokens, n_vocab = body.get("tokens"), self._service.engine.n_vocab
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < n_vocab for token in tokens):
            raise bad_request(f"bad tokens: expected a list of ids 0 to {n_vocab - 1}", "tokens")
        return JSONResponse({"content": await asyncio.to_thread(self._service.text_of_tokens, tokens)})

    async def _body(self, request: Request) -> dict[str, Any]:
        self._service.scheduler.check_ready()
        return parse_json(await read_body(request, self._access.max_body))

    # the state of all

    async def health(self, request: Request) -> Response:
        state = self._service.scheduler.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def status(self, request: Request) -> Response:
        return JSONResponse(self._service.status())

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description(APIS))

    async def page(self, request: Request) -> Response:
        if not PAGE.exists():
            raise ApiError(404, NOT_FOUND, "no page in this build; see /status")
        return FileResponse(PAGE, media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})


_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)
