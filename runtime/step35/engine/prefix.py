"""Planning a session's sync: how much of the cached timeline a new prompt can reuse. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """Keep the first `n_keep` tokens' cells; first put the window's cells back if `restore` is set.

    `n_common` is the length of the common prefix, for telling why less was reused.
    """

    n_keep: int
    restore: bool
    n_common: int


@dataclass(frozen=True, slots=True)
class Cached:
    """A cached timeline: its tokens, the first position still in the ring, and the checkpoints."""

    tokens: Sequence[int]
    window_start: int
    checkpoints: Iterable[int]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many leading tokens are equal."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # comparing slices is far faster than a loop over a long prompt
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def plan_sync(cached: Cached, prompt: Sequence[int], window: int) -> SyncPlan:
    """Returns what to keep so that no decoded token attends to a lost sliding-window cell.

    The token at position p sees positions p - window + 1 to p. After a rewind to n tokens the next
    position is n, so the ring must still hold n - window + 1 and later; otherwise the nearest
    checkpoint before n is put back, or everything is decoded again. The last token of the prompt is
    never reused: its logits choose the next one.
    """
    n_common = common_prefix(cached.tokens, prompt)
    n_keep = min(n_common, len(prompt) - 1)
    if n_keep == len(cached.tokens) or cached.window_start <= max(0, n_keep - window + 1):
        return SyncPlan(n_keep, False, n_common)
    nearest = max((n for n in cached.checkpoints if n <= n_keep), default=0)
    return SyncPlan(nearest, nearest > 0, n_common)
