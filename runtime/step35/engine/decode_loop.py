"""Generation: turns that extend sessions, advanced together, one trunk decode a step.

A step feeds each turn's known but undecoded tokens, followed by its drafts, and returns logits from
the last known token on. The tokens chosen from them are kept as long as they equal the drafts; the
first that doesn't replaces its draft and ends the step. So the text is the same whatever was drafted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from step35.drafting.drafter import DraftRound
from step35.engine.engine import Engine
from step35.engine.session import Session
from step35.errors import ContextFull
from step35.native.rows import Rows
from step35.planning.memory_pressure import Level
from step35.sampling.token_chooser import Chooser


@dataclass(slots=True)
class Stats:
    """What a turn cost: counts of tokens, seconds of wall time, and how drafting went."""

    n_prompt: int = 0
    n_reused: int = 0
    prefill_s: float = 0.0
    n_decoded: int = 0
    decode_s: float = 0.0
    n_cycles: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    drafted_per_head: list[int] = field(default_factory=list)
    accepted_per_head: list[int] = field(default_factory=list)

    @property
    def prefill_tps(self) -> float:
        return (self.n_prompt - self.n_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        return self.n_decoded / self.decode_s if self.decode_s else 0.0

    @property
    def mean_depth(self) -> float:
        return self.n_drafted / self.n_cycles if self.n_cycles else 0.0

    def count_cycle(self, source: str, n_drafted: int, n_accepted: int) -> None:
        self.n_cycles += 1
        self.n_drafted += n_drafted
        self.n_accepted += n_accepted
        if source == "mtp":
            _count_up_to(self.drafted_per_head, n_drafted)
            _count_up_to(self.accepted_per_head, n_drafted, n_accepted)


def _count_up_to(counts: list[int], n_heads: int, n: int | None = None) -> None:
    counts += [0] * (n_heads - len(counts))
    for head in range(n_heads if n is None else n):
        counts[head] += 1


@dataclass(slots=True)
class Turn:
    """A session being extended; `finish` is None until it is 'stop' or 'length'.

    `checkpoint_positions` are prompt lengths at which a checkpoint is kept on the way.
    """

    session: Session
    chooser: Chooser
    n_predict: int
    n_prompt: int
    checkpoint_positions: tuple[int, ...] = ()
    finish: str | None = None
    stats: Stats = field(default_factory=Stats)

    @property
    def generated(self) -> list[int]:
        return self.session.tokens[self.n_prompt :]

    @property
    def n_generated(self) -> int:
        return len(self.session.tokens) - self.n_prompt

    @property
    def n_pending(self) -> int:
        return len(self.session.tokens) - self.session.n_past

    @property
    def n_to_next_checkpoint(self) -> int:
        """How many tokens a decode may take at most."""
        n_past = self.session.n_past
        return min((mark - n_past for mark in self.checkpoint_positions if mark > n_past), default=self.n_pending)


def begin(
    session: Session,
    prompt: Sequence[int],
    chooser: Chooser,
    n_predict: int = -1,
    checkpoints_after: Callable[[int], tuple[int, ...]] | None = None,
) -> Turn:
    """Syncs a session to a prompt and returns the turn that will extend it.

    `n_predict` -1 fills the context. `checkpoints_after` says at which prompt lengths checkpoints are kept, given how
    many tokens are cached. By default that is before the prompt's last message, where the next turn most likely parts.
    """
    session.engine.check_pressure(Level.SHRINK)
    plan = session.sync(prompt)
    room = session.engine.n_ctx - len(prompt)
    if checkpoints_after is None:
        positions = _last_message(prompt, session.engine.model.turn_start)
    else:
        positions = checkpoints_after(plan.n_keep)
    turn = Turn(session, chooser, min(n_predict, room) if n_predict >= 0 else room, len(prompt), positions)
    turn.stats = Stats(n_prompt=len(prompt), n_reused=plan.n_keep)
    if turn.n_predict == 0:
        turn.finish = "length"
    return turn


def _last_message(prompt: Sequence[int], turn_start: int | None) -> tuple[int, ...]:
    if turn_start is None or turn_start not in prompt:
        return ()
    return (len(prompt) - 1 - list(reversed(prompt)).index(turn_start),)


def generate(turn: Turn) -> Iterator[int]:
    """Runs one turn to its end, yielding tokens as they are chosen; an end token is not yielded."""
    session = turn.session
    while turn.finish is None:
        n_before = len(session.tokens)
        step(session.engine, [turn])
        new = session.tokens[n_before:]
        yield from new[:-1] if turn.finish == "stop" else new


# one step


@dataclass(frozen=True, slots=True)
class BatchPart:
    """What one turn puts into a step's batch."""

    turn: Turn
    rows: Rows
    cycle: DraftRound

    @property
    def is_prompt(self) -> bool:
        return self.rows.start + len(self.rows.tokens) - len(self.cycle.drafts) <= self.turn.n_prompt


