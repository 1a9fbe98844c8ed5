"""The MTP heads: one context each, run as the exact chain they were trained as.

Head k, row t takes token t+1+k and the pre-norm hidden state of row t from head k-1 (k = 0: from the
trunk), and proposes token t+2+k. With x the known tokens (the last one, x[n], not yet decoded by the
trunk) and d the drafts so far, head k's last row is n-1 and its token is d[k-1] (k = 0: x[n]).

A cycle runs each head once: rows that were accepted since its last run, rows whose token was a
rejected draft, and the new row, all in one decode. Where rows cost little (a GPU), REPLAYED_ROWS rows are decoded
even if fewer would do, so the shape stays the same and llama.cpp reuses its graph. A head is first run
over the last window of the prompt only: it can't see farther back.

The next head needs the hidden state of every row, and only the new row's logits are used. Stock llama.cpp returns
the one with the other, and runs the large output matrix for all rows; our own build runs it for the new one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from step35.drafting.hidden_ring import HiddenRows
from step35.native.draft_vocabulary import DraftVocabulary
from step35.native.rows import Rows

if TYPE_CHECKING:
    from step35.native.context import Context

REPLAYED_ROWS = 4


@dataclass(slots=True)
class HeadState:
    """One head's view of one timeline: its input rows, and how many rows in its cache are final."""

    inputs: HiddenRows
    n_final: int = 0


@dataclass(slots=True)
class Chain:
    """The drafts of one cycle for one sequence; `tokens` are known, the last one not yet decoded.

    `n_rows` is how many rows a head can have: one for each token the trunk has decoded.
    """

    seq: int
    tokens: Sequence[int]
    n_rows: int
    tracks: Sequence[HeadState]
    drafts: list[int] = field(default_factory=list)
    n_read: int | None = None
    """How many of the rows that the next head missed it reads, the last ones; None for all of its window."""

    def row_tokens(self, head: int, first: int, end: int) -> list[int]:
        """Returns the tokens that head's rows [first, end) take."""
        shift, n = 1 + head, self.n_rows + 1
        return [self.tokens[t] if t < n else self.drafts[t - n] for t in range(first + shift, end + shift)]


