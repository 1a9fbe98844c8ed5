"""How deep to draft: each cycle by confidence and measured cost. Pure: no clock, no model.

A draft token is worth verifying when its chance of acceptance, times what a token is worth, exceeds
the time it adds to the verification, or when it does so together with the drafts that usually follow:
a second token in a decode may be dear and the third nearly free. A token is worth what one costs at
present: the time of a plain decode, or less where drafting already beats it. A head is worth running
when the gain expected over the margins it usually shows exceeds its own time. Chances are estimates, and heads
run where they are high: so only CAUTION of a gain is believed.

A head that has not run for a while first has to catch up with the rows it missed. It may spend READ_SHARE of what it is
likely to gain over the cycles in a row in which it runs: as many as is usual of late, and as are left of a usual
answer. Where that doesn't pay for all rows it reads the last ones only, which serve it almost as well.

What isn't done can't be measured, so a probe cycle now and then drafts at full depth or not at all.
Probes are paid from a budget of PROBE_SHARE of the time spent, so they can't cost more than that.
"""

import math
from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

PROBE_SHARE = 0.01
MARGIN_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
N_BINS = len(MARGIN_EDGES) + 1
PRIOR_WEIGHT = 4.0
DECAY = 0.98
N_SAMPLES = 15
CAUTION = 0.9
READ_SHARE = 0.5
LEAST_READ = 8  # rows: with fewer a head guesses
REST = 8  # cycles, at least, after one that ran no head before drafting is considered again
LONGEST_REST = 24  # a text that begins to repeat itself must not wait long for look-ups
THINK_SHARE = 0.005  # of the time may go into considering what then isn't done
WINNING = 0.9  # a token at less than this much of a plain decode: then drafts are worth a thought
USUAL_ANSWER = 64.0  # tokens, before one has ended
ANSWER_DECAY = 0.8
FREQUENT = 0.9  # share of cycles in which a head is worth its time, before any
FREQUENCY_DECAY = 0.9


@dataclass(slots=True)
class Costs:
    """Seconds per verify width (tokens in one decode) and per head run: medians of the last samples."""

    _verify: dict[int, deque[float]] = field(default_factory=dict)
    _draft: dict[int, deque[float]] = field(default_factory=dict)
    _medians: dict[int, float] = field(default_factory=dict)
    _verify_s: dict[int, float] = field(default_factory=dict)
    _draft_s: dict[int, float] = field(default_factory=dict)
    row_s: float = 0.0
    """Seconds of a row that a head has to catch up with."""

    def observe_verify(self, width: int, seconds: float) -> None:
        self._medians[width] = _median_with(self._verify, width, seconds)
        cheapest = math.inf
        for known in sorted(self._medians, reverse=True):  # fewer tokens never cost more: heals a bad sample
            cheapest = self._verify_s[known] = min(cheapest, self._medians[known])

    def observe_draft(self, head: int, seconds: float) -> None:
        self._draft_s[head] = _median_with(self._draft, head, seconds)

    def verify(self, width: int) -> float:
        """Returns the seconds of a decode of `width` tokens, on the line between measured widths."""
        if width in self._verify_s or not self._verify_s:
            return self._verify_s.get(width, 0.0)
        known = sorted(self._verify_s)
        at = bisect(known, width)
        low, high = (known[at - 1], known[at]) if 0 < at < len(known) else _ends(known, at)
        a, b = self._verify_s[low], self._verify_s[high]
        return a + (b - a) * (width - low) / (high - low) if high > low else a

    def draft(self, head: int) -> float:
        """Returns the seconds of running a head for one new row; 0 when not measured yet."""
        return self._draft_s.get(head, 0.0)

    def measured(self) -> dict[tuple[str, int], float]:
        """Returns seconds by ('verify', width) and ('draft', head)."""
        verify = {("verify", width): seconds for width, seconds in self._verify_s.items()}
        return verify | {("draft", head): seconds for head, seconds in self._draft_s.items()}


