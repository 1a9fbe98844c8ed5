"""A turn: a session being extended to an answer, and what that cost."""

from dataclasses import dataclass, field
from typing import Literal

from step35.engine.session import Session
from step35.sampling.token_chooser import Chooser

Finish = Literal["stop", "length"]


@dataclass(slots=True)
class Stats:
    """What a turn cost: counts of tokens, seconds of wall time, and how drafting went."""

    n_prompt: int = 0
    n_reused: int = 0
    prefill_s: float = 0.0
    n_decoded: int = 0
    decode_s: float = 0.0
    n_rounds: int = 0
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
        return self.n_drafted / self.n_rounds if self.n_rounds else 0.0

    def count_round(self, source: str, n_drafted: int, n_accepted: int) -> None:
        self.n_rounds += 1
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
    """A session being extended; `finish` is None while it runs.

    `checkpoint_positions` are prompt lengths at which a checkpoint is kept on the way.
    """

    session: Session
    chooser: Chooser
    n_predict: int
    n_prompt: int
    checkpoint_positions: tuple[int, ...] = ()
    finish: Finish | None = None
    stats: Stats = field(default_factory=Stats)

    @property
    def generated(self) -> list[int]:
        return self.session.tokens[self.n_prompt :]

    @property
    def n_generated(self) -> int:
        return len(self.session.tokens) - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens that are known and not yet decoded."""
        return len(self.session.tokens) - self.session.n_past

    @property
    def n_to_next_checkpoint(self) -> int:
        """How many tokens a decode may take at most."""
        n_past = self.session.n_past
        return min((n - n_past for n in self.checkpoint_positions if n > n_past), default=self.n_pending)

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint is to be kept here: at its positions, and before a prompt's last piece.

        Asked for again, the prompt then takes the decode of that piece alone.
        """
        if self.session.n_past in self.checkpoint_positions:
            return True
        n_pending = self.n_pending
        return 1 < n_pending <= self.session.engine.options.n_batch and n_pending == self.n_to_next_checkpoint