def step(engine: Engine, turns: Sequence[Turn], prefill_chunk: int | None = None) -> None:
    """Advances turns by one decode: each by a piece of its prompt, or by one or more tokens.

    `prefill_chunk` bounds the rows of prompts in it, for the sake of the turns that already answer.
    """
    started = engine.clock()
    turns = sorted(turns, key=lambda turn: turn.n_pending)
    n_free = engine.n_free_cells
    cycles = _propose(engine, turns, n_free)
    feeds = _share_batch(engine, turns, cycles, prefill_chunk or engine.options.n_batch, n_free)
    wants_hidden = engine.drafter.wants_hidden and any(_is_in_window(engine, feed) for feed in feeds)
    logits, verify_s = _decode(engine, feeds, wants_hidden)
    _take_outputs(engine, feeds, logits, engine.trunk.hidden() if wants_hidden else None, verify_s)
    elapsed = engine.clock() - started
    for feed in feeds:
        _charge(feed, elapsed)


def _propose(engine: Engine, turns: Sequence[Turn], n_free: int) -> list[DraftRound]:
    most = min(n_free - 2, engine.options.n_batch // len(turns) - 1)
    cycles = [_new_cycle(turn, most) for turn in turns]
    if not engine.drafter.is_off:
        engine.drafter.propose([cycle for cycle, turn in zip(cycles, turns, strict=True) if turn.n_pending == 1])
    return cycles


def _new_cycle(turn: Turn, most: int) -> DraftRound:
    """A draft never goes past the turn's last token: one of its tokens comes from the trunk itself."""
    session = turn.session
    n_max = min(turn.n_predict - turn.n_generated - 1, most)
    return DraftRound(session.seq, session.tokens, turn.chooser.sampling, session.memory, n_max)


def _share_batch(
    engine: Engine, turns: Sequence[Turn], cycles: Sequence[DraftRound], prefill_chunk: int, n_free: int
) -> list[BatchPart]:
    room = engine.options.n_batch
    feeds = []
    for turn, cycle in zip(turns, cycles, strict=True):
        n_pending = turn.n_pending
        n = min(n_pending, room)
        if n_pending > 1:
            n = min(n, turn.n_to_next_checkpoint, prefill_chunk)
            prefill_chunk -= max(n, 0)
        if n <= 0:
            continue
        session = turn.session
        is_last = n == n_pending
        tokens = session.tokens[session.n_past : session.n_past + n] + cycle.draft_tokens
        n_free -= len(tokens)
        if n_free < 0:
            raise ContextFull(
                f"context full: {len(tokens)} more tokens don't fit into the {n_free + len(tokens)} left of "
                f"{engine.n_ctx}, shared by all sessions; close a session or load with a larger context"
            )
        room -= len(tokens)
        rows = Rows(session.seq, session.n_past, tokens, outputs=is_last + len(cycle.drafts))
        feeds.append(BatchPart(turn, rows, cycle))
    return feeds


def _is_in_window(engine: Engine, feed: BatchPart) -> bool:
    """The heads see one window: of a long prompt only the last chunks' hidden states are wanted."""
    return feed.rows.start + len(feed.rows.tokens) > feed.turn.n_prompt - engine.window


def _decode(engine: Engine, feeds: Sequence[BatchPart], wants_hidden: bool) -> tuple[np.ndarray | None, float]:
    """Runs the trunk; returns the logits (n_outputs, n_vocab) if any are wanted, and the seconds until they came."""
    started = engine.clock()
    engine.trunk.extract_hidden(wants_hidden)
    try:
        engine.trunk.decode([feed.rows for feed in feeds])
    except BaseException:
        for feed in feeds:
            engine.trunk.truncate(feed.rows.seq, feed.rows.start)
        engine.check_pressure(Level.REJECT)  # says why, if the watchdog cancelled it
        raise
    logits = engine.trunk.logits() if any(feed.rows.outputs for feed in feeds) else None
    return logits, engine.clock() - started


def _take_outputs(
    engine: Engine, feeds: Sequence[BatchPart], logits: np.ndarray | None, hidden: np.ndarray | None, verify_s: float
) -> None:
    at_output = at_row = 0
    for feed in feeds:
        n_outputs, n_rows = feed.rows.outputs, len(feed.rows.tokens)
        chosen = _verify(feed, logits[at_output : at_output + n_outputs]) if n_outputs else []
        _extend(feed, chosen, hidden[at_row : at_row + n_rows] if hidden is not None else None)
        if chosen:
            n_accepted = min(len(chosen) - 1, len(feed.cycle.drafts))
            if not engine.drafter.is_off:
                engine.drafter.update(feed.cycle, n_accepted, len(chosen), verify_s, is_alone=_is_alone(feeds))
            feed.turn.stats.count_cycle(feed.cycle.source, len(feed.cycle.drafts), n_accepted)
        at_output, at_row = at_output + n_outputs, at_row + n_rows


def _is_alone(feeds: Sequence[BatchPart]) -> bool:
    return len(feeds) == 1 and len(feeds[0].rows.tokens) == len(feeds[0].cycle.drafts) + 1


def _verify(feed: BatchPart, logits: np.ndarray) -> list[int]:
    """Chooses tokens from the rows' logits until one differs from its draft or ends the turn."""
    turn, drafts = feed.turn, feed.cycle.draft_tokens
    history, model = turn.session.tokens, turn.session.engine.model
    chosen: list[int] = []
    for i, row in enumerate(logits):
        token = turn.chooser.choose(row, history)
        history.append(token)
        chosen.append(token)
        if model.is_eog(token):
            turn.finish = "stop"
        elif turn.n_generated >= turn.n_predict:
            turn.finish = "length"
        if turn.finish or i == len(drafts) or token != drafts[i]:
            return chosen
    return chosen


def _extend(feed: BatchPart, chosen: Sequence[int], hidden: np.ndarray | None) -> None:
    """Moves the session on: the rows whose tokens were accepted stay, the others are forgotten."""
    session, rows = feed.turn.session, feed.rows
    n_kept = len(rows.tokens) - len(feed.cycle.drafts) + max(len(chosen) - 1, 0)
    session.n_past = rows.start + n_kept
    if n_kept < len(rows.tokens):
        session.engine.trunk.truncate(session.seq, session.n_past)
    if hidden is not None:
        session.memory.tracks[0].inputs.put(rows.start, hidden[:n_kept])
    if session.n_past in feed.turn.checkpoint_positions or _ends_with_next_decode(feed.turn):
        session.checkpoint()


def _ends_with_next_decode(turn: Turn) -> bool:
    """Whether a prompt's last piece is what is left: asked for again, the prompt then takes that one decode."""
    n_pending = turn.n_pending
    return 1 < n_pending <= turn.session.engine.options.n_batch and n_pending == turn.n_to_next_checkpoint


def _charge(feed: BatchPart, elapsed_s: float) -> None:
    stats = feed.turn.stats
    if feed.is_prompt:
        stats.prefill_s += elapsed_s
    else:
        stats.decode_s += elapsed_s
        stats.n_decoded += feed.turn.session.n_past - feed.rows.start