def _median_with(samples: dict[int, deque[float]], key: int, seconds: float) -> float:
    """Adds a sample and returns the median of the last ones."""
    if key not in samples:
        samples[key] = deque(maxlen=N_SAMPLES)
    samples[key].append(seconds)
    return sorted(samples[key])[len(samples[key]) // 2]


def _ends(known: Sequence[int], at: int) -> tuple[int, int]:
    if len(known) == 1:
        return known[0], known[0]
    return (known[0], known[1]) if at == 0 else (known[-2], known[-1])


_MIDDLES = [(a + b) / 2 for a, b in zip((0.0, *MARGIN_EDGES), (*MARGIN_EDGES, 8.0), strict=False)]
_PRIORS = [1 / (1 + math.exp(-middle)) for middle in _MIDDLES]


@dataclass(slots=True)
class Acceptance:
    """How often a drafted token was accepted, by the margin of its choice; recent ones count more.

    The margin is the distance of the two best (noised) scores. Before anything is known, the chance
    is the margin's logistic.
    """

    _n: list[float] = field(default_factory=lambda: [0.0] * N_BINS)
    _hits: list[float] = field(default_factory=lambda: [0.0] * N_BINS)
    _seen: list[float] = field(default_factory=lambda: [1.0] * N_BINS)
    _chances: list[float] = field(default_factory=lambda: list(_PRIORS))
    _mean: float | None = None

    def chance(self, margin: float) -> float:
        """Returns the probability that a draft with this margin is accepted."""
        return self._chances[bisect(MARGIN_EDGES, margin)]

    def see(self, margin: float) -> None:
        """Counts a margin, whether or not its draft is going to be verified."""
        self._seen = [n * DECAY for n in self._seen]
        self._seen[bisect(MARGIN_EDGES, margin)] += 1
        self._mean = None

    def observe(self, margin: float, accepted: bool) -> None:
        """Learns the outcome of a verified draft."""
        i = bisect(MARGIN_EDGES, margin)
        self._n[i] = self._n[i] * DECAY + 1
        self._hits[i] = self._hits[i] * DECAY + accepted
        self._chances[i] = (self._hits[i] + PRIOR_WEIGHT * _PRIORS[i]) / (self._n[i] + PRIOR_WEIGHT)
        self._mean = None

    def mean_chance(self) -> float:
        """Returns the chance of a draft with the usual margins."""
        if self._mean is None:
            self._mean = self.expectation(lambda chance: chance)
        return self._mean

    def expectation(self, gain_s: Callable[[float], float]) -> float:
        """Returns the mean over usual margins of a function of the chance."""
        return sum(map(mul, self._seen, map(gain_s, self._chances))) / sum(self._seen)


@dataclass(slots=True)
class Answers:
    """How many tokens an answer has; recent answers count more."""

    mean: float = USUAL_ANSWER
    _n_now: int = 0

    def add(self, n_tokens: int) -> None:
        self._n_now += n_tokens

    def end(self) -> None:
        if self._n_now:
            self.mean = self.mean * ANSWER_DECAY + self._n_now * (1 - ANSWER_DECAY)
            self._n_now = 0


@dataclass(frozen=True, slots=True)
class Drafted:
    """A proposed token with the margin of its choice."""

    token: int
    margin: float


class DepthController:
    """Decides how many tokens a cycle drafts, and learns from what came of them."""

    def __init__(self, n_heads: int) -> None:
        self.costs = Costs()
        self._heads = [Acceptance() for _ in range(n_heads)]
        self._lookups: dict[int, Acceptance] = {}
        self._frequency = [FREQUENT] * n_heads
        self._has_run = False
        self._n_worth = 0  # heads of this cycle that are worth their time, whatever they have to catch up with
        self._answers = Answers()
        self._budget_s = 0.0
        self._probe: int | None = None
        self._n_resting = 0
        self._next_probe_is_deep = True
        self._tokens = self._seconds = 0.0

    # before a cycle

    def begin_cycle(self, n_behind: Callable[[], int] = lambda: 0) -> bool:
        """Returns whether to think about drafting at all; decides whether the cycle is a probe.

        A probe is at full depth, or without a draft; `n_behind` counts the rows that each head must decode
        before it. Cycles after one that ran no head rest: thinking takes time, too.
        """
        self._probe = None
        if self._n_resting:
            self._n_resting -= 1
            return False
        self._n_worth, self._has_run = 0, False
        depth = len(self._heads) if self._next_probe_is_deep else 0
        if self._heads and self._budget_s > self._probe_cost(depth, n_behind()) > 0:
            self._probe = depth
            self._next_probe_is_deep = not self._next_probe_is_deep
        return True

    def end_proposal(self, n_drafted: int, seconds: float = 0.0) -> None:
        """Takes a rest when not even running a head was worth it, or it had too much to catch up with.

        The longer the longer it took to see that, where drafts haven't won much of late: beside a decode of a small
        model, thinking isn't cheap.
        """
        if not n_drafted and not self._has_run and self._probe is None:
            plain = self.costs.verify(1)
            is_winning = self.token_value_s() < WINNING * plain
            n_paying = int(seconds / (THINK_SHARE * plain or math.inf))
            self._n_resting = REST if is_winning else min(max(REST, n_paying), LONGEST_REST)

    def wake(self) -> None:
        """Ends a rest and forgets what a token has cost of late: another text may be easier to draft, or harder."""
        self._answers.end()
        self._n_resting = 0
        self._tokens = self._seconds = 0.0

    @property
    def is_resting(self) -> bool:
        return self._n_resting > 0

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

    def rows_to_read(self, head: int, chain_chance: float, n_behind: int = 0) -> int | None:
        """Returns how many of the rows that a head missed it is to read, the last ones; None if it is not to run.

        `chain_chance` is the chance that all drafts before the head's are accepted.
        """
        if self._probe is not None:
            return n_behind if head < self._probe else None
        net = self._likely_gain(head, chain_chance) - self.costs.draft(head)
        if net <= 0:
            return None
        self._n_worth = max(self._n_worth, head + 1)
        n_read = self._affordable(n_behind, READ_SHARE * net * self._cycles_in_a_row(head))
        self._has_run |= n_read is not None
        return n_read

    def _likely_gain(self, head: int, chain_chance: float) -> float:
        """Returns the seconds that a head's token is likely to win, of which its run takes some."""
        lines = self._outlook(head)
        if CAUTION * _best(lines, chain_chance) <= self.costs.draft(head):  # not even a certain token pays: seen fast
            return 0.0
        return CAUTION * self._heads[head].expectation(lambda chance: max(0.0, _best(lines, chain_chance * chance)))

    def _affordable(self, n_behind: int, seconds: float) -> int | None:
        if n_behind * self.costs.row_s <= seconds:
            return n_behind
        n = int(seconds / self.costs.row_s)
        return n if n >= LEAST_READ else None

    def _cycles_in_a_row(self, head: int) -> float:
        """Returns in how many cycles, from this one on, a head is likely to run without a gap."""
        in_answer = max(1.0, self._answers.mean / self._tokens_a_cycle())
        return min(in_answer, 1 / max(1e-9, 1 - self._frequency[head]))

    def _tokens_a_cycle(self) -> float:
        """Returns how many tokens come of a cycle in which all heads run."""
        return 1.0 + sum(accumulate((head.mean_chance() for head in self._heads), mul))

    def keeps(self, head: int, chain_chance: float, margin: float) -> bool:
        """Whether a head's token is worth verifying."""
        self._heads[head].see(margin)
        if self._probe is not None:
            return True
        return _best(self._outlook(head), chain_chance * self._heads[head].chance(margin)) > 0

    def _outlook(self, head: int) -> list[tuple[float, float]]:
        """Returns (value, cost) in seconds of verifying a head's token, alone and with the usual drafts after it.

        The value is that of a certain token: it is to be multiplied by the chance.
        """
        value = worth = self.token_value_s()
        cost = self._added(head)
        lines = [(worth, cost)]
        for later in range(head + 1, len(self._heads)):
            value *= self._heads[later].mean_chance()
            worth += value
            cost += self.costs.draft(later) + self._added(later)
            lines.append((worth, cost))
        return lines

    def _added(self, n_before: int) -> float:
        return max(0.0, self.costs.verify(n_before + 2) - self.costs.verify(n_before + 1))

    def chance(self, head: int, margin: float) -> float:
        """Returns the probability that a head's draft is accepted."""
        return self._heads[head].chance(margin)

    def lookup_depth(self, match_length: int, n_available: int) -> int:
        """Returns how many tokens of a prompt-lookup match to verify; 0 if another way is faster."""
        if self._probe is not None:
            return 0
        chance, value = self._lookup_chance(match_length), self.token_value_s()
        gains = list(accumulate((chance ** (i + 1) * value - self._added(i) for i in range(n_available)), initial=0.0))
        n = max(range(n_available + 1), key=gains.__getitem__)
        if not n:
            return 0
        rate = sum(chance**i for i in range(n + 1)) / self.costs.verify(n + 1)
        return n if rate > self._heads_rate() else 0

    def _heads_rate(self) -> float:
        """Returns the tokens a second of the heads at their best depth, with the usual chances."""
        best, chance, n_tokens, draft_s = 0.0, 1.0, 1.0, 0.0
        for head, acceptance in enumerate(self._heads):
            chance *= acceptance.mean_chance()
            n_tokens += chance
            draft_s += self.costs.draft(head)
            best = max(best, n_tokens / (draft_s + self.costs.verify(head + 2)))
        return best

    def _lookup_chance(self, match_length: int) -> float:
        return self._lookup(match_length).chance(_lookup_margin(match_length))

    def _lookup(self, match_length: int) -> Acceptance:
        return self._lookups.setdefault(min(match_length.bit_length(), 6), Acceptance())

    # after a cycle

    def learn_heads(self, drafts: Sequence[Drafted], n_accepted: int) -> None:
        """Learns which of a chain's drafts were accepted; those after the first rejection tell nothing."""
        for head, draft in enumerate(drafts[: n_accepted + 1]):
            self._heads[head].observe(draft.margin, head < n_accepted)

    def learn_lookup(self, match_length: int, n_drafted: int, n_accepted: int) -> None:
        """Learns how much of a prompt-lookup draft was accepted."""
        margin = _lookup_margin(match_length)
        for i in range(min(n_accepted + 1, n_drafted)):
            self._lookup(match_length).observe(margin, i < n_accepted)

    def learn_cycle(self, n_tokens: int, seconds: float) -> None:
        """Learns what a cycle of one sequence took in all."""
        self._answers.add(n_tokens)
        if self._probe is None:
            self._learn_frequency()
        else:
            self._budget_s -= max(0.0, seconds - n_tokens * self.token_value_s()) if self._probe else seconds
            self._probe = None
        self._tokens = self._tokens * DECAY + n_tokens
        self._seconds = self._seconds * DECAY + seconds
        self._budget_s += PROBE_SHARE * seconds

    def _learn_frequency(self) -> None:
        """Learns in which share of cycles each head is worth its time."""
        for head in range(len(self._frequency)):
            self._frequency[head] *= FREQUENCY_DECAY
            if head < self._n_worth:
                self._frequency[head] += 1 - FREQUENCY_DECAY


def _best(lines: Sequence[tuple[float, float]], chance: float) -> float:
    return max([chance * worth - cost for worth, cost in lines])


def _lookup_margin(match_length: int) -> float:
    """Before anything is known, four matching tokens promise as much as a toss of a coin, and each doubling more."""
    return math.log2(match_length / 4)
