"""What the engine's thread does: it takes in jobs, starts them, and advances all runs together, a decode at a time.

What a decode brought is sent when the next one begins: then the event loop has the interpreter for itself.
"""

import logging
from collections.abc import Callable, Sequence

from step35.chat.events import ContentDelta
from step35.chat.prompt_builder import LEAST_CHECKPOINT
from step35.engine.decode_loop import step
from step35.engine.turn import Turn
from step35.errors import Cancelled, ContextFull, Step35Error
from step35.server.cache.session_pool import SessionPool
from step35.server.errors import BROKEN, UNAVAILABLE, ApiError, api_error
from step35.server.event_log import EventBridge
from step35.server.events import Progress
from step35.server.inbox import Inbox
from step35.server.job import Job, Jobs, Run
from step35.server.metrics import Metrics
from step35.server.output import Output
from step35.server.policy import PrefillPolicy, waits_again
from step35.server.run_start import RunStarter

IDLE_BEFORE_SAVE_S = 0.5
MAX_UNSAVED_S = 60.0
"""Sessions are written when nothing runs; a server that is never idle writes one this often."""
POLL_S, POLL_UNSAVED_S = 5.0, 0.1
"""How long an idle thread waits for a job, without and with sessions to be written."""

log = logging.getLogger("step35.server")