class Heads:
    """The heads' contexts, in the order of the chain; `n_least` is how many rows a run has at least, 1 to REPLAYED_ROWS."""

    def __init__(
        self,
        contexts: "Sequence[Context]",
        window: int,
        n_embd: int,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        self.contexts = contexts
        self.window = window
        self.n_least = REPLAYED_ROWS
        self.vocabulary = vocabulary
        """Of trimmed heads; None if they know all of the model's tokens."""
        self._n_embd = n_embd

    def __len__(self) -> int:
        return len(self.contexts)

    def new_tracks(self) -> list[HeadState]:
        """Returns the tracks of an empty timeline."""
        return [HeadState(HiddenRows(self.window + 2 * REPLAYED_ROWS, self._n_embd)) for _ in self.contexts]

    def truncate(self, seq: int, tracks: Sequence[HeadState], n_keep: int) -> None:
        """Forgets rows that depend on tokens from `n_keep` on."""
        if tracks:
            tracks[0].inputs.truncate(n_keep)
        for head in range(len(tracks)):
            self._finalize(tracks, head, n_keep - 1 - head)

    def update(self, chain: Chain, n_accepted: int) -> None:
        """Keeps as final the rows whose tokens were accepted; to be called after each verification."""
        for head in range(len(chain.tracks)):
            self._finalize(chain.tracks, head, chain.n_rows + n_accepted - head)

    @staticmethod
    def _finalize(tracks: Sequence[HeadState], head: int, n_final: int) -> None:
        tracks[head].n_final = max(0, min(tracks[head].n_final, n_final))
        if head + 1 < len(tracks):
            tracks[head + 1].inputs.truncate(max(0, n_final))

    def run(self, head: int, chains: Sequence[Chain]) -> list[np.ndarray]:
        """Runs one head for several sequences; returns each one's logits of its new row, by the heads' own ids."""
        context = self.contexts[head]
        rows = []
        for chain in chains:
            first = self._rewind(head, chain)
            first = self._catch_up(head, chain, first, self._n_last(context, len(chains)))
            rows.append(self._rows(head, chain, first, chain.n_rows))
        context.decode(rows)
        self._keep_hidden(head, chains, rows)
        ends = np.cumsum([r.outputs for r in rows])
        logits = context.logits()
        return [logits[end - 1].copy() for end in ends]

    def can_run(self, chain: Chain) -> bool:
        """Whether the trunk's hidden state of the last decoded row is known."""
        return chain.n_rows > 0 and chain.tracks[0].inputs.end == chain.n_rows > chain.tracks[0].inputs.start

    def is_caught_up(self, head: int, chain: Chain) -> bool:
        """Whether the next run takes only the usual few rows."""
        return not self.n_behind(head, chain.tracks, chain.n_rows)

    def n_behind(self, head: int, tracks: Sequence[HeadState], n_rows: int) -> int:
        """Returns how many rows more than the usual few the next run takes."""
        return max(0, min(n_rows - tracks[head].n_final, self.window) - REPLAYED_ROWS)

    def _rewind(self, head: int, chain: Chain) -> int:
        """Drops the rows to be decoded from the head's cache; returns the first of them."""
        track, n = chain.tracks[head], chain.n_rows
        reach = self.window if chain.n_read is None else min(self.window, REPLAYED_ROWS + chain.n_read)
        oldest = max(track.inputs.start, n - reach, 0)
        first = max(min(track.n_final, n - self.n_least), oldest)
        # llama.cpp wants consecutive positions: after a gap the cache starts anew.
        self.contexts[head].truncate(chain.seq, first if first <= track.n_final else 0)
        return first

    def _n_last(self, context: "Context", n_chains: int) -> int:
        """Returns how many rows of a chain the last decode may have: of one shape, or what fits into a batch."""
        return REPLAYED_ROWS if self.n_least == REPLAYED_ROWS else context.n_batch // n_chains

    def _catch_up(self, head: int, chain: Chain, first: int, n_last: int) -> int:
        """Decodes all but the last rows, a batch at a time; returns the first row left."""
        context, n = self.contexts[head], chain.n_rows
        while n - first > n_last:
            end = min(first + context.n_batch, n - REPLAYED_ROWS)
            rows = self._rows(head, chain, first, end)
            context.decode([rows])
            self._keep_hidden(head, [chain], [rows])
            first = end
        return first

    def _rows(self, head: int, chain: Chain, first: int, end: int) -> Rows:
        tokens = chain.row_tokens(head, first, end)
        n_outputs = self.n_outputs(head, len(tokens), has_new=end == chain.n_rows)
        tokens = self.vocabulary.known(tokens) if self.vocabulary else tokens
        return Rows(chain.seq, first, tokens, n_outputs, chain.tracks[head].inputs.get(first, end))

    def n_outputs(self, head: int, n_rows: int, *, has_new: bool) -> int:
        """Returns how many of the last of a head's rows must return logits; with the new row that one at least."""
        needs_hidden = head + 1 < len(self) and not self.contexts[head].returns_all_rows
        return n_rows if needs_hidden else int(has_new)

    def _keep_hidden(self, head: int, chains: Sequence[Chain], rows: Sequence[Rows]) -> None:
        for chain, r in zip(chains, rows, strict=True):
            chain.tracks[head].n_final = r.start + len(r.tokens)
        if head + 1 == len(self):
            return
        hidden, at = self.contexts[head].hidden(), 0
        for chain, r in zip(chains, rows, strict=True):
            end = at + len(r.tokens)
            chain.tracks[head + 1].inputs.put(r.start, hidden[at:end])
            at = end
