"""What goes into one decode: each turn's next tokens with its drafts, as many as the batch takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from step35.drafting.draft_round import DraftRound
from step35.engine.interface import EngineInterface
from step35.engine.turn import Turn
from step35.errors import ContextFull
from step35.native.rows import Rows


@dataclass(frozen=True, slots=True)
class BatchPart:
    """What one turn puts into a step's batch: known tokens, then the drafts of its round."""

    turn: Turn
    rows: Rows
    draft_round: DraftRound

    @property
    def n_rows(self) -> int:
        return len(self.rows.tokens)

    @property
    def n_known(self) -> int:
        return len(self.rows.tokens) - len(self.draft_round.drafts)

    @property
    def is_prompt(self) -> bool:
        return self.rows.start + self.n_known <= self.turn.n_prompt


def share_batch(
    engine: EngineInterface, turns: Sequence[Turn], rounds: Sequence[DraftRound], prefill_chunk: int, n_free: int
) -> list[BatchPart]:
    """Returns the parts of one batch, the turns' in their order; `prefill_chunk` bounds the rows of prompts in it.

    Raises ContextFull if they don't fit into the context's `n_free` cells.
    """
    room = engine.options.n_batch
    parts = []
    for turn, draft_round in zip(turns, rounds, strict=True):
        n_pending = turn.n_pending
        n = min(n_pending, room)
        if n_pending > 1:
            n = min(n, turn.n_to_next_checkpoint, prefill_chunk)
            prefill_chunk -= max(n, 0)
        if n <= 0:
            continue
        part = _part(turn, draft_round, n)
        n_free -= part.n_rows
        if n_free < 0:
            raise ContextFull(
                f"context full: {part.n_rows} more tokens don't fit into the {n_free + part.n_rows} left of "
                f"{engine.n_ctx}, shared by all sessions; close a session or load with a larger context"
            )
        room -= part.n_rows
        parts.append(part)
    return parts


def _part(turn: Turn, draft_round: DraftRound, n: int) -> BatchPart:
    """Returns a turn's next `n` tokens and its drafts; the last known token and the drafts return logits."""
    session = turn.session
    is_last = n == turn.n_pending
    tokens = session.tokens[session.n_past : session.n_past + n] + draft_round.draft_tokens
    n_outputs = is_last + len(draft_round.drafts)
    return BatchPart(turn, Rows(session.seq, session.n_past, tokens, n_outputs), draft_round)
