"""How often drafted tokens are accepted, learned from the margin of their choice. Pure."""

import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import mul

MARGIN_EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
N_BINS = len(MARGIN_EDGES) + 1
PRIOR_WEIGHT = 4.0
"""Observations that the prior counts as."""
DECAY = 0.98
"""Of older observations, with each new one."""

_MIDDLES = [(a + b) / 2 for a, b in zip((0.0, *MARGIN_EDGES), (*MARGIN_EDGES, 8.0), strict=False)]
_PRIORS = [1 / (1 + math.exp(-middle)) for middle in _MIDDLES]


@dataclass(frozen=True, slots=True)
class Drafted:
    """A proposed token with the margin of its choice: the distance of the two best (noised) scores."""

    token: int
    margin: float


@dataclass(slots=True)
class Acceptance:
    """The acceptance rate of drafts by their margin; recent outcomes count more.

    Before anything is known, the rate is the margin's logistic: the softmax over the two best scores alone. It is then
    the mean of a Beta posterior whose prior counts as PRIOR_WEIGHT outcomes.
    """

    _n: list[float] = field(default_factory=lambda: [0.0] * N_BINS)
    _hits: list[float] = field(default_factory=lambda: [0.0] * N_BINS)
    _seen: list[float] = field(default_factory=lambda: [1.0] * N_BINS)
    _rates: list[float] = field(default_factory=lambda: list(_PRIORS))
    _mean: float | None = None

    def rate(self, margin: float) -> float:
        """Returns the probability that a draft with this margin is accepted."""
        return self._rates[bisect(MARGIN_EDGES, margin)]

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
        self._rates[i] = (self._hits[i] + PRIOR_WEIGHT * _PRIORS[i]) / (self._n[i] + PRIOR_WEIGHT)
        self._mean = None

    def mean_rate(self) -> float:
        """Returns the acceptance rate over the usual margins."""
        if self._mean is None:
            self._mean = self.expectation(lambda rate: rate)
        return self._mean

    def expectation(self, gain_s: Callable[[float], float]) -> float:
        """Returns the mean over the usual margins of a function of the rate."""
        return sum(map(mul, self._seen, map(gain_s, self._rates))) / sum(self._seen)