class EngineLoop:
    """The jobs on an open engine; everything here runs in the thread that owns it."""

    def __init__(
        self,
        pool: SessionPool,
        jobs: Jobs,
        inbox: Inbox,
        bridge: EventBridge,
        output: Output,
        metrics: Metrics,
        n_parallel: int,
        clock: Callable[[], float],
    ) -> None:
        self._engine, self._pool = pool.engine, pool
        self._waiting, self._running = jobs.waiting, jobs.running
        self._inbox, self._bridge, self._output, self._metrics = inbox, bridge, output, metrics
        self._n_parallel, self._clock = n_parallel, clock
        self._starter = RunStarter(pool.engine)
        self._policy = PrefillPolicy(pool.engine.options.n_batch)
        self._last_active_s = self._last_save_s = clock()

    @property
    def has_work(self) -> bool:
        """Whether a job runs, waits or comes in."""
        return bool(self._running or self._waiting) or not self._inbox.is_empty

    def run_once(self) -> None:
        """Looks at what changed, and advances what runs by a decode."""
        self._receive()
        self._look_after_clients()
        self._admit()
        if not self._running:
            self._bridge.send()
            return
        self._advance()
        self._last_active_s = self._clock()
        if self._last_active_s - self._last_save_s >= MAX_UNSAVED_S and self._pool.save_one():
            self._last_save_s = self._last_active_s

    def finish(self) -> None:
        """Sends what is left and writes what isn't saved."""
        self._bridge.send()
        self._pool.save_all()

    def fail(self, error: ApiError) -> None:
        """Ends all jobs with an error."""
        for job in (*(run.job for run in self._running), *self._waiting):
            self._output.fail(job, error)
        self._running.clear()
        self._waiting.clear()
        self._bridge.send()

    # what changed

    def _receive(self) -> None:
        """Takes in the jobs that have come; waits for one if there is nothing to do."""
        is_idle = not self._running and not self._waiting and not self._inbox.is_draining
        if is_idle:
            self._bridge.send()
            self._waiting.extend(self._inbox.receive(POLL_UNSAVED_S if self._pool.has_unsaved else POLL_S))
            if self._clock() - self._last_active_s >= IDLE_BEFORE_SAVE_S:
                self._pool.save_one()
                self._last_save_s = self._clock()
        elif not self._inbox.is_empty:  # seldom, between two decodes
            self._waiting.extend(self._inbox.receive(0))

    def _look_after_clients(self) -> None:
        for job in [job for job in self._waiting if job.events.is_left]:
            self._waiting.remove(job)
            self._output.cancel(job)
        for run in [run for run in self._running if run.job.events.is_left]:
            self._output.complete(run, "cancelled")
        if self._clock() > self._inbox.drain_until_s:
            self._end_all()

    def _end_all(self) -> None:
        for run in list(self._running):
            self._output.complete(run, "length")
        while self._waiting:
            self._output.fail(self._waiting.popleft(), ApiError(503, UNAVAILABLE, "the server is shutting down"))

    # starting

    def _admit(self) -> None:
        """Starts the waiting jobs that a session can serve now; one that fails to start is done with, too."""
        for job in list(self._waiting):
            if len(self._running) >= self._n_parallel:
                return
            try:
                is_done = self._start(job)
            except Exception as error:
                log.exception("request %s can't begin", job.id)
                self._output.fail(job, ApiError(500, BROKEN, f"the request can't begin: {type(error).__name__}"))
                is_done = True
            if is_done:
                self._waiting.remove(job)

    def _start(self, job: Job) -> bool:
        slot = self._pool.acquire(job.prompt)
        if slot is None:
            return False
        try:
            run = self._starter.start(job, slot)
        except Step35Error as error:
            slot.is_running = False
            self._output.fail(job, api_error(error))
            return True
        except Exception:
            self._pool.drop(slot)
            raise
        if slot.session.n_past >= LEAST_CHECKPOINT:
            slot.session.checkpoint()  # an edit of the last message comes back here
        slot.turn = run.turn
        job.status.run, job.status.started_s = run, self._clock()
        self._running.append(run)
        progress = Progress(run.n_cached, len(job.prompt.tokens))
        job.events.publish([progress, ContentDelta(job.echo)] if job.echo else [progress])
        if run.turn.finish:
            self._output.complete(run, "length")
        return True

    # advancing

    def _advance(self) -> None:
        """One decode for the runs whose time it is."""
        prompts = [run for run in self._running if run.is_prefilling]
        answers = [run for run in self._running if run not in prompts] if prompts else self._running
        self._bridge.send_if_due(self._clock(), at_once=bool(prompts))
        reads_prompts = bool(prompts) and self._policy.reads_prompts(bool(answers))
        chunk = self._chunk(prompts, answers) if reads_prompts else None
        runs = self._running if reads_prompts else answers
        started_s = self._clock()
        if not self._step([run.turn for run in runs], chunk):
            return
        step_s = self._clock() - started_s
        self._policy.charge(step_s, read_prompts=reads_prompts, has_answers=bool(answers))
        (self._metrics.prefill_seconds if reads_prompts else self._metrics.decode_seconds).inc(step_s)
        n_new = sum([self._output.take(run) for run in list(runs)])
        self._metrics.generated_tokens.inc(n_new)
        self._metrics.throughput.add(n_new, self._clock())

    def _chunk(self, prompts: Sequence[Run], answers: Sequence[Run]) -> int:
        return self._policy.chunk(sum(run.turn.n_to_next_checkpoint for run in prompts), bool(answers))

    def _step(self, turns: Sequence[Turn], prefill_chunk: int | None) -> bool:
        """Runs one step; returns False if it failed and something else was done about that."""
        self._pool.free_cells(self._policy.cells_wanted(sum(turn.n_pending for turn in turns), len(turns)))
        try:
            step(self._engine, turns, prefill_chunk)
            return True
        except Cancelled:
            return False
        except ContextFull as error:
            _forget_drafts(turns)
            self._preempt(error)
        except Step35Error as error:
            log.error("decode failed: %s", error)
            _forget_drafts(turns)
            for run in [run for run in self._running if run.turn in turns]:
                self._output.break_off(run, str(error))
        return False

    def _preempt(self, error: ContextFull) -> None:
        """Makes room in a context full of running turns: the youngest prompt waits again, else an answer ends."""
        prompts = [run for run in self._running if run.is_prefilling]
        if waits_again(len(prompts), len(self._running)):
            self._wait_again(prompts[-1], error)
        else:
            self._output.complete(self._running[-1], "length")

    def _wait_again(self, run: Run, error: ContextFull) -> None:
        log.info("request %s waits again: %s", run.job.id, error)
        self._running.remove(run)
        self._pool.drop(run.slot)
        run.chooser.close()
        run.job.status.run = None
        self._waiting.appendleft(run.job.without_echo())


def _forget_drafts(turns: Sequence[Turn]) -> None:
    """After a failure, nobody knows how far the heads came."""
    for turn in turns:
        turn.session.forget_drafts()
