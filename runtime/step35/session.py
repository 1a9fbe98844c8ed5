"""A session: one mutable timeline of tokens, and how much of it is in the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from step35.errors import ContextFull, SettingsError
from step35.sync import Cached, SyncPlan, plan_sync

if TYPE_CHECKING:
    from step35.engine import Engine


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A timeline with all its cells, as bytes of llama.cpp."""

    tokens: tuple[int, ...]
    n_kv: int
    state: bytes


class Session:
    """A timeline: `tokens` are known, the first `n_kv` of them are in the KV cache."""

    def __init__(self, engine: "Engine", seq: int) -> None:
        self.engine = engine
        self.seq = seq
        self.tokens: list[int] = []
        self.n_kv = 0
        self.memory = engine.drafter.new_memory()
        self._checkpoints: dict[int, bytes] = {}

    def close(self) -> None:
        """Gives the sequence back; a closed session stays closed."""
        if self.seq >= 0:
            self._truncate(0)
            self.engine.release(self)
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
        held_from = self.engine.trunk.held_from(self.seq)
        plan = plan_sync(Cached(self.tokens[: self.n_kv], held_from, self._checkpoints), prompt, self.engine.window)
        self._keep(plan)
        self.tokens = prompt
        return plan

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
        self.engine.drafter.truncate(self.seq, self.memory, n_keep)
        self._checkpoints = {n: state for n, state in self._checkpoints.items() if n <= n_keep}
        self.n_kv = n_keep

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise SettingsError("empty prompt: expected at least one token, got 0")
        if len(prompt) >= self.engine.n_ctx:
            raise ContextFull(
                f"prompt too long: the context holds {self.engine.n_ctx} tokens, got {len(prompt)} and none left to "
                "generate; load with a larger context or shorten the prompt"
            )
        n_vocab = self.engine.model.n_vocab
        if not 0 <= min(prompt) <= max(prompt) < n_vocab:
            raise SettingsError(f"bad token: expected ids 0 to {n_vocab - 1}, got {min(prompt)} to {max(prompt)}")

    # keeping the past

    def checkpoint(self) -> None:
        """Keeps a copy of the window's cells here, so that a later sync can come back; drops the oldest."""
        limit = self.engine.options.n_checkpoints
        if not limit or not self.n_kv or self.n_kv in self._checkpoints:
            return
        while len(self._checkpoints) >= limit:
            del self._checkpoints[min(self._checkpoints)]
        self._checkpoints[self.n_kv] = self.engine.trunk.save_state(self.seq, window_only=True)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of tokens at which a checkpoint is kept."""
        return tuple(sorted(self._checkpoints))

    def snapshot(self) -> Snapshot:
        """Returns a copy of the timeline that `restore` brings back bit for bit."""
        return Snapshot(tuple(self.tokens), self.n_kv, self.engine.trunk.save_state(self.seq) if self.n_kv else b"")

    def restore(self, snapshot: Snapshot) -> None:
        """Replaces the timeline by a snapshot's, taken from a session of the same model."""
        self._truncate(0)
        self.tokens = []
        if snapshot.n_kv:
            self.engine.trunk.load_state(self.seq, snapshot.state)
        self.tokens, self.n_kv = list(snapshot.tokens), snapshot.n_kv
