"""What the rest of the runtime needs of llama.cpp; tests put a fake in its place."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from step35.native.rows import Rows
from step35.options import ContextOptions

OnExperts = Callable[[int, np.ndarray], None]
"""Takes a layer and its experts (n_rows, n_expert_used), int32, of one decode."""


class GrammarInterface(Protocol):
    """A grammar's state, as in native.grammar.Grammar: which tokens may come next."""

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Returns which of the token ids (bool, same length) may come next."""
        ...

    def accept(self, token: int) -> None:
        """Moves on past a chosen token, which must be allowed."""
        ...

    def close(self) -> None: ...


class ContextInterface(Protocol):
    """KV cells and a compute graph over the trunk, or over one MTP head, as context.Context."""

    n_batch: int
    returns_all_rows: bool

    @property
    def handle(self) -> object: ...

    def close(self) -> None: ...

    def extract_hidden(self, on: bool) -> None: ...

    def cancel(self) -> None: ...

    def clear_cancel(self) -> None: ...

    def decode(self, rows: Sequence[Rows]) -> None: ...

    def logits(self) -> np.ndarray: ...

    def hidden(self) -> np.ndarray: ...

    def truncate(self, seq: int, n_keep: int) -> None: ...

    def copy(self, source: int, target: int, n_keep: int) -> None: ...

    def window_start(self, seq: int) -> int: ...

    def state_bytes(self, seq: int) -> int: ...

    def save_state(self, seq: int, *, window_only: bool = False) -> bytes: ...

    def load_state(self, seq: int, state: bytes, *, window_only: bool = False) -> None: ...


class ModelInterface(Protocol):
    """A loaded file: weights and vocabulary; each member as in native.model.Model."""

    n_vocab: int
    n_embd: int
    n_swa: int
    n_ctx_train: int
    bos: int
    eos: int
    add_bos: bool

    @property
    def handle(self) -> object: ...

    @property
    def turn_start(self) -> int | None: ...

    @property
    def newline(self) -> int: ...

    @property
    def vocab_digest(self) -> str: ...

    @property
    def chat_template(self) -> str | None: ...

    def close(self) -> None: ...

    def open_trunk(self, options: ContextOptions, *, on_experts: OnExperts | None = None) -> ContextInterface: ...

    def open_head(self, head: int, options: ContextOptions) -> ContextInterface: ...

    def tokenize(self, text: bytes, *, add_bos: bool, parse_special: bool) -> list[int]: ...

    def text(self, token: int) -> str: ...

    def piece(self, token: int, *, special: bool = False) -> bytes: ...

    def is_eog(self, token: int) -> bool: ...

    def open_grammar(self, gbnf: str) -> GrammarInterface: ...

    def all_metadata(self) -> dict[str, str]: ...
