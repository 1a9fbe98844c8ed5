"""Generation: turns that extend sessions, advanced together, one trunk decode a step.

A step feeds each turn's known but undecoded tokens, followed by its drafts, and returns logits from
the last known token on. The tokens chosen from them are kept as long as they equal the drafts; the
first that doesn't replaces its draft and ends the step. So the text is the same whatever was drafted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from step35.drafting.draft_round import DraftRound
from step35.engine.batch import BatchPart, share_batch
from step35.engine.interface import EngineInterface
from step35.engine.session import Session
from step35.engine.turn import Stats, Turn
from step35.planning.memory_pressure import Level
from step35.sampling.token_chooser import Chooser


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
        positions = _last_message(prompt, session.engine.turn_start)
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


def step(engine: EngineInterface, turns: Sequence[Turn], prefill_chunk: int | None = None) -> None:
    """Advances turns by one decode: each by a piece of its prompt, or by one or more tokens.

    `prefill_chunk` bounds the rows of prompts in it, for the sake of the turns that already answer.
    """
    started = engine.clock()
    turns = sorted(turns, key=lambda turn: turn.n_pending)
    n_free = engine.n_free_cells
    rounds = _propose(engine, turns, n_free)
    parts = share_batch(engine, turns, rounds, prefill_chunk or engine.options.n_batch, n_free)
    decoded = _decode(engine, parts)
    for part, logits, hidden in decoded.by_part(parts):
        chosen = _verify(part, logits)
        _extend(part, chosen, hidden)
        if chosen:
            _learn(part, len(chosen), decoded.seconds, is_alone=_is_alone(parts))
    elapsed_s = engine.clock() - started
    for part in parts:
        _charge(part, elapsed_s)


# drafts


def _propose(engine: EngineInterface, turns: Sequence[Turn], n_free: int) -> list[DraftRound]:
    n_most = min(n_free - 2, engine.options.n_batch // len(turns) - 1)
    rounds = [_new_round(turn, n_most) for turn in turns]
    engine.drafter.propose([r for r, turn in zip(rounds, turns, strict=True) if turn.n_pending == 1])
    return rounds


def _new_round(turn: Turn, n_most: int) -> DraftRound:
    """A draft never goes past the turn's last token: one of its tokens comes from the trunk itself."""
    session = turn.session
    n_max = min(turn.n_predict - turn.n_generated - 1, n_most)
    return DraftRound(session.seq, session.tokens, turn.chooser.sampling, session.draft_state, n_max)


def _learn(part: BatchPart, n_tokens: int, decode_s: float, *, is_alone: bool) -> None:
    draft_round = part.draft_round
    n_drafted = len(draft_round.drafts)
    n_accepted = min(n_tokens - 1, n_drafted)
    part.turn.session.engine.drafter.update(draft_round, n_accepted, n_tokens, decode_s, is_alone=is_alone)
    part.turn.stats.count_round(draft_round.source, n_drafted, n_accepted)


def _is_alone(parts: Sequence[BatchPart]) -> bool:
    """Whether the decode was one turn's, with one known token."""
    return len(parts) == 1 and parts[0].n_known == 1


# the decode


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode returned: logits (n_outputs, n_vocab), hidden states (n_rows, n_embd) if wanted, its seconds."""

    logits: np.ndarray
    hidden: np.ndarray | None
    seconds: float

    def by_part(self, parts: Sequence[BatchPart]) -> Iterator[tuple[BatchPart, np.ndarray, np.ndarray | None]]:
        """Yields each part with its own rows of both."""
        output = row = 0
        for part in parts:
            outputs, rows = slice(output, output + part.rows.outputs), slice(row, row + part.n_rows)
            yield part, self.logits[outputs], None if self.hidden is None else self.hidden[rows]
            output, row = outputs.stop, rows.stop


NO_LOGITS = np.zeros((0, 0), np.float32)


def _decode(engine: EngineInterface, parts: Sequence[BatchPart]) -> Decoded:
    """Runs the trunk; its seconds are those until the logits came."""
    wants_hidden = engine.drafter.wants_hidden and any(_is_in_window(engine, part) for part in parts)
    started = engine.clock()
    engine.trunk.extract_hidden(wants_hidden)
    try:
        engine.trunk.decode([part.rows for part in parts])
    except BaseException:
        for part in parts:
            engine.trunk.truncate(part.rows.seq, part.rows.start)
        engine.check_pressure(Level.REJECT)  # says why, if the watchdog cancelled it
        raise
    logits = engine.trunk.logits() if any(part.rows.outputs for part in parts) else NO_LOGITS
    seconds = engine.clock() - started
    return Decoded(logits, engine.trunk.hidden() if wants_hidden else None, seconds)


def _is_in_window(engine: EngineInterface, part: BatchPart) -> bool:
    """The heads see one window: of a long prompt only the last chunks' hidden states are wanted."""
    return part.rows.start + part.n_rows > part.turn.n_prompt - engine.window


# its outcome


def _verify(part: BatchPart, logits: np.ndarray) -> list[int]:
    """Chooses tokens from the rows' logits until one differs from its draft or ends the turn."""
    turn, drafts = part.turn, part.draft_round.draft_tokens
    history, engine = turn.session.tokens, turn.session.engine
    chosen: list[int] = []
    for i, row in enumerate(logits):
        token = turn.chooser.choose(row, history)
        history.append(token)
        chosen.append(token)
        if engine.is_end(token):
            turn.finish = "stop"
        elif turn.n_generated >= turn.n_predict:
            turn.finish = "length"
        if turn.finish or i == len(drafts) or token != drafts[i]:
            return chosen
    return chosen


def _extend(part: BatchPart, chosen: Sequence[int], hidden: np.ndarray | None) -> None:
    """Moves the session on: the rows whose tokens were accepted stay, the others are forgotten."""
    session, rows = part.turn.session, part.rows
    n_kept = part.n_known + max(len(chosen) - 1, 0)
    session.n_past = rows.start + n_kept
    if n_kept < part.n_rows:
        session.engine.trunk.truncate(session.seq, session.n_past)
    if hidden is not None:
        session.engine.drafter.keep_hidden(session.draft_state, rows.start, hidden[:n_kept])
    if part.turn.wants_checkpoint:
        session.checkpoint()


def _charge(part: BatchPart, elapsed_s: float) -> None:
    stats = part.turn.stats
    if part.is_prompt:
        stats.prefill_s += elapsed_s
    else:
        stats.decode_s += elapsed_s
        stats.n_decoded += part.turn.session.n_past - part.rows.start
