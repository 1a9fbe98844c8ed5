"""What comes of the runs: events for their clients, turns that are known again, counts for the metrics."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from step35.chat.events import merged
from step35.chat.messages import Conversation
from step35.chat.sampled_turns import KnownTurn, TurnMap, known_turn
from step35.engine.turn import Stats
from step35.server.cache.session_pool import SessionPool
from step35.server.constrained_chooser import is_endless
from step35.server.errors import BROKEN, ApiError
from step35.server.events import Event, Failed, Progress
from step35.server.inbox import Inbox
from step35.server.job import End, Job, Jobs, Run
from step35.server.metrics import Metrics

CHECK_REPEAT_EVERY = 64
NOT_A_NUMBER = "the model's output isn't a number: the sequence was stopped and its cache dropped"

log = logging.getLogger("step35.server")


class Output:
    """Takes each run's new tokens after a step, and ends runs and jobs."""

    def __init__(
        self,
        jobs: Jobs,
        pool: SessionPool,
        turns: TurnMap,
        metrics: Metrics,
        inbox: Inbox,
        clock: Callable[[], float],
    ) -> None:
        self._running, self._pool, self._turns = jobs.running, pool, turns
        self._metrics, self._inbox, self._clock = metrics, inbox, clock

    def take(self, run: Run) -> int:
        """Turns what a step brought to events, ends the run if that is its end, and returns how many tokens it took."""
        turn, chooser, answer = run.turn, run.chooser, run.answer
        if chooser.is_broken:
            self.break_off(run, NOT_A_NUMBER)
            return 0
        tokens = turn.session.tokens
        n_end, n_before = len(tokens) - (turn.finish == "stop"), run.n_seen
        events: list[Event] = []
        if run.is_prefilling:
            events.append(Progress(turn.session.n_past, turn.n_prompt))
        while run.n_seen < n_end and not answer.is_over:
            at = run.n_seen - turn.n_prompt
            events += answer.feed(tokens[run.n_seen], chooser.logprobs[at] if at < len(chooser.logprobs) else None)
            run.n_seen += 1
        n_new = run.n_seen - n_before
        is_first = n_new > 0 and run.first_token_s is None
        if is_first:
            self._note_first_token(run)
        run.n_generated = turn.n_generated
        if events:
            run.job.events.publish(merged(events), is_urgent=is_first)
        self._end_if_over(run)
        return n_new

    def _note_first_token(self, run: Run) -> None:
        run.first_token_s = self._clock()
        self._metrics.first_token.observe(run.first_token_s - run.job.status.arrived_s)

    def _end_if_over(self, run: Run) -> None:
        turn, answer = run.turn, run.answer
        if answer.is_over or turn.finish:
            self.complete(run, "stop" if answer.is_over or turn.finish == "stop" else "length")
        elif turn.n_generated >= run.next_check:
            run.next_check = turn.n_generated + CHECK_REPEAT_EVERY
            if is_endless(turn.generated):
                after = f"after {turn.n_generated} tokens"
                self.break_off(run, f"the output repeats itself without end, {after}: stopped, and its cache dropped")

    # the end of a run

    def complete(self, run: Run, reason: Literal["stop", "length", "cancelled"]) -> None:
        """Ends a run; its session keeps the cells and what was said."""
        if run.turn.finish is None:
            run.turn.finish = "length"
        finish = "length" if reason == "cancelled" else reason
        events = run.answer.finish(finish, run.turn.n_prompt, run.n_cached)
        self._pool.release(run.slot, run.job.prompt.last_start, self._known_turns(run))
        self._close(run)
        self._end(run.job, "cancelled" if reason == "cancelled" else run.answer.said.reason, events)

    def break_off(self, run: Run, message: str) -> None:
        """Ends a run whose sequence can't be trusted."""
        log.warning("request %s: %s", run.job.id, message)
        self._pool.drop(run.slot)
        self._close(run)
        self.fail(run.job, ApiError(500, BROKEN, message))

    def _known_turns(self, run: Run) -> tuple[KnownTurn, ...]:
        """Returns the conversation's turns with the new one, by its own ids.

        Where a stop string cut the text, the client has another text than the ids say.
        """
        prompt = run.job.prompt
        if not isinstance(run.job.request.prompt, Conversation) or run.answer.is_stopped:
            return prompt.turns
        start = prompt.answer_start
        ids = run.turn.session.tokens[start : run.n_seen]
        turn = known_turn(prompt.tokens[:start], ids, run.answer.message())
        self._turns.add(turn)
        return (*prompt.turns, turn)

    def _close(self, run: Run) -> None:
        self._running.remove(run)
        run.chooser.close()
        stats = run.turn.stats
        self._metrics.prompt_tokens.inc(stats.n_prompt)
        self._metrics.cached_tokens.inc(run.n_cached)
        self._metrics.count_heads(_padded(stats.drafted_per_head, stats), _padded(stats.accepted_per_head, stats))

    # the end of a job

    def fail(self, job: Job, error: ApiError) -> None:
        """Ends a job with an error."""
        self._end(job, "error", [Failed(error)])

    def cancel(self, job: Job) -> None:
        """Ends a job that waits and whose clients have left."""
        self._end(job, "cancelled", [])

    def _end(self, job: Job, end: End, events: Sequence[Event]) -> None:
        job.status.end = end
        self._inbox.count_out()
        job.events.publish(events, is_urgent=True)


def _padded(counts: list[int], stats: Stats) -> list[int]:
    n_heads = max(len(stats.drafted_per_head), len(stats.accepted_per_head))
    return counts + [0] * (n_heads - len(counts))
