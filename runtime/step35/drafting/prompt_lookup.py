"""Prompt lookup: a draft copied from where the last few tokens occurred before. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

KEY_LENGTH = 3
LONGEST_MATCH = 32


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens that followed an earlier occurrence, and how many tokens before it agree."""

    tokens: list[int]
    length: int


@dataclass(slots=True)
class NgramIndex:
    """Where each run of KEY_LENGTH tokens last occurred in one timeline."""

    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    _n_indexed: int = KEY_LENGTH

    def find(self, tokens: Sequence[int], n_max: int) -> Match | None:
        """Returns the continuation of the last earlier occurrence of the timeline's end."""
        self._index(tokens)
        end = self._ends.get(tuple(tokens[-KEY_LENGTH:]))
        if end is None or end >= len(tokens):
            return None
        length = _match_length(tokens, end)
        if length < KEY_LENGTH:
            return None
        return Match(list(tokens[end : end + n_max]), length)

    def _index(self, tokens: Sequence[int]) -> None:
        """Adds all keys but the timeline's own end. A rewind leaves stale keys: find() checks them."""
        start = min(self._n_indexed, len(tokens))
        for end in range(max(start, KEY_LENGTH), len(tokens)):
            self._ends[tuple(tokens[end - KEY_LENGTH : end])] = end
        self._n_indexed = len(tokens)


def _match_length(tokens: Sequence[int], end: int) -> int:
    n = 0
    while n < min(end, LONGEST_MATCH) and tokens[end - 1 - n] == tokens[len(tokens) - 1 - n]:
        n += 1
    return n
