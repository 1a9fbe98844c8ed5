"""The scheduler: one thread owns the engine, and advances all running answers together, a decode at a time.

Requests come in through `submit`, events go out through each job's feed. Between two decodes it looks
after what changed: clients that left, requests that wait, a shutdown. What a decode brought is sent when the
next one begins: then the event loop has the interpreter for itself.

A prompt's prefill may fill a whole step. Where answers are running, steps with prompts take at most
half of the time: as long as such a step took, the answers then go on alone. The first BURST_S are free, so that
short prompts that come together begin together.
"""

import asyncio
import logging
import queue
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from step35.chat.answer import Answer
from step35.chat.events import ContentDelta, merged
from step35.chat.messages import Conversation
from step35.chat.output_parser import OutputParser
from step35.chat.prompt_builder import LEAST_CHECKPOINT, LEAST_PIECE
from step35.chat.reasoning_budget import budget_of, watch
from step35.chat.sampled_turns import TurnMap, known_turn
from step35.engine.decode_loop import Turn, begin, step
from step35.engine.engine import Engine
from step35.errors import Cancelled, ContextFull, DoesNotFit, Step35Error
from step35.markup import THINK_END, TOOL_CALL
from step35.planning.memory_pressure import Level
from step35.server.cache.session_pool import SessionPool
from step35.server.constrained_chooser import ConstrainedChooser, LazyGrammar, ReasoningEnd, is_endless
from step35.server.errors import BROKEN, BUSY, UNAVAILABLE, ApiError, api_error
from step35.server.events import Event, Failed, Progress
from step35.server.job import EventBridge, Job
from step35.server.metrics import Metrics, Throughput

PREFILL_CHUNK = 512
"""Rows of prompts in a step beside running answers."""
ROWS_PER_ANSWER = 8
BURST_S = 0.25
CHECK_REPEAT_EVERY = 64
QUIET_BEFORE_SAVE_S = 0.5
LONGEST_UNSAVED_S = 60.0
"""Sessions are written when nothing runs; a server that never rests writes one this often."""
SENT_APART_S = 0.002
"""To send a token costs as much as to decode one of a small model: those of quick decodes go out together."""
LAST_WORDS_S = 5.0
"""For answers to end and say why, when the memory ran out."""

