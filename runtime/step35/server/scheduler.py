"""The scheduler: one thread owns the engine; here are its start, its states and its end.

Requests come in through `submit`, events go out through each job's log. What the thread does is in engine_loop,
by the rules of policy; what comes of it is in output.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

from step35.chat.sampled_turns import TurnMap
from step35.errors import DoesNotFit
from step35.planning.memory_pressure import Level
from step35.server.cache.session_pool import SessionPool
from step35.server.engine_loop import EngineLoop
from step35.server.errors import BROKEN, BUSY, UNAVAILABLE, ApiError
from step35.server.event_log import EventBridge
from step35.server.inbox import Inbox
from step35.server.job import Job, Jobs
from step35.server.metrics import Metrics
from step35.server.output import Output
from step35.server.policy import Limits

State = Literal["loading", "ready", "draining", "stopped", "failed"]
OUT_OF_MEMORY_DRAIN_S = 5.0
"""For answers to end and say why, when the memory ran out."""

log = logging.getLogger("step35.server")


class Scheduler:
    """Runs jobs on an engine that it opens in its own thread.

    `state` goes loading, ready, draining, stopped; or failed, with the reason in `failure`.
    """

    def __init__(
        self, limits: Limits, metrics: Metrics, turns: TurnMap, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self.metrics, self.turns = limits, metrics, turns
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.jobs = Jobs()
        self._inbox = Inbox(limits)
        self._clock = clock
        self._resources = ExitStack()
        metrics.queue.set_function(lambda: len(self.jobs.waiting))
        metrics.running.set_function(lambda: len(self.jobs.running))
        metrics.decode_tps.set_function(lambda: self.decode_tps)

    @property
    def decode_tps(self) -> float:
        """Tokens a second of all answers, in the last seconds."""
        return self.metrics.throughput.tps(self._clock())

    # called from other threads

    def start(self, open_pool: Callable[[], SessionPool], on_change: Callable[[State], object]) -> None:
        """Opens the engine and runs until drained, in a thread of its own; `on_change` is called with each state.

        To be called in the event loop that the jobs' clients are in.
        """
        self._on_change = on_change
        self.bridge = EventBridge(asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._run, args=(open_pool,), name="step35-engine")
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job; raises ApiError if it can't be taken now."""
        self.check_ready()
        if not self._inbox.put(job):
            self.metrics.refused.inc()
            raise ApiError(
                429, BUSY,
                f"too many requests: expected at most {self.limits.n_parallel} running and {self.limits.n_waiting} "
                "waiting; try again later",
            )  # fmt: skip

    def check_ready(self) -> None:
        """Raises ApiError unless requests are served now."""
        if self.state != "ready":
            raise self.not_ready()

    def not_ready(self) -> ApiError:
        """Returns the error for a client that comes too early or too late."""
        return ApiError(503, UNAVAILABLE, f"not ready: the server is {self.state}; try again later")

    def drain(self, limit_s: float) -> None:
        """Takes no more jobs, ends those there are within the limit, and stops."""
        self._inbox.drain_until_s = self._clock() + limit_s
        if self.state in ("loading", "ready"):
            self._become("draining")
        self._inbox.notify()

    def close(self) -> None:
        """Waits until the thread has stopped, and frees the engine; nobody may use it any more."""
        self._thread.join()
        self._resources.close()

    # the thread

    def _run(self, open_pool: Callable[[], SessionPool]) -> None:
        try:
            pool = open_pool()
        except Exception as error:  # noqa: BLE001  (whoever runs the server reports it)
            self.failure = error
            self._become("failed")
            return
        loop = self._make_loop(pool)
        if self.state == "loading":
            self._become("ready")
        try:
            while self.state != "draining" or loop.has_work:
                loop.run_once()
            loop.finish()
        except Exception as error:
            log.exception("the engine's thread broke")
            self.failure = error
            loop.fail(ApiError(500, BROKEN, f"the server broke: {error}"))
            self._become("failed")
        else:
            self._become("stopped")

    def _make_loop(self, pool: SessionPool) -> EngineLoop:
        engine = pool.engine
        self._resources.callback(engine.close)
        engine.on_pressure.append(self._on_pressure)
        self.metrics.cells.set(engine.n_ctx)
        self.metrics.cells_used.set_function(lambda: engine.n_ctx - engine.n_free_cells)
        output = Output(self.jobs, pool, self.turns, self.metrics, self._inbox, self._clock)
        return EngineLoop(
            pool, self.jobs, self._inbox, self.bridge, output, self.metrics, self.limits.n_parallel, self._clock
        )

    def _on_pressure(self, level: Level) -> None:
        """Ends the server when the memory can't carry it any longer. Called by the watchdog's thread."""
        if level is Level.STOP:
            reason = "memory ran out: the server has ended; load with a smaller context or a smaller recipe"
            self.failure = DoesNotFit(reason)
            self.drain(OUT_OF_MEMORY_DRAIN_S)

    def _become(self, state: State) -> None:
        self.state = state
        self._on_change(state)
