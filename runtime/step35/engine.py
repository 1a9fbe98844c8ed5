"""The engine: a loaded model with its open contexts. Sessions live in it as sequences."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from step35.errors import ContextFull, SettingsError

if TYPE_CHECKING:
    from step35.native import Model, ModelOptions
    from step35.session import Session

MAX_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What is loaded, and how large; `n_ctx` tokens are shared by all sessions."""

    model: Path
    n_ctx: int = 32768
    n_batch: int = 512
    n_sessions: int = 1
    n_threads: int = 0
    n_gpu_layers: int = -1
    load_mode: str = "auto"
    kv_type: str = "f16"

    def __post_init__(self) -> None:
        _check("n_batch", self.n_batch, 8, 1 << 16)
        _check("n_sessions", self.n_sessions, 1, MAX_SEQUENCES)
        _check("n_threads", self.n_threads, 0, 4096)
        _check("n_ctx", self.n_ctx, 8, 1 << 30)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SettingsError(f"bad engine option: {name} expected {low} to {high}, got {value}")


def _load(options: "ModelOptions") -> "Model":
    from step35.native import Model

    return Model(options)


class Engine:
    """A loaded model. `load_model` is the seam where tests put a fake llama.cpp."""

    def __init__(self, options: EngineOptions, *, load_model: Callable[["ModelOptions"], "Model"] = _load) -> None:
        from step35.native import ContextOptions, ModelOptions

        self.options = options
        self.model = load_model(
            ModelOptions(options.model, n_gpu_layers=options.n_gpu_layers, load_mode=options.load_mode)
        )
        self.n_ctx = _context_size(options, self.model)
        self.trunk = self.model.open_trunk(
            ContextOptions(
                self.n_ctx, options.n_batch, options.n_sessions, n_threads=options.n_threads, kv_type=options.kv_type
            )
        )
        self._free_sequences = list(range(options.n_sessions))[::-1]

    def close(self) -> None:
        self.trunk.close()
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_session(self) -> "Session":
        """Returns a new empty session; close it to give its sequence back."""
        from step35.session import Session

        if not self._free_sequences:
            raise ContextFull(
                f"no free session: all {self.options.n_sessions} are open; close one or load with more sessions"
            )
        return Session(self, self._free_sequences.pop())

    def release(self, seq: int) -> None:
        """Forgets a closed session's cells."""
        self.trunk.truncate(seq, 0)
        self._free_sequences.append(seq)

    def tokenize(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Returns token ids; `add_bos` None follows the model's own setting."""
        add_bos = self.model.add_bos if add_bos is None else add_bos
        return self.model.tokenize(text.encode(), add_bos=add_bos, parse_special=parse_special)


def _context_size(options: EngineOptions, model: "Model") -> int:
    if options.n_ctx > model.n_ctx_train:
        raise SettingsError(
            f"context too long: n_ctx expected at most {model.n_ctx_train} (the model's), got {options.n_ctx}"
        )
    return options.n_ctx
