"""How many tokens to draft: decided each round by confidence and measured cost. Pure: no clock, no model.

A draft is worth verifying when its acceptance rate, times what a token is worth, exceeds the time that it adds to the
verification, or when that holds together with the drafts that usually follow: a second token in a decode may be
expensive and the third nearly free. A token is worth what one costs at present: the time of a plain decode, or less
where drafting already beats it. A head is worth running when the gain expected over the margins that it usually shows
exceeds its own time. Rates are estimates, and heads run where they are high: so only CAUTION of a gain is believed.

A head that has not run for a while first has to catch up with the rows it missed. It may spend READ_SHARE of what it is
likely to gain over the rounds in a row in which it runs: as many as is usual of late, and as are left of a usual
answer. Where that doesn't pay for all rows it reads the last ones only, which serve it almost as well.

What isn't done can't be measured, so a probe round now and then drafts at full depth or not at all.
Probes are paid from a budget of PROBE_SHARE of the time spent, so they can't cost more than that.

To decide takes time, too. After a round that ran no head, drafting is in cooldown for some rounds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from step35.drafting.acceptance import DECAY, Acceptance, Drafted
from step35.drafting.decode_costs import Costs

PROBE_SHARE = 0.01
CAUTION = 0.9
READ_SHARE = 0.5
LEAST_READ = 8
"""Rows: with fewer a head guesses."""
COOLDOWN = 8
"""Rounds, at least, after one that ran no head before drafting is considered again."""
LONGEST_COOLDOWN = 24
"""Rounds: a text that begins to repeat itself must not wait long for look-ups."""
DECISION_SHARE = 0.005
"""Of the time that may go into decisions not to draft."""
WINNING = 0.9
"""A token at less than this much of a plain decode: then drafts are worth considering."""
USUAL_ANSWER = 64.0
"""Tokens, before one has ended."""
ANSWER_DECAY = 0.8
FREQUENT = 0.9
"""Share of rounds in which a head is worth its time, before any."""
FREQUENCY_DECAY = 0.9


@dataclass(slots=True)
class AnswerLength:
    """How many tokens an answer has; recent answers count more."""

    mean: float = USUAL_ANSWER
    _n_now: int = 0

    def add(self, n_tokens: int) -> None:
        self._n_now += n_tokens

    def end(self) -> None:
        if self._n_now:
            self.mean = self.mean * ANSWER_DECAY + self._n_now * (1 - ANSWER_DECAY)
            self._n_now = 0


class DepthController:
    """Decides how many tokens a round drafts, and learns from what came of them."""

    def __init__(self, n_heads: int) -> None:
        self.costs = Costs()
        self._heads = [Acceptance() for _ in range(n_heads)]
        self._lookups: dict[int, Acceptance] = {}
        self._frequency = [FREQUENT] * n_heads
        self._has_run = False
        self._n_worth = 0  # heads of this round that are worth their time, whatever they have to catch up with
        self._answer = AnswerLength()
        self._budget_s = 0.0
        self._probe_depth: int | None = None
        self._next_probe_is_deep = True
        self._n_cooldown = 0
        self._tokens = self._seconds = 0.0

    # before a round

    def begin_round(self, n_behind: Callable[[], int] = lambda: 0) -> bool:
        """Returns whether drafting is considered at all; decides whether the round is a probe.

        A probe is at full depth, or without a draft; `n_behind` counts the rows that each head must decode before it.
        """
        self._probe_depth = None
        if self._n_cooldown:
            self._n_cooldown -= 1
            return False
        self._n_worth, self._has_run = 0, False
        depth = len(self._heads) if self._next_probe_is_deep else 0
        if self._heads and self._budget_s > self._probe_cost(depth, n_behind()) > 0:
            self._probe_depth = depth
            self._next_probe_is_deep = not self._next_probe_is_deep
        return True

    def end_proposal(self, n_drafted: int, seconds: float = 0.0) -> None:
        """Begins a cooldown when not even running a head was worth it, or it had too much to catch up with.

        `seconds` is what the decision took. Where drafts haven't won much of late, the cooldown is so long that
        decisions take no more than DECISION_SHARE of the time: beside a decode of a small model they aren't cheap.
        """
        if n_drafted or self._has_run or self._probe_depth is not None:
            return
        plain = self.costs.verify(1)
        is_winning = self.token_value_s() < WINNING * plain
        n_paying = int(seconds / (DECISION_SHARE * plain or math.inf))
        self._n_cooldown = COOLDOWN if is_winning else min(max(COOLDOWN, n_paying), LONGEST_COOLDOWN)

    def resume(self) -> None:
        """Ends a cooldown and forgets what a token has cost of late: another text may be easier to draft, or harder."""
        self._answer.end()
        self._n_cooldown = 0
        self._tokens = self._seconds = 0.0

    @property
    def in_cooldown(self) -> bool:
        return self._n_cooldown > 0

    def _probe_cost(self, depth: int, n_behind: int) -> float:
        """Returns the seconds a probe may lose."""
        plain = self.costs.verify(1)
        if depth == 0:
            return plain
        heads_s = sum(self.costs.draft(head) + n_behind * self.costs.row_s for head in range(depth))
        return self.costs.verify(depth + 1) - plain + heads_s

    def token_value_s(self) -> float:
        """Returns the seconds that one more token is worth."""
        plain = self.costs.verify(1)
        if not self._tokens:
            return plain
        return min(plain, self._seconds / self._tokens)

    # the heads

    def rows_to_read(self, head: int, chain_rate: float, n_behind: int = 0) -> int | None:
        """Returns how many of the rows that a head missed it is to read, the last ones; None if it is not to run.

        `chain_rate` is the probability that all drafts before the head's are accepted.
        """
        if self._probe_depth is not None:
            return n_behind if head < self._probe_depth else None
        net = self._likely_gain(head, chain_rate) - self.costs.draft(head)
        if net <= 0:
            return None
        self._n_worth = max(self._n_worth, head + 1)
        n_read = self._affordable(n_behind, READ_SHARE * net * self._rounds_in_a_row(head))
        self._has_run |= n_read is not None
        return n_read

    def _likely_gain(self, head: int, chain_rate: float) -> float:
        """Returns the seconds that a head's token is likely to win, of which its run takes some."""
        lines = self._outlook(head)
        if CAUTION * _best(lines, chain_rate) <= self.costs.draft(head):  # not even a certain token pays: quick to see
            return 0.0
        return CAUTION * self._heads[head].expectation(lambda rate: max(0.0, _best(lines, chain_rate * rate)))

    def _affordable(self, n_behind: int, seconds: float) -> int | None:
        if n_behind * self.costs.row_s <= seconds:
            return n_behind
        n = int(seconds / self.costs.row_s)
        return n if n >= LEAST_READ else None

    def _rounds_in_a_row(self, head: int) -> float:
        """Returns in how many rounds, from this one on, a head is likely to run without a gap."""
        in_answer = max(1.0, self._answer.mean / self._tokens_a_round())
        return min(in_answer, 1 / max(1e-9, 1 - self._frequency[head]))

    def _tokens_a_round(self) -> float:
        """Returns how many tokens come of a round in which all heads run."""
        return 1.0 + sum(accumulate((head.mean_rate() for head in self._heads), mul))

    def keeps(self, head: int, chain_rate: float, margin: float) -> bool:
        """Whether a head's token is worth verifying."""
        self._heads[head].see(margin)
        if self._probe_depth is not None:
            return True
        return _best(self._outlook(head), chain_rate * self._heads[head].rate(margin)) > 0

    def _outlook(self, head: int) -> list[tuple[float, float]]:
        """Returns (value, cost) in seconds of verifying a head's token, alone and with the usual drafts after it.

        The value is that of a certain token: it is to be multiplied by the acceptance rate.
        """
        value = worth = self.token_value_s()
        cost = self._added(head)
        lines = [(worth, cost)]
        for later in range(head + 1, len(self._heads)):
            value *= self._heads[later].mean_rate()
            worth += value
            cost += self.costs.draft(later) + self._added(later)
            lines.append((worth, cost))
        return lines

    def _added(self, n_before: int) -> float:
        """Returns the seconds that one more token adds to a verification with `n_before` drafts."""
        return max(0.0, self.costs.verify(n_before + 2) - self.costs.verify(n_before + 1))

    def rate(self, head: int, margin: float) -> float:
        """Returns the probability that a head's draft is accepted."""
        return self._heads[head].rate(margin)

    # prompt lookup

    def lookup_depth(self, match_length: int, n_available: int) -> int:
        """Returns how many tokens of a prompt-lookup match to verify; 0 if another way is faster.

        A round of n drafts with the same acceptance rate r brings 1 + r + ... + r^n tokens (Leviathan et al. 2023,
        https://arxiv.org/abs/2211.17192, equation 1).
        """
        if self._probe_depth is not None:
            return 0
        rate, value = self._lookup(match_length).rate(_lookup_margin(match_length)), self.token_value_s()
        gains = list(accumulate((rate ** (i + 1) * value - self._added(i) for i in range(n_available)), initial=0.0))
        n = max(range(n_available + 1), key=gains.__getitem__)
        if not n:
            return 0
        tps = sum(rate**i for i in range(n + 1)) / self.costs.verify(n + 1)
        return n if tps > self._heads_tps() else 0

    def _heads_tps(self) -> float:
        """Returns the tokens a second of the heads at their best depth, with the usual acceptance rates."""
        best, chain_rate, n_tokens, draft_s = 0.0, 1.0, 1.0, 0.0
        for head, acceptance in enumerate(self._heads):
            chain_rate *= acceptance.mean_rate()
            n_tokens += chain_rate
            draft_s += self.costs.draft(head)
            best = max(best, n_tokens / (draft_s + self.costs.verify(head + 2)))
        return best

    def _lookup(self, match_length: int) -> Acceptance:
        return self._lookups.setdefault(min(match_length.bit_length(), 6), Acceptance())

    # after a round

    def learn_heads(self, drafts: Sequence[Drafted], n_accepted: int) -> None:
        """Learns which of a chain's drafts were accepted; those after the first rejection tell nothing."""
        for head, draft in enumerate(drafts[: n_accepted + 1]):
            self._heads[head].observe(draft.margin, head < n_accepted)

    def learn_lookup(self, match_length: int, n_drafted: int, n_accepted: int) -> None:
        """Learns how much of a prompt-lookup draft was accepted."""
        margin = _lookup_margin(match_length)
        for i in range(min(n_accepted + 1, n_drafted)):
            self._lookup(match_length).observe(margin, i < n_accepted)

    def learn_round(self, n_tokens: int, seconds: float) -> None:
        """Learns what a round of one sequence took in all."""
        self._answer.add(n_tokens)
        if self._probe_depth is None:
            self._learn_frequency()
        else:
            self._budget_s -= max(0.0, seconds - n_tokens * self.token_value_s()) if self._probe_depth else seconds
            self._probe_depth = None
        self._tokens = self._tokens * DECAY + n_tokens
        self._seconds = self._seconds * DECAY + seconds
        self._budget_s += PROBE_SHARE * seconds

    def _learn_frequency(self) -> None:
        """Learns in which share of rounds each head is worth its time."""
        for head in range(len(self._frequency)):
            self._frequency[head] *= FREQUENCY_DECAY
            if head < self._n_worth:
                self._frequency[head] += 1 - FREQUENCY_DECAY


def _best(lines: Sequence[tuple[float, float]], rate: float) -> float:
    """Returns the seconds that the best of an outlook's lines gains at an acceptance rate."""
    return max([rate * worth - cost for worth, cost in lines])


def _lookup_margin(match_length: int) -> float:
    """Before anything is known, four matching tokens promise as much as a toss of a coin, and each doubling more."""
    return math.log2(match_length / 4)
