"""Runs the server: the port first, then the model; two signals, one to drain and one to end."""

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from step35.errors import SettingsError, Step35Error
from step35.server.http.app import Access, make_app
from step35.server.service import Service

DRAIN_S = 30.0

log = logging.getLogger("step35.server")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8035

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def listen(address: Address) -> socket.socket:
    """Returns a listening socket; raises SettingsError if the address can't be had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"can't listen on {address}: {error.strerror or error}; choose another --host or --port"
        ) from error
    listener.setblocking(False)
    return listener


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals alone: here they mean more than to stop."""

    @contextmanager
    def capture_signals(self):
        yield


def run(
    service: Service, access: Access, listener: socket.socket, on_ready: Callable[[], None], drain_s: float = DRAIN_S
) -> None:
    """Serves until a signal or a failure; raises what kept the engine from opening."""
    runner = _Runner(service, access, listener, on_ready, drain_s)
    with asyncio.Runner(loop_factory=_loop_factory()) as loop:
        loop.run(runner.run())
    failure = service.scheduler.failure
    if isinstance(failure, Step35Error | OSError):
        raise failure
    if failure is not None:
        raise Step35Error(f"the server broke: {type(failure).__name__}: {failure}") from failure


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns uvloop's event loop, which sends a token for less of the time; it doesn't exist on Windows."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


class _Runner:
    def __init__(
        self, service: Service, access: Access, listener: socket.socket, on_ready: Callable[[], None], drain_s: float
    ) -> None:
        self._service, self._listener, self._on_ready, self._drain_s = service, listener, on_ready, drain_s
        config = uvicorn.Config(
            make_app(service, access), log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75,
            timeout_graceful_shutdown=3, server_header=False, http="httptools",
        )  # fmt: skip
        self._server = _Uvicorn(config)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        scheduler = self._service.scheduler
        scheduler.start(self._service.open, lambda state: loop.call_soon_threadsafe(self._on_state, state))
        try:
            await self._server.serve([self._listener])
        finally:
            scheduler.drain(0)
            await asyncio.to_thread(scheduler.close)

    def _on_signal(self) -> None:
        if self._service.scheduler.state != "ready":  # nothing runs yet, or this is the second signal
            log.warning("ended at once")
            logging.shutdown()
            os._exit(130)
        log.info("draining: running answers have %.0f s; again to end at once", self._drain_s)
        self._service.scheduler.drain(self._drain_s)

    def _on_state(self, state: str) -> None:
        if state == "ready":
            gc.collect()
            gc.freeze()  # what is loaded by now stays; to look through it again took 50 ms, in the middle of an answer
            self._on_ready()
        elif state in ("stopped", "failed"):
            self._server.should_exit = True
