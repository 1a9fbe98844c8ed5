"""Drafting: proposes tokens for a cycle, and learns from what the trunk accepted.

One Drafter serves all sequences of an engine. `propose` comes before the trunk's decode, `update`
after it; between them lies the verification, which knows nothing about where a draft came from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from step35.drafting.depth_controller import DepthController, Drafted
from step35.drafting.mtp_heads import Chain, Heads, HeadState
from step35.drafting.prompt_lookup import NgramIndex
from step35.sampling.sampler import Sampling, choose_with_margin

LONGEST_LOOKUP, FIRST_REACH = 7, 2


@dataclass(slots=True)
class DraftState:
    """What drafting keeps about one timeline."""

    tracks: list[HeadState]
    index: NgramIndex = field(default_factory=NgramIndex)
    reach: int = FIRST_REACH
    """Tokens a look-up may draft: doubled when all were right, else as many as were. Texts differ much in it."""

    def learn_reach(self, n_drafted: int, n_accepted: int) -> None:
        self.reach = min(2 * self.reach, LONGEST_LOOKUP) if n_accepted == n_drafted else max(1, n_accepted)


@dataclass(slots=True)
class DraftRound:
    """One sequence's draft in one cycle: from the request over the proposal to the outcome."""

    seq: int
    tokens: Sequence[int]
    sampling: Sampling
    memory: DraftState
    n_max: int
    drafts: list[Drafted] = field(default_factory=list)
    source: str = "plain"
    match_length: int = 0
    chain: Chain | None = None
    chance: float = 1.0
    n_read: int | None = None
    seconds: float = 0.0

    @property
    def draft_tokens(self) -> list[int]:
        return [draft.token for draft in self.drafts]


class Drafter:
    """Proposes drafts by MTP heads and prompt lookup, as `mode` says (see options.DRAFT_MODES)."""

    def __init__(self, mode: str, heads: Heads | None, clock: Callable[[], float]) -> None:
        self.mode = mode
        self.heads = heads or None
        self.controller = DepthController(len(heads) if heads else 0)
        self._clock = clock
        self._fixed_depth = int(mode) if mode.isdigit() else None
        self.wants_hidden = self.heads is not None
        self.is_off = mode not in ("auto", "ngram") and not self.wants_hidden

    def new_memory(self) -> DraftState:
        return DraftState(self.heads.new_tracks() if self.heads else [])

    def truncate(self, seq: int, memory: DraftState, n_keep: int) -> None:
        """Follows a rewind of the timeline."""
        if self.heads:
            self.heads.truncate(seq, memory.tracks, n_keep)

    # before the trunk's decode

    def propose(self, cycles: Sequence[DraftRound]) -> None:
        """Fills in the drafts of each cycle; no cycle means that a prompt is read: after it drafting has a new chance."""
        if not cycles:
            self.controller.wake()
            return
        if self._fixed_depth is not None:
            self._run_heads(cycles)
        elif self.controller.begin_cycle(lambda: max(map(self._n_behind, cycles))):
            started = self._clock()
            self._consider(cycles)
            seconds = self._clock() - started
            for cycle in cycles:
                cycle.seconds = seconds
            self.controller.end_proposal(sum([len(cycle.drafts) for cycle in cycles]), seconds)

    def _consider(self, cycles: Sequence[DraftRound]) -> None:
        for cycle in cycles:
            self._look_up(cycle)
        if self.heads:
            self._run_heads([c for c in cycles if c.source == "plain"])

    def _n_behind(self, cycle: DraftRound) -> int:
        """Returns how many rows the head that is farthest behind would have to catch up with."""
        return max((self._n_missed(head, cycle) for head in range(len(self.heads or ()))), default=0)

    def _n_missed(self, head: int, cycle: DraftRound) -> int:
        return self.heads.n_behind(head, cycle.memory.tracks, len(cycle.tokens) - 1)

    def _look_up(self, cycle: DraftRound) -> None:
        n_max = min(cycle.memory.reach, cycle.n_max)
        match = cycle.memory.index.find(cycle.tokens, n_max) if n_max > 0 else None
        if match is None:
            return
        n = self.controller.lookup_depth(match.length, len(match.tokens))
        if n:
            cycle.drafts = [Drafted(token, 0.0) for token in match.tokens[:n]]
            cycle.source, cycle.match_length = "ngram", match.length

    def _run_heads(self, cycles: Sequence[DraftRound]) -> None:
        for head in range(len(self.heads or ())):
            cycles = [c for c in cycles if len(c.drafts) == head < c.n_max and self._runs(head, c)]
            if head == 0:
                cycles = [c for c in cycles if self._open_chain(c)]
            if not cycles:
                return
            self._run_head(head, cycles)

    def _open_chain(self, cycle: DraftRound) -> bool:
        cycle.chain = Chain(cycle.seq, cycle.tokens, len(cycle.tokens) - 1, cycle.memory.tracks)
        return self.heads.can_run(cycle.chain)

    def _runs(self, head: int, cycle: DraftRound) -> bool:
        if self._fixed_depth is not None:
            return head < self._fixed_depth
        cycle.n_read = self.controller.rows_to_read(head, cycle.chance, self._n_missed(head, cycle))
        return cycle.n_read is not None

    def _run_head(self, head: int, cycles: Sequence[DraftRound]) -> None:
        is_usual = len(cycles) == 1 and self.heads.is_caught_up(head, cycles[0].chain)
        for cycle in cycles:
            cycle.chain.n_read = cycle.n_read
        started = self._clock()
        logits = self.heads.run(head, [cycle.chain for cycle in cycles])
        for cycle, row in zip(cycles, logits, strict=True):
            self._add_draft(head, cycle, row)
        if is_usual:
            self.controller.costs.observe_draft(head, self._clock() - started)

    def _add_draft(self, head: int, cycle: DraftRound, logits) -> None:
        names = self.heads.vocabulary.tokens if self.heads.vocabulary else None
        token, margin = choose_with_margin(logits, cycle.sampling, len(cycle.tokens) + head, names)
        if self._fixed_depth is None and not self.controller.keeps(head, cycle.chance, margin):
            return
        cycle.source = "mtp"
        cycle.drafts.append(Drafted(token, margin))
        cycle.chain.drafts.append(token)
        cycle.chance *= self.controller.chance(head, margin)

    # after the trunk's decode

    def update(self, cycle: DraftRound, n_accepted: int, n_tokens: int, verify_s: float, *, is_alone: bool) -> None:
        """Learns from a cycle: `n_accepted` drafts agreed, `n_tokens` came of it."""
        if cycle.chain is not None:
            self.heads.update(cycle.chain, n_accepted)
        if cycle.source == "mtp":
            self.controller.learn_heads(cycle.drafts, n_accepted)
        elif cycle.source == "ngram":
            self.controller.learn_lookup(cycle.match_length, len(cycle.drafts), n_accepted)
            cycle.memory.learn_reach(len(cycle.drafts), n_accepted)
        if is_alone:
            if not self.controller.is_resting:
                self.controller.costs.observe_verify(len(cycle.drafts) + 1, verify_s)
            self.controller.learn_cycle(n_tokens, cycle.seconds + verify_s)
