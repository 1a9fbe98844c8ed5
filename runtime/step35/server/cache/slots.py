"""Which sequence serves a prompt, and what of another one it can share. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from step35.engine.prefix import common_prefix

LEAST_FORK = 32
"""A common prefix shorter than this is decoded anew: a copy of the window would cost more."""

LEAST_WAIT = 256
"""A common prefix that another prefill is about to finish is worth waiting for if it saves this many tokens."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A sequence as the choice sees it.

    `n_common` tokens agree with the prompt, of which `n_here` can be kept in place and `n_fork` be shared
    with another sequence. From `last_start` on, a prompt that parts from the timeline is an edit of it.
    """

    index: int
    n_tokens: int
    n_common: int = 0
    n_here: int = 0
    n_fork: int = 0
    n_coming: int = 0
    """Of a busy slot: tokens that it will be able to share once its prefill got there."""
    last_start: int = 0
    is_busy: bool = False
    last_used: float = 0.0

    @property
    def is_continued(self) -> bool:
        """Whether the prompt goes on with this timeline, changes its last message only, or costs it next to nothing."""
        is_edit = 0 < self.last_start <= self.n_common
        return not self.is_busy and (is_edit or 0 < self.n_here > self.n_tokens - LEAST_FORK)

    def is_long(self, n_short: int) -> bool:
        return self.n_tokens >= n_short


@dataclass(frozen=True, slots=True)
class Choice:
    """Serve in slot `index`, after sharing the first `n_fork` tokens of slot `source` if there is one."""

    index: int
    source: int | None = None
    n_fork: int = 0


def choose_slot(n_prompt: int, slots: Sequence[Slot], n_short: int, n_kept: int) -> Choice | None:
    """Returns where to serve a prompt; None asks it to wait for a running one.

    A prompt shorter than `n_short` is a side request: it takes the place of a long timeline only where there are more
    than `n_kept` of them, and then the one that was used longest ago. Long timelines leave one place to the short ones.
    """
    continued = [slot for slot in slots if slot.is_continued]
    if continued:
        return Choice(max(continued, key=lambda slot: (slot.n_common, slot.n_here)).index)
    idle = [slot for slot in slots if not slot.is_busy]
    is_short = n_prompt < n_short
    target = _short_target(idle, slots, n_short, n_kept) if is_short else _long_target(idle, slots, n_short)
    if target is None:
        return None
    source = max(slots, key=lambda slot: slot.n_fork)
    if max(slot.n_coming for slot in slots) >= max(source.n_fork, target.n_here) + LEAST_WAIT:
        return None
    if source.n_fork >= max(LEAST_FORK, target.n_here + 1) and source.index != target.index:
        return Choice(target.index, source.index, source.n_fork)
    return Choice(target.index)


def _short_target(idle: Sequence[Slot], slots: Sequence[Slot], n_short: int, n_kept: int) -> Slot | None:
    short = [slot for slot in idle if not slot.is_long(n_short)]
    if short:
        return _least_useful(short)
    n_long = sum(slot.is_long(n_short) for slot in slots)
    return _least_useful(idle) if n_long > n_kept else None


def _long_target(idle: Sequence[Slot], slots: Sequence[Slot], n_short: int) -> Slot | None:
    n_long = sum(slot.is_long(n_short) for slot in slots)
    long = [slot for slot in idle if slot.is_long(n_short)]
    short = [slot for slot in idle if not slot.is_long(n_short)]
    leaves_one = n_long < max(len(slots) - 1, 1)
    return _least_useful(short or long) if leaves_one else _least_useful(long or short)


def _least_useful(slots: Sequence[Slot]) -> Slot | None:
    """Returns an empty slot, else the one that was used longest ago."""
    return min(slots, key=lambda slot: (slot.n_tokens > 0, slot.last_used), default=None)


def eviction_order(slots: Sequence[Slot], n_short: int) -> list[Slot]:
    """Returns the idle slots that hold cells, in the order in which to empty them for room: short ones first."""
    held = [slot for slot in slots if not slot.is_busy and slot.n_tokens]
    return sorted(held, key=lambda slot: (slot.is_long(n_short), slot.last_used))


def why_broken(
    cached: Sequence[int], prompt: Sequence[int], text: Callable[[Sequence[int]], str], n_around: int = 12
) -> str:
    """Returns where two token lists part, with the text around on both sides."""
    n = common_prefix(cached, prompt)
    start = max(0, n - n_around)
    ours, theirs = (text(tokens[start : n + n_around]) for tokens in (cached, prompt))
    return f"prompt parts from the cache at token {n} of {len(cached)}: cached {ours!r}, asked {theirs!r}"
