"""A session: one mutable timeline of tokens, and how much of it is in the KV cache."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from step35.errors import ContextFull

if TYPE_CHECKING:
    from step35.engine import Engine


class Session:
    """A timeline: `tokens` are known, the first `n_kv` of them are in the KV cache."""

    def __init__(self, engine: "Engine", seq: int) -> None:
        self.engine = engine
        self.seq = seq
        self.tokens: list[int] = []
        self.n_kv = 0

    def close(self) -> None:
        self.engine.release(self.seq)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self, prompt: Sequence[int]) -> int:
        """Makes `prompt` the timeline; returns how many of its tokens the cache already held.

        At least the last token is always decoded again: its logits choose the next one.
        """
        self._check_room(len(prompt))
        self.engine.trunk.truncate(self.seq, 0)
        self.tokens, self.n_kv = list(prompt), 0
        return self.n_kv

    def _check_room(self, n_tokens: int) -> None:
        if n_tokens >= self.engine.n_ctx:
            raise ContextFull(
                f"prompt too long: the context holds {self.engine.n_ctx} tokens, got {n_tokens} and none left to "
                "generate; load with a larger context or shorten the prompt"
            )
