"""A service over the fake llama.cpp, for tests of what the server does with its jobs."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from fake_native import FakeContext, Script, loader
from step35.engine.engine import Engine
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling
from step35.server.events import Event
from step35.server.generation_request import GenerationRequest
from step35.server.job import Job
from step35.server.policy import Limits
from step35.server.service import Service, Serving

_T = TypeVar("_T")

GREEDY = Sampling(temperature=0)
MAX_WAIT_S = 60


class Gate:
    """Lets the fake trunk decode so many times, then stops it until it is opened: a Script's `on_decode`."""

    def __init__(self, n_decodes: int = 0) -> None:
        self._n_decodes = n_decodes
        self._is_reached, self._is_open = threading.Event(), threading.Event()

    def __call__(self, context: FakeContext) -> None:
        if context.head is None and len(context.decodes) >= self._n_decodes:
            self._is_reached.set()
            assert self._is_open.wait(MAX_WAIT_S), "nobody opened the gate"

    async def reached(self) -> None:
        """Waits until the trunk stands before the gate."""
        assert await asyncio.to_thread(self._is_reached.wait, MAX_WAIT_S), "the trunk never came to the gate"

    def open(self) -> None:
        self._is_open.set()


def fake_service(
    script: Script | None = None,
    *,
    n_parallel: int = 3,
    n_waiting: int = 8,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> Service:
    """Returns a service that has not been started; `options` are EngineOptions'."""
    defaults: dict[str, Any] = {"draft": "2", "n_ctx": 400, "n_batch": 16, "n_sessions": 5}
    engine_options = EngineOptions(Path("fake"), **defaults | options)
    serving = Serving("fake", Limits(n_parallel, n_waiting))
    return Service(serving, lambda: Engine(engine_options, loading=loader(script or Script())), clock)


def ask(prompt: list[int], n_predict: int = 8, **fields: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), GREEDY, n_predict, **fields)


def serve(service: Service, talk: Callable[[Service], Coroutine[Any, Any, _T]]) -> _T:
    """Runs a coroutine with the service ready, then drains it; returns the coroutine's result."""

    async def run() -> _T:
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        service.scheduler.start(service.open, lambda state: loop.call_soon_threadsafe(changed.set))
        await changed.wait()
        assert service.scheduler.failure is None, service.scheduler.failure
        try:
            return await asyncio.wait_for(talk(service), 1200)
        finally:
            service.scheduler.drain(10)
            await asyncio.to_thread(service.scheduler.close)

    return asyncio.run(run())


async def events_of(job: Job) -> list[Event]:
    async with aclosing(job.events.follow(1.0)) as followed:
        return [event async for new in followed for event in new]


async def answer(
    service: Service, request: GenerationRequest, name: str = "r", join_key: str | None = None
) -> tuple[Job, list[Event]]:
    job, _ = await service.submit(request, name, join_key)
    return job, await events_of(job)
