"""Which session serves a prompt, and what of another one it can share. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from step35.engine.prefix import common_prefix

MIN_FORK = 32
"""A common prefix shorter than this is decoded anew: a copy of the window would cost more."""

MIN_WAIT = 256
"""A common prefix that another prefill is about to finish is worth waiting for if it saves this many tokens."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """A session as the choice sees it.

    `n_common` tokens agree with the prompt, of which `n_here` can be kept in place and `n_fork` be shared
    with another session. From `last_start` on, a prompt that parts from the timeline is an edit of it.
    """

    index: int
    n_tokens: int
    n_common: int = 0
    n_here: int = 0
    n_fork: int = 0
    n_coming: int = 0
    """Of a busy session: tokens that it will be able to share once its prefill got there."""
    last_start: int = 0
    is_busy: bool = False
    last_used_s: float = 0.0

    @property
    def is_continued(self) -> bool:
        """Whether the prompt goes on with this timeline, changes its last message only, or costs it next to nothing."""
        is_edit = 0 < self.last_start <= self.n_common
        return not self.is_busy and (is_edit or 0 < self.n_here > self.n_tokens - MIN_FORK)

    def is_long(self, n_short: int) -> bool:
        return self.n_tokens >= n_short


@dataclass(frozen=True, slots=True)
class Choice:
    """Serve in session `index`, after sharing the first `n_fork` tokens of session `source` if there is one."""

    index: int
    source: int | None = None
    n_fork: int = 0


def choose_slot(n_prompt: int, views: Sequence[SlotView], n_short: int, n_protected: int) -> Choice | None:
    """Returns where to serve a prompt; None asks it to wait for a running one.

    A prompt shorter than `n_short` is a side request: it takes the place of a long timeline only where there are more
    than `n_protected` of them, and then the one that was used longest ago. Long timelines leave one session to the
    short ones.
    """
    continued = [view for view in views if view.is_continued]
    if continued:
        return Choice(max(continued, key=lambda view: (view.n_common, view.n_here)).index)
    idle = [view for view in views if not view.is_busy]
    is_short = n_prompt < n_short
    target = _short_target(idle, views, n_short, n_protected) if is_short else _long_target(idle, views, n_short)
    if target is None:
        return None
    source = max(views, key=lambda view: view.n_fork)
    if max(view.n_coming for view in views) >= max(source.n_fork, target.n_here) + MIN_WAIT:
        return None
    if source.n_fork >= max(MIN_FORK, target.n_here + 1) and source.index != target.index:
        return Choice(target.index, source.index, source.n_fork)
    return Choice(target.index)


def _short_target(
    idle: Sequence[SlotView], views: Sequence[SlotView], n_short: int, n_protected: int
) -> SlotView | None:
    short = [view for view in idle if not view.is_long(n_short)]
    if short:
        return _least_useful(short)
    n_long = sum(view.is_long(n_short) for view in views)
    return _least_useful(idle) if n_long > n_protected else None


def _long_target(idle: Sequence[SlotView], views: Sequence[SlotView], n_short: int) -> SlotView | None:
    n_long = sum(view.is_long(n_short) for view in views)
    long = [view for view in idle if view.is_long(n_short)]
    short = [view for view in idle if not view.is_long(n_short)]
    leaves_one = n_long < max(len(views) - 1, 1)
    return _least_useful(short or long) if leaves_one else _least_useful(long or short)


def _least_useful(views: Sequence[SlotView]) -> SlotView | None:
    """Returns an empty session, else the one that was used longest ago."""
    return min(views, key=lambda view: (view.n_tokens > 0, view.last_used_s), default=None)


def eviction_order(views: Sequence[SlotView], n_short: int) -> list[SlotView]:
    """Returns the idle sessions with cells, in the order in which to empty them for room: short ones first."""
    idle = [view for view in views if not view.is_busy and view.n_tokens]
    return sorted(idle, key=lambda view: (view.is_long(n_short), view.last_used_s))


def why_broken(
    cached: Sequence[int], prompt: Sequence[int], text: Callable[[Sequence[int]], str], n_around: int = 12
) -> str:
    """Returns where two token lists part, with the text around on both sides."""
    n = common_prefix(cached, prompt)
    start = max(0, n - n_around)
    ours, theirs = (text(tokens[start : n + n_around]) for tokens in (cached, prompt))
    return f"prompt parts from the cache at token {n} of {len(cached)}: cached {ours!r}, asked {theirs!r}"
