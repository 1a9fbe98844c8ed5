"""A session: one mutable timeline of tokens, and how much of it is in the KV cache."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Self

from step35.engine.budget import Reservation
from step35.engine.checkpoints import CheckpointStore
from step35.engine.interface import EngineInterface
from step35.engine.prefix import Cached, SyncPlan, plan_sync
from step35.errors import ContextFull, DoesNotFit, NativeError, SettingsError
from step35.sizes import format_size


@dataclass(frozen=True, slots=True)
class Span:
    """Full-attention cells [start, end) of a timeline that others may share; equal keys are the same cells."""

    key: int
    start: int
    end: int


_keys = count()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Snapshot:
    """A timeline with all its cells and its checkpoints, as bytes of llama.cpp."""

    tokens: tuple[int, ...]
    n_past: int
    state: bytes
    checkpoints: Mapping[int, bytes] = field(default_factory=dict)


class Session:
    """A timeline: `tokens` are known, the first `n_past` of them are in the KV cache."""

    def __init__(self, engine: EngineInterface, seq: int) -> None:
        self.engine = engine
        self.seq = seq
        self.tokens: list[int] = []
        self.n_past = 0
        self.draft_state = engine.drafter.new_state()
        self.shared: tuple[Span, ...] = ()
        self._checkpoints = CheckpointStore(engine.budget)

    def close(self) -> None:
        """Gives the sequence back; a closed session stays closed."""
        if self.seq >= 0:
            self._truncate(0)
            self.engine.release(self.seq)
            self.seq = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # moving in the timeline

    def sync(self, prompt: Sequence[int]) -> SyncPlan:
        """Makes `prompt` the timeline and returns what of the cache it reuses; decodes nothing yet."""
        prompt = list(prompt)
        self._check_prompt(prompt)
        window_start = self.engine.trunk.window_start(self.seq)
        with self.engine.budget.lock:  # the watchdog may drop checkpoints
            plan = plan_sync(
                Cached(self.tokens[: self.n_past], window_start, self._checkpoints), prompt, self.engine.window
            )
            self._keep(plan)
        self.tokens = prompt
        return plan

    def n_reusable(self, prompt: Sequence[int]) -> int:
        """Returns how many tokens of a prompt `sync` would keep, and changes nothing."""
        window_start = self.engine.trunk.window_start(self.seq)
        cached = Cached(self.tokens[: self.n_past], window_start, self.checkpoints)
        return plan_sync(cached, prompt, self.engine.window).n_keep

    def forget_drafts(self) -> None:
        """Drops what drafting knows of the timeline: after a failed decode nobody knows how far the heads came."""
        self.engine.drafter.truncate(self.draft_state, 0)

    def rewind(self, n_tokens: int) -> SyncPlan:
        """Forgets the tokens from `n_tokens` on; what the ring lost is decoded again when needed."""
        if not 0 <= n_tokens <= len(self.tokens):
            raise SettingsError(f"bad rewind: expected 0 to {len(self.tokens)} tokens, got {n_tokens}")
        if n_tokens == 0:
            self._truncate(0)
            self.tokens = []
            return SyncPlan(0, False, 0)
        return self.sync(self.tokens[:n_tokens])

    def _keep(self, plan: SyncPlan) -> None:
        if plan.restore:
            self.engine.trunk.load_state(self.seq, self._checkpoints[plan.n_keep], window_only=True)
        self._truncate(plan.n_keep)

    def _truncate(self, n_keep: int) -> None:
        self.engine.trunk.truncate(self.seq, n_keep)
        self.engine.drafter.truncate(self.draft_state, n_keep)
        self._checkpoints.cut(n_keep)
        self.shared = _cut(self.shared, n_keep)
        self.n_past = n_keep

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise SettingsError("empty prompt: expected at least one token, got 0")
        if len(prompt) >= self.engine.n_ctx:
            raise ContextFull(
                f"prompt too long: the context holds {self.engine.n_ctx} tokens, got {len(prompt)} and none left to "
                "generate; load with a larger context or shorten the prompt"
            )
        n_vocab = self.engine.n_vocab
        if not 0 <= min(prompt) <= max(prompt) < n_vocab:
            raise SettingsError(f"bad token: expected ids 0 to {n_vocab - 1}, got {min(prompt)} to {max(prompt)}")

    # keeping the past

    def checkpoint(self) -> None:
        """Keeps a copy of the window's cells here, so that a later sync can come back.

        A full store loses the second oldest: the oldest one, after the system's text, serves new conversations.
        """
        limit = self.engine.options.n_checkpoints
        if not limit or not self.n_past or self.n_past in self._checkpoints:
            return
        while len(self._checkpoints) >= limit:
            self._checkpoints.drop(self.checkpoints[:2][-1])
        self._checkpoints.keep(self.n_past, self.engine.trunk.save_state(self.seq, window_only=True))

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of tokens at which a checkpoint is kept."""
        return tuple(self._checkpoints)

    # sharing a prefix

    def fork(self, source: "Session", n_tokens: int) -> None:
        """Becomes the first `n_tokens` of another session, where that has a checkpoint or its end.

        The full-attention cells are shared. The window's are copied: llama.cpp never takes a ring cell
        back that two sequences hold, and the ring would fill up.
        """
        window = source._window_at(n_tokens)
        self._truncate(0)
        self.tokens = []
        self.engine.trunk.copy(source.seq, self.seq, n_tokens)
        try:
            self.engine.trunk.load_state(self.seq, window, window_only=True)
        except NativeError:
            self._truncate(0)
            raise
        self.tokens, self.n_past = source.tokens[:n_tokens], n_tokens
        self.shared = source._share(n_tokens)
        self._checkpoints.keep(n_tokens, window)

    def _window_at(self, n_tokens: int) -> bytes:
        with self.engine.budget.lock:
            if n_tokens in self._checkpoints:
                return self._checkpoints[n_tokens]
        if n_tokens != self.n_past or not n_tokens:
            raise SettingsError(
                f"can't fork: expected one of {[*self.checkpoints, self.n_past]} tokens, got {n_tokens}"
            )
        return self.engine.trunk.save_state(self.seq, window_only=True)

    def _share(self, n_tokens: int) -> tuple[Span, ...]:
        """Marks the first `n_tokens` cells as shared and returns their spans."""
        n_shared = self.n_shared
        if n_tokens > n_shared:
            self.shared += (Span(next(_keys), n_shared, n_tokens),)
        return _cut(self.shared, n_tokens)

    @property
    def n_shared(self) -> int:
        """How many of the first cells other sessions may hold too."""
        return self.shared[-1].end if self.shared else 0

    # snapshots

    def snapshot(self) -> Snapshot:
        """Returns a copy of the timeline that `restore` brings back bit for bit.

        Its bytes count against the engine's budget while it exists; raises DoesNotFit if there is no room.
        """
        reservation = self._reserve_snapshot()
        state = self.engine.trunk.save_state(self.seq) if self.n_past else b""
        snapshot = Snapshot(tuple(self.tokens), self.n_past, state, self._checkpoints.states())
        weakref.finalize(snapshot, self.engine.budget.release, reservation).atexit = False
        return snapshot

    def _reserve_snapshot(self) -> Reservation:
        n_bytes = self.engine.trunk.state_bytes(self.seq) if self.n_past else 0
        reservation = self.engine.budget.reserve(n_bytes)
        if reservation is None:
            limit = format_size(self.engine.budget.limit or 0)
            raise DoesNotFit(
                f"no room for a snapshot: {self.n_past} tokens expected at most {limit} for all that is kept, "
                f"got {format_size(n_bytes)}; close a session, or load with a smaller context"
            )
        return reservation

    def restore(self, snapshot: Snapshot) -> None:
        """Replaces the timeline by a snapshot's, taken from a session of the same model."""
        self._truncate(0)
        self.tokens = []
        if snapshot.n_past:
            self.engine.trunk.load_state(self.seq, snapshot.state)
        self.tokens, self.n_past = list(snapshot.tokens), snapshot.n_past
        self._checkpoints.replace(snapshot.checkpoints)


def _cut(spans: tuple[Span, ...], n_keep: int) -> tuple[Span, ...]:
    return tuple(replace(span, end=min(span.end, n_keep)) for span in spans if span.start < n_keep)


def n_cells(sessions: Iterable[Session]) -> int:
    """Returns how many full-attention cells sessions hold together, shared ones counted once."""
    own, shared = 0, {}
    for session in sessions:
        if not session.shared:
            own += session.n_past
            continue
        own += session.n_past - session.n_shared
        for span in session.shared:
            shared[span.key] = max(shared.get(span.key, 0), span.end - span.start)
    return own + sum(shared.values())
