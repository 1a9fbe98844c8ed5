"""What decodes cost on this machine: seconds by the number of tokens, and of each head's run. Pure."""

import math
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

N_SAMPLES = 15


@dataclass(slots=True)
class Costs:
    """Seconds per verify width (tokens in one decode) and per head run: medians of the last N_SAMPLES samples."""

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
        for known in sorted(self._medians, reverse=True):  # fewer tokens never cost more: this fixes a bad sample
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
