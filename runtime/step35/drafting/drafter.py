"""Drafting: proposes tokens for a round, and learns from what the trunk accepted.

One Drafter serves all sequences of an engine. `propose` comes before the trunk's decode, `update`
after it; between them lies the verification, which knows nothing about where a draft came from.
"""

from collections.abc import Callable, Sequence

import numpy as np

from step35.choices import Draft
from step35.drafting.acceptance import Drafted
from step35.drafting.depth_controller import DepthController
from step35.drafting.draft_round import DraftRound, DraftState
from step35.drafting.mtp_heads import Heads
from step35.sampling.sampler import choose_with_margin


class Drafter:
    """Proposes drafts by MTP heads and prompt lookup, as `mode` says."""

    def __init__(self, mode: Draft, heads: Heads | None, clock: Callable[[], float]) -> None:
        self.heads = heads or Heads((), 0, 0)
        self.controller = DepthController(len(self.heads))
        self._clock = clock
        self._fixed_depth = mode.depth
        self.wants_hidden = len(self.heads) > 0
        self._is_off = not mode.uses_lookup and not self.wants_hidden

    # what is kept about a timeline

    def new_state(self) -> DraftState:
        """Returns the state of an empty timeline."""
        return DraftState(self.heads.new_states())

    def truncate(self, state: DraftState, n_keep: int) -> None:
        """Follows a rewind of the timeline."""
        self.heads.truncate(state, n_keep)

    def keep_hidden(self, state: DraftState, first: int, rows: np.ndarray) -> None:
        """Keeps the trunk's pre-norm hidden states (n_rows, n_embd) from position `first` on, for the first head."""
        state.heads[0].inputs.put(first, rows)

    # before the trunk's decode

    def propose(self, rounds: Sequence[DraftRound]) -> None:
        """Fills in the drafts of each round; no round means that a prompt is read, which ends a cooldown."""
        if self._is_off:
            return
        if not rounds:
            self.controller.resume()
        elif self._fixed_depth is not None:
            self._run_heads(rounds)
        elif self.controller.begin_round(lambda: max(map(self._n_behind, rounds))):
            self._consider(rounds)

    def _consider(self, rounds: Sequence[DraftRound]) -> None:
        started = self._clock()
        for draft_round in rounds:
            self._look_up(draft_round)
        self._run_heads([r for r in rounds if r.source == "plain"])
        seconds = self._clock() - started
        for draft_round in rounds:
            draft_round.propose_s = seconds
        self.controller.end_proposal(sum([len(r.drafts) for r in rounds]), seconds)

    def _n_behind(self, draft_round: DraftRound) -> int:
        """Returns how many rows the head that is farthest behind would have to catch up with."""
        return max((self.heads.n_behind(head, draft_round) for head in range(len(self.heads))), default=0)

    def _look_up(self, draft_round: DraftRound) -> None:
        state = draft_round.state
        n_max = min(state.reach, draft_round.n_max)
        match = state.index.find(draft_round.tokens, n_max) if n_max > 0 else None
        if match is None:
            return
        n = self.controller.lookup_depth(match.length, len(match.tokens))
        if n:
            draft_round.drafts = [Drafted(token, 0.0) for token in match.tokens[:n]]
            draft_round.source, draft_round.match_length = "ngram", match.length

    def _run_heads(self, rounds: Sequence[DraftRound]) -> None:
        for head in range(len(self.heads)):
            rounds = [r for r in rounds if len(r.drafts) == head < r.n_max and self._is_to_run(head, r)]
            if head == 0:
                rounds = [r for r in rounds if self.heads.can_run(r)]
            if not rounds:
                return
            self._run_head(head, rounds)

    def _is_to_run(self, head: int, draft_round: DraftRound) -> bool:
        """Whether a head is worth its time; sets how many of the rows that it missed it reads."""
        if self._fixed_depth is not None:
            return head < self._fixed_depth
        n_behind = self.heads.n_behind(head, draft_round)
        draft_round.n_read = self.controller.rows_to_read(head, draft_round.chain_rate, n_behind)
        return draft_round.n_read is not None

    def _run_head(self, head: int, rounds: Sequence[DraftRound]) -> None:
        is_usual = len(rounds) == 1 and not self.heads.n_behind(head, rounds[0])
        started = self._clock()
        logits = self.heads.run(head, rounds)
        for draft_round, row in zip(rounds, logits, strict=True):
            draft_round.has_run_heads = True
            self._add_draft(head, draft_round, row)
        if is_usual:
            self.controller.costs.observe_draft(head, self._clock() - started)

    def _add_draft(self, head: int, draft_round: DraftRound, logits: np.ndarray) -> None:
        names = self.heads.vocabulary.tokens if self.heads.vocabulary else None
        token, margin = choose_with_margin(logits, draft_round.sampling, len(draft_round.tokens) + head, names)
        if self._fixed_depth is None and not self.controller.keeps(head, draft_round.chain_rate, margin):
            return
        draft_round.source = "mtp"
        draft_round.drafts.append(Drafted(token, margin))
        draft_round.chain_rate *= self.controller.rate(head, margin)

    # after the trunk's decode

    def update(
        self, draft_round: DraftRound, n_accepted: int, n_tokens: int, verify_s: float, *, is_alone: bool
    ) -> None:
        """Learns from a round: `n_accepted` drafts agreed, `n_tokens` came of it.

        Seconds tell something only of a round that had the trunk's decode alone.
        """
        if self._is_off:
            return
        if draft_round.has_run_heads:
            self.heads.update(draft_round, n_accepted)
        self._learn_outcome(draft_round, n_accepted)
        if is_alone:
            if not self.controller.in_cooldown:
                self.controller.costs.observe_verify(len(draft_round.drafts) + 1, verify_s)
            self.controller.learn_round(n_tokens, draft_round.propose_s + verify_s)

    def _learn_outcome(self, draft_round: DraftRound, n_accepted: int) -> None:
        if draft_round.source == "mtp":
            self.controller.learn_heads(draft_round.drafts, n_accepted)
        elif draft_round.source == "ngram":
            self.controller.learn_lookup(draft_round.match_length, len(draft_round.drafts), n_accepted)
            draft_round.state.learn_reach(len(draft_round.drafts), n_accepted)
