"""Generation: turns that extend sessions, advanced together, one decode a step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from step35.engine import Engine
from step35.native import Rows
from step35.sampling import Sampling, adjust, choose
from step35.session import Session


@dataclass(slots=True)
class Stats:
    """What a turn cost: counts of tokens and seconds of wall time."""

    n_prompt: int = 0
    n_reused: int = 0
    prefill_s: float = 0.0
    n_decoded: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tps(self) -> float:
        return (self.n_prompt - self.n_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


@dataclass(slots=True)
class Turn:
    """A session being extended; `finish` is None until it is 'stop' or 'length'."""

    session: Session
    sampling: Sampling
    n_predict: int
    n_prompt: int
    finish: str | None = None
    stats: Stats = field(default_factory=Stats)

    @property
    def generated(self) -> list[int]:
        return self.session.tokens[self.n_prompt :]


def begin(session: Session, prompt: Sequence[int], sampling: Sampling, n_predict: int) -> Turn:
    """Syncs a session to a prompt and returns the turn that will extend it."""
    n_reused = session.sync(prompt)
    room = session.engine.n_ctx - len(prompt)
    turn = Turn(session, sampling, min(n_predict, room) if n_predict >= 0 else room, len(prompt))
    turn.stats = Stats(n_prompt=len(prompt), n_reused=n_reused)
    if turn.n_predict == 0:
        turn.finish = "length"
    return turn


def step(engine: Engine, turns: Sequence[Turn]) -> None:
    """Advances every turn by one decode: a piece of its prompt, or its next token."""
    started = time.perf_counter()
    feeds = _share_batch(turns, engine.options.n_batch)
    engine.trunk.decode([feed.rows for feed in feeds])
    logits, at = engine.trunk.logits() if any(f.rows.outputs for f in feeds) else None, 0
    for feed in feeds:
        _advance(feed.turn, feed.rows, logits[at : at + feed.rows.outputs] if logits is not None else None)
        at += feed.rows.outputs
    elapsed = time.perf_counter() - started
    for feed in feeds:
        _charge(feed.turn, feed.is_prompt, elapsed)


@dataclass(frozen=True, slots=True)
class _Feed:
    turn: Turn
    rows: Rows
    is_prompt: bool


def _share_batch(turns: Sequence[Turn], room: int) -> list[_Feed]:
    feeds = []
    for turn in turns:
        session = turn.session
        todo = session.tokens[session.n_kv : session.n_kv + room]
        if not todo:
            continue
        room -= len(todo)
        is_last = session.n_kv + len(todo) == len(session.tokens)
        rows = Rows(session.seq, session.n_kv, todo, outputs=int(is_last))
        feeds.append(_Feed(turn, rows, is_prompt=session.n_kv + len(todo) <= turn.n_prompt))
    return feeds


def _advance(turn: Turn, rows: Rows, logits) -> None:
    session = turn.session
    session.n_kv += len(rows.tokens)
    if not rows.outputs:
        return
    history = session.tokens
    token = choose(adjust(logits[0], turn.sampling, history), turn.sampling, len(history))
    history.append(token)
    if session.engine.model.is_eog(token):
        turn.finish = "stop"
    elif len(turn.generated) >= turn.n_predict:
        turn.finish = "length"


def _charge(turn: Turn, is_prompt: bool, elapsed_s: float) -> None:
    if is_prompt:
        turn.stats.prefill_s += elapsed_s
    else:
        turn.stats.decode_s += elapsed_s
        turn.stats.n_decoded += 1


def generate(turn: Turn) -> Iterator[int]:
    """Runs one turn to its end, yielding tokens as they are chosen; the end token is not yielded."""
    engine, model = turn.session.engine, turn.session.engine.model
    while turn.finish is None:
        n_before = len(turn.session.tokens)
        step(engine, [turn])
        for token in turn.session.tokens[n_before:]:
            if not model.is_eog(token):
                yield token
