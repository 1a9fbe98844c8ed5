"""What drafting keeps about a timeline, and one round of it: what is asked for, and the drafts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from step35.drafting.acceptance import Drafted
from step35.drafting.hidden_ring import HiddenRows
from step35.drafting.prompt_lookup import NgramIndex
from step35.sampling.sampler import Sampling

LONGEST_LOOKUP, FIRST_REACH = 7, 2

Source = Literal["plain", "mtp", "ngram"]
"""Where a round's drafts come from; a plain round has none."""


@dataclass(slots=True)
class HeadState:
    """One head's view of one timeline: its input rows, and how many rows in its cache are final."""

    inputs: HiddenRows
    n_final: int = 0


@dataclass(slots=True)
class DraftState:
    """What drafting keeps about one timeline."""

    heads: list[HeadState]
    index: NgramIndex = field(default_factory=NgramIndex)
    reach: int = FIRST_REACH
    """Tokens a look-up may draft: doubled when all were right, else as many as were. Texts differ much in it."""

    def learn_reach(self, n_drafted: int, n_accepted: int) -> None:
        self.reach = min(2 * self.reach, LONGEST_LOOKUP) if n_accepted == n_drafted else max(1, n_accepted)


@dataclass(slots=True)
class DraftRound:
    """One sequence's drafts in one round.

    `tokens` are known, the last one not yet decoded by the trunk. They are the session's own list, which grows while
    the drafts are verified; `n_rows` stays.
    """

    seq: int
    tokens: Sequence[int]
    sampling: Sampling
    state: DraftState
    n_max: int
    drafts: list[Drafted] = field(default_factory=list)
    source: Source = "plain"
    match_length: int = 0
    has_run_heads: bool = False
    chain_rate: float = 1.0
    """The probability that all drafts so far are accepted."""
    n_read: int | None = None
    """How many of the rows that the next head missed it reads, the last ones; None for all of its window."""
    propose_s: float = 0.0
    n_rows: int = field(init=False)
    """How many rows a head can have: one for each token that the trunk has decoded."""

    def __post_init__(self) -> None:
        self.n_rows = len(self.tokens) - 1

    @property
    def draft_tokens(self) -> list[int]:
        return [draft.token for draft in self.drafts]

    def row_tokens(self, head: int, first: int, end: int) -> list[int]:
        """Returns the tokens that a head's rows [first, end) take."""
        shift, n = 1 + head, self.n_rows + 1
        return [self.tokens[t] if t < n else self.drafts[t - n].token for t in range(first + shift, end + shift)]
