"""The MTP heads: one context each, run as the exact chain they were trained as.

Head k, row t takes token t+1+k and the pre-norm hidden state of row t from head k-1 (k = 0: from the
trunk), and proposes token t+2+k. With x the known tokens (the last one, x[n], not yet decoded by the
trunk) and d the drafts so far, head k's last row is n-1 and its token is d[k-1] (k = 0: x[n]).

A round runs each head once: rows that were accepted since its last run, rows whose token was a
rejected draft, and the new row, all in one decode. Where rows cost little (a GPU), REPLAYED_ROWS rows are decoded
even if fewer would do, so the shape stays the same and llama.cpp reuses its graph. A head is first run
over the last window of the prompt only: it can't see farther back.

The next head needs the hidden state of every row, and only the new row's logits are used. Stock llama.cpp returns
the one with the other, and runs the large output matrix for all rows; our own build runs it for the new one.
"""

from collections.abc import Sequence

import numpy as np

from step35.drafting.draft_round import DraftRound, DraftState, HeadState
from step35.drafting.hidden_ring import HiddenRows
from step35.native.draft_vocabulary import DraftVocabulary
from step35.native.interface import ContextInterface
from step35.native.rows import Rows
from step35.row_counts import REPLAYED_ROWS


class Heads:
    """The heads' contexts, in the order of the chain, or none; `n_least` is how many rows a run has at least.

    That is 1 to REPLAYED_ROWS.
    """

    def __init__(
        self,
        contexts: Sequence[ContextInterface],
        window: int,
        n_embd: int,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        self.contexts = contexts
        self.window = window
        self.n_embd = n_embd
        self.n_least = REPLAYED_ROWS
        self.vocabulary = vocabulary
        """Of trimmed heads; None if they know all of the model's tokens."""

    def __len__(self) -> int:
        return len(self.contexts)

    # what the heads know of a timeline

    def new_states(self) -> list[HeadState]:
        """Returns the heads' states of an empty timeline."""
        return [HeadState(HiddenRows(self.window + 2 * REPLAYED_ROWS, self.n_embd)) for _ in self.contexts]

    def truncate(self, state: DraftState, n_keep: int) -> None:
        """Forgets rows that depend on tokens from `n_keep` on."""
        if state.heads:
            state.heads[0].inputs.truncate(n_keep)
        self._finalize(state, n_keep - 1)

    def update(self, draft_round: DraftRound, n_accepted: int) -> None:
        """Keeps as final the rows whose tokens were accepted; to be called after each verification."""
        self._finalize(draft_round.state, draft_round.n_rows + n_accepted)

    @staticmethod
    def _finalize(state: DraftState, n_final: int) -> None:
        """Keeps `n_final` rows of the first head, and one less of each after it."""
        for head, own in enumerate(state.heads):
            own.n_final = max(0, min(own.n_final, n_final - head))
            if head + 1 < len(state.heads):
                state.heads[head + 1].inputs.truncate(max(0, n_final - head))

    def can_run(self, draft_round: DraftRound) -> bool:
        """Whether the trunk's hidden state of the last decoded row is known."""
        inputs = draft_round.state.heads[0].inputs
        return draft_round.n_rows > 0 and inputs.end == draft_round.n_rows > inputs.start

    def n_behind(self, head: int, draft_round: DraftRound) -> int:
        """Returns how many rows more than the usual few the next run takes."""
        n_missed = draft_round.n_rows - draft_round.state.heads[head].n_final
        return max(0, min(n_missed, self.window) - REPLAYED_ROWS)

    # a run

    def run(self, head: int, rounds: Sequence[DraftRound]) -> list[np.ndarray]:
        """Runs one head for several sequences; returns each one's logits of its new row, by the heads' own ids."""
        context = self.contexts[head]
        rows = []
        for draft_round in rounds:
            first = self._rewind(head, draft_round)
            first = self._catch_up(head, draft_round, first, self._n_last(context, len(rounds)))
            rows.append(self._rows(head, draft_round, first, draft_round.n_rows))
        context.decode(rows)
        self._keep_hidden(head, rounds, rows)
        ends = np.cumsum([r.outputs for r in rows])
        logits = context.logits()
        return [logits[end - 1].copy() for end in ends]

    def _rewind(self, head: int, draft_round: DraftRound) -> int:
        """Drops the rows to be decoded from the head's cache; returns the first of them."""
        state, n, n_read = draft_round.state.heads[head], draft_round.n_rows, draft_round.n_read
        reach = self.window if n_read is None else min(self.window, REPLAYED_ROWS + n_read)
        oldest = max(state.inputs.start, n - reach, 0)
        first = max(min(state.n_final, n - self.n_least), oldest)
        # llama.cpp wants consecutive positions: after a gap the cache starts anew.
        self.contexts[head].truncate(draft_round.seq, first if first <= state.n_final else 0)
        return first

    def _n_last(self, context: ContextInterface, n_rounds: int) -> int:
        """Returns how many rows of a sequence the last decode may have: of one shape, or what fits into a batch."""
        return REPLAYED_ROWS if self.n_least == REPLAYED_ROWS else context.n_batch // n_rounds

    def _catch_up(self, head: int, draft_round: DraftRound, first: int, n_last: int) -> int:
        """Decodes all but the last rows, a batch at a time; returns the first row left."""
        context, n = self.contexts[head], draft_round.n_rows
        while n - first > n_last:
            end = min(first + context.n_batch, n - REPLAYED_ROWS)
            rows = self._rows(head, draft_round, first, end)
            context.decode([rows])
            self._keep_hidden(head, [draft_round], [rows])
            first = end
        return first

    def _rows(self, head: int, draft_round: DraftRound, first: int, end: int) -> Rows:
        tokens = draft_round.row_tokens(head, first, end)
        n_outputs = self.n_outputs(head, len(tokens), has_new=end == draft_round.n_rows)
        tokens = self.vocabulary.known(tokens) if self.vocabulary else tokens
        hidden = draft_round.state.heads[head].inputs.get(first, end)
        return Rows(draft_round.seq, first, tokens, n_outputs, hidden)

    def n_outputs(self, head: int, n_rows: int, *, has_new: bool) -> int:
        """Returns how many of the last of a head's rows must return logits; with the new row that one at least."""
        needs_hidden = head + 1 < len(self) and not self.contexts[head].returns_all_rows
        return n_rows if needs_hidden else int(has_new)

    def _keep_hidden(self, head: int, rounds: Sequence[DraftRound], rows: Sequence[Rows]) -> None:
        for draft_round, r in zip(rounds, rows, strict=True):
            draft_round.state.heads[head].n_final = r.start + len(r.tokens)
        if head + 1 == len(self):
            return
        hidden, at = self.contexts[head].hidden(), 0
        for draft_round, r in zip(rounds, rows, strict=True):
            end = at + len(r.tokens)
            draft_round.state.heads[head + 1].inputs.put(r.start, hidden[at:end])
            at = end