log = logging.getLogger("step35.server")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much runs and waits at a time."""

    n_parallel: int = 4
    n_waiting: int = 32


class Scheduler:
    """Runs jobs on an engine that it opens in its own thread.

    `state` goes loading, ready, draining, stopped; or failed, with the reason in `failure`.
    """

    def __init__(
        self, limits: Limits, metrics: Metrics, turns: TurnMap, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self.metrics, self.turns = limits, metrics, turns
        self.state, self.failure = "loading", None
        self.engine: Engine | None = None
        self.conversations: SessionPool | None = None
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._n_submitted = 0
        self._clock = clock
        self._prefill_debt_s = 0.0
        self._last_active = self._last_save = clock()
        self._drain_until = float("inf")
        self._last_sent, self._is_urgent = 0.0, False
        self._ids: tuple[int | None, frozenset[int]] = (None, frozenset())
        self._speed = Throughput()
        metrics.queue.set_function(lambda: len(self.waiting))
        metrics.running.set_function(lambda: len(self.running))
        metrics.decode_tps.set_function(lambda: self.decode_tps)

    @property
    def decode_tps(self) -> float:
        """Tokens a second of all answers, in the last seconds."""
        return self._speed.tps(self._clock())

    # called from other threads

    def start(self, open_engine: Callable[[], SessionPool], on_change: Callable[[str], None]) -> None:
        """Opens the engine and runs until drained, in a thread of its own; `on_change` hears each state.

        To be called in the event loop that the jobs' clients are in.
        """
        self._on_change = on_change
        self.mail = EventBridge(asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._run, args=(open_engine,), name="step35-engine")
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job; raises ApiError if it can't be taken now."""
        self.check_ready()
        with self._lock:
            if self._n_submitted >= self.limits.n_parallel + self.limits.n_waiting:
                self.metrics.refused.inc()
                raise ApiError(
                    429, BUSY,
                    f"too many requests: expected at most {self.limits.n_parallel} running and {self.limits.n_waiting} "
                    "waiting; try again later",
                )  # fmt: skip
            self._n_submitted += 1
        self._inbox.put(job)

    def check_ready(self) -> None:
        """Raises ApiError unless requests are served now."""
        if self.state != "ready":
            raise ApiError(503, UNAVAILABLE, f"not ready: the server is {self.state}; try again later")

    def wake(self) -> None:
        """Makes an idle thread look around."""
        self._inbox.put(None)

    def drain(self, limit_s: float) -> None:
        """Takes no more jobs, ends those there are within the limit, and stops."""
        self._drain_until = self._clock() + limit_s
        if self.state in ("loading", "ready"):
            self.state = "draining"
            self._on_change("draining")
        self.wake()

    def close(self) -> None:
        """Waits until the thread has stopped, and frees the engine; nobody may use it any more."""
        self._thread.join()
        if self.engine:
            self.engine.close()

    # the thread

    def _run(self, open_engine: Callable[[], SessionPool]) -> None:
        try:
            self.conversations = open_engine()
        except Exception as error:  # noqa: BLE001  (whoever runs the server tells it)
            self.failure = error
            self._become("failed")
            return
        self.engine = self.conversations.engine
        self.engine.on_pressure.append(self._on_pressure)
        self._pieces = [partial(self.engine.piece, special=special) for special in (False, True)]
        self.metrics.cells.set(self.engine.n_ctx)
        self.metrics.cells_used.set_function(lambda: self.engine.n_ctx - self.engine.n_free_cells)
        if self.state == "loading":
            self._become("ready")
        try:
            while self.state != "draining" or self.running or self.waiting or not self._inbox.empty():
                self._run_once()
            self.mail.send()
            self.conversations.save_all()
        except Exception as error:
            log.exception("the engine's thread broke")
            self.failure = error
            self._fail_all(ApiError(500, BROKEN, f"the server broke: {error}"))
            self.mail.send()
            self._become("failed")
        else:
            self._become("stopped")

    def _on_pressure(self, level: Level) -> None:
        """Ends the server when the memory can't carry it any longer. Called by the watchdog's thread."""
        if level is Level.STOP:
            told = "memory ran out: the server has ended; load with a smaller context or a smaller recipe"
            self.failure = DoesNotFit(told)
            self.drain(LAST_WORDS_S)

    def _become(self, state: str) -> None:
        self.state = state
        self._on_change(state)

    def _run_once(self) -> None:
        self._receive()
        self._look_after_clients()
        self._admit()
        if not self.running:
            self.mail.send()
        else:
            self._advance()
            self._last_active = self._clock()
            if self._last_active - self._last_save >= LONGEST_UNSAVED_S and self.conversations.save_one():
                self._last_save = self._last_active

    def _receive(self) -> None:
        """Takes what has been submitted; waits for it if there is nothing to do."""
        is_idle = not self.running and not self.waiting and self.state != "draining"
        if is_idle:
            self.mail.send()
        elif self._inbox.empty():  # as between most decodes
            return
        try:
            job = self._inbox.get(timeout=self._idle_s()) if is_idle else self._inbox.get_nowait()
            while True:
                if job is not None:
                    self.waiting.append(job)
                job = self._inbox.get_nowait()
        except queue.Empty:
            if is_idle and self._clock() - self._last_active >= QUIET_BEFORE_SAVE_S:
                self.conversations.save_one()
                self._last_save = self._clock()

    def _idle_s(self) -> float:
        return 0.1 if self.conversations.disk and any(held.is_unsaved for held in self.conversations.held) else 5.0

    def _look_after_clients(self) -> None:
        for job in [job for job in self.waiting if job.feed.is_left]:
            self.waiting.remove(job)
            self._end(job, "cancelled", [])
        for job in [job for job in self.running if job.feed.is_left]:
            self._complete(job, "cancelled")
        if self._clock() > self._drain_until:
            for job in list(self.running):
                self._complete(job, "length")
            while self.waiting:
                self._fail(self.waiting.popleft(), ApiError(503, UNAVAILABLE, "the server is shutting down"))

    # admitting

    def _admit(self) -> None:
        for job in list(self.waiting):
            if len(self.running) >= self.limits.n_parallel:
                return
            try:
                is_begun = self._begin(job)
            except Exception as error:
                log.exception("request %s can't begin", job.id)
                self._fail(job, ApiError(500, BROKEN, f"the request can't begin: {type(error).__name__}"))
                is_begun = True
            if is_begun:
                self.waiting.remove(job)

    def _begin(self, job: Job) -> bool:
        """Starts a job if a session can serve it now; a job that fails to start is done with, too."""
        held = self.conversations.acquire(job.prompt)
        if held is None:
            return False
        try:
            job.guide = self._guide(job)
            job.turn = begin(
                held.session, job.prompt.tokens, job.guide, job.ask.n_predict, job.prompt.checkpoints_after
            )
        except Step35Error as error:
            held.is_taken = False
            self._fail(job, api_error(error))
            return True
        if held.session.n_past >= LEAST_CHECKPOINT:
            held.session.checkpoint()  # an edit of the last message comes back here
        held.turn, job.held, job.started = job.turn, held, self._clock()
        job.n_seen, job.n_cached = len(job.prompt.tokens), job.turn.stats.n_reused
        self.running.append(job)
        job.feed.publish(
            [Progress(job.n_cached, len(job.prompt.tokens)), *([ContentDelta(job.echo)] if job.echo else [])]
        )
        job.echo = ""  # said once, even if the job has to begin again
        if job.turn.finish:
            self._complete(job, job.turn.finish)
        return True

    def _guide(self, job: Job) -> ConstrainedChooser:
        ask = job.ask
        is_chat = isinstance(ask.prompt, Conversation)
        tools = ask.prompt.tools if is_chat and ask.tool_choice != "none" else ()
        parser = (
            OutputParser(tools, job.prompt.opens_reasoning, lambda: f"call_{uuid.uuid4().hex[:24]}")
            if is_chat
            else None
        )
        job.answer = Answer(self._pieces[is_chat], parser, ask.stop, ask.parallel_tool_calls)
        sampling = ask.sampling if ask.has_seed else replace(ask.sampling, seed=random.getrandbits(64))
        grammar = None
        if job.grammar is not None:
            think_end, forbidden = self._special_ids()
            arm = think_end if job.prompt.opens_reasoning else None
            grammar = LazyGrammar(self.engine.open_grammar(job.grammar), arm, forbidden)
        end = None
        if job.prompt.opens_reasoning:
            tokenize = partial(self.engine.tokenize, add_bos=False)
            end = ReasoningEnd(
                watch(budget_of(ask.effort, ask.reasoning_budget), job.n_reasoned), self._pieces[True], tokenize
            )
        return ConstrainedChooser(
            sampling, self.engine.eos, grammar=grammar, n_logprobs=ask.n_logprobs, reasoning_end=end
        )

    def _special_ids(self) -> tuple[int | None, frozenset[int]]:
        """Returns the token that ends the reasoning, and those that may not come before it under a grammar."""
        if self._ids[0] is None:
            engine = self.engine
            single = {
                text: ids[0]
                for text in (THINK_END, TOOL_CALL)
                if len(ids := engine.tokenize(text, add_bos=False)) == 1
            }
            ends = {token for token in range(engine.n_vocab) if engine.is_end(token)}
            self._ids = (single.get(THINK_END), frozenset(ends | {single.get(TOOL_CALL, -1)} - {-1}))
        return self._ids

    # advancing

    def _advance(self) -> None:
        """One decode for the turns whose time it is."""
        prefilling = [job for job in self.running if job.is_prefilling]
        answering = [job for job in self.running if job not in prefilling] if prefilling else self.running
        is_mixed = bool(prefilling and answering)
        self._send(at_once=bool(prefilling))
        if is_mixed and self._prefill_debt_s > BURST_S:
            jobs, prefill_chunk = answering, None
        else:
            jobs, prefill_chunk = self.running, self._quantum(prefilling, is_mixed)
        started = self._clock()
        if not self._step([job.turn for job in jobs], prefill_chunk):
            return
        elapsed = self._clock() - started
        with_prompt = jobs is self.running and bool(prefilling)
        self._charge_prefill(elapsed if with_prompt else -elapsed, to=answering)
        (self.metrics.prefill_seconds if with_prompt else self.metrics.decode_seconds).inc(elapsed)
        n_new = sum([self._take(job) for job in list(jobs)])
        self.metrics.generated_tokens.inc(n_new)
        self._speed.add(n_new, self._clock())

    def _send(self, *, at_once: bool) -> None:
        """Sends what is ready, now that a decode begins: a first token and the end of an answer wait for nothing."""
        now = self._clock()
        if at_once or self._is_urgent or now - self._last_sent >= SENT_APART_S:
            self.mail.send()
            self._last_sent, self._is_urgent = now, False

    def _quantum(self, prefilling: Sequence[Job], is_mixed: bool) -> int:
        """Returns how many rows of prompts to read in a step: all that fit, but no rest of a few.

        On a CPU llama.cpp's attention takes rows by 64, and several times as long a row where there are fewer.
        """
        most = min(PREFILL_CHUNK, self.engine.options.n_batch) if is_mixed else self.engine.options.n_batch
        rest = sum(job.turn.n_to_next_checkpoint for job in prefilling) - most
        return most - LEAST_PIECE if 0 < rest < LEAST_PIECE < most else most

    def _charge_prefill(self, seconds: float, to: Sequence[Job]) -> None:
        """Adds to what steps with prompts have taken from running answers; without any there is no debt."""
        self._prefill_debt_s = max(0.0, self._prefill_debt_s + seconds) if to else 0.0

    def _step(self, turns: Sequence[Turn], prefill_chunk: int | None) -> bool:
        """Runs one step; returns False if it failed and something else was done about that."""
        n_wanted = min(sum(turn.n_pending for turn in turns), self.engine.options.n_batch) + ROWS_PER_ANSWER * len(
            turns
        )
        self.conversations.free_cells(n_wanted)
        try:
            step(self.engine, turns, prefill_chunk)
            return True
        except Cancelled:
            return False
        except ContextFull as error:
            _forget_drafts(turns)
            self._preempt(error)
        except Step35Error as error:
            log.error("decode failed: %s", error)
            _forget_drafts(turns)
            for job in [job for job in self.running if job.turn in turns]:
                self._break(job, str(error))
        return False

    def _preempt(self, error: ContextFull) -> None:
        """Makes room in a context full of running turns: the youngest prompt waits again, else an answer ends."""
        prefilling = [job for job in self.running if job.is_prefilling]
        if prefilling and len(self.running) > 1:
            job = prefilling[-1]
            log.info("request %s waits again: %s", job.id, error)
            self.running.remove(job)
            self.conversations.drop(job.held)
            job.guide.close()
            job.held = job.turn = job.guide = job.answer = None
            self.waiting.appendleft(job)
        else:
            self._complete(self.running[-1], "length")

    def _take(self, job: Job) -> int:
        """Turns what a step brought to events, ends the job if that is its end, and returns how many tokens it took."""
        turn, guide, answer = job.turn, job.guide, job.answer
        if guide.is_broken:
            self._break(job, "the model's output isn't a number: the sequence was stopped and its cache dropped")
            return 0
        tokens = turn.session.tokens
        n_end, n_before = len(tokens) - (turn.finish == "stop"), job.n_seen
        events: list[Event] = []
        if job.is_prefilling:
            events.append(Progress(turn.session.n_past, turn.n_prompt))
        while job.n_seen < n_end and not answer.is_over:
            at = job.n_seen - turn.n_prompt
            events += answer.feed(tokens[job.n_seen], guide.logprobs[at] if at < len(guide.logprobs) else None)
            job.n_seen += 1
        n_new = job.n_seen - n_before
        if n_new and job.first_token is None:
            self._note_first_token(job)
        job.n_generated = turn.n_generated
        if events:
            job.feed.publish(merged(events))
        if answer.is_over or turn.finish:
            self._complete(job, "stop" if answer.is_over else turn.finish)
        elif self._is_endless(job):
            after = f"after {turn.n_generated} tokens"
            self._break(job, f"the output repeats itself without end, {after}: stopped, and its cache dropped")
        return n_new

    def _is_endless(self, job: Job) -> bool:
        if job.turn.n_generated < job.next_check:
            return False
        job.next_check = job.turn.n_generated + CHECK_REPEAT_EVERY
        return is_endless(job.turn.generated)

    def _note_first_token(self, job: Job) -> None:
        job.first_token, self._is_urgent = self._clock(), True
        self.metrics.first_token.observe(job.first_token - job.arrived)

    # ending

    def _complete(self, job: Job, reason: str) -> None:
        """Ends a running job; its session keeps the cells and what was said."""
        if job.turn.finish is None:
            job.turn.finish = "length"
        finish = "length" if reason == "cancelled" else reason
        events = job.answer.finish(finish, job.turn.n_prompt, job.n_cached)
        self._remember(job)
        self._close(job)
        self._end(job, "cancelled" if reason == "cancelled" else events[-1].reason, events)

    def _remember(self, job: Job) -> None:
        """Keeps the turn's own ids; where a stop string cut the text, the client has another text than they say."""
        turns = job.prompt.turns
        if isinstance(job.ask.prompt, Conversation) and not job.answer.is_stopped:
            start = job.prompt.answer_start
            ids = job.turn.session.tokens[start : job.n_seen]
            turn = known_turn(job.prompt.tokens[:start], ids, job.answer.message())
            self.turns.add(turn)
            turns = (*turns, turn)
        self.conversations.release(job.held, job.prompt.last_start, turns)

    def _break(self, job: Job, message: str) -> None:
        """Ends a running job whose sequence can't be trusted."""
        log.warning("request %s: %s", job.id, message)
        self.conversations.drop(job.held)
        self._close(job)
        self._end(job, "error", [Failed(ApiError(500, BROKEN, message))])

    def _close(self, job: Job) -> None:
        self.running.remove(job)
        job.guide.close()
        stats = job.turn.stats
        self.metrics.prompt_tokens.inc(stats.n_prompt)
        self.metrics.cached_tokens.inc(job.n_cached)
        self.metrics.count_heads(_padded(stats.drafted_per_head, stats), _padded(stats.accepted_per_head, stats))

    def _fail(self, job: Job, error: ApiError) -> None:
        self._end(job, "error", [Failed(error)])

    def _fail_all(self, error: ApiError) -> None:
        for job in (*self.running, *self.waiting):
            self._fail(job, error)
        self.running, self.waiting = [], deque()

    def _end(self, job: Job, finish: str, events: Sequence[Event]) -> None:
        job.finish, job.ended, self._is_urgent = finish, self._clock(), True
        with self._lock:
            self._n_submitted -= 1
        job.feed.publish(events)


def _forget_drafts(turns: Sequence[Turn]) -> None:
    """After a failure, nobody knows how far the heads came."""
    for turn in turns:
        turn.session.forget_drafts()


def _padded(counts: list[int], stats) -> list[int]:
    n_heads = max(len(stats.drafted_per_head), len(stats.accepted_per_head))
    return counts + [0] * (n_heads - len(counts))
