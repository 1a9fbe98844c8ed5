"""What is loaded and how large: the options of an engine, a model and a context."""

from dataclasses import dataclass
from pathlib import Path

from step35.choices import DRAFTS, KV_TYPES, LOAD_MODES, Draft, check_choice
from step35.errors import SettingsError

MAX_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a GGUF is loaded."""

    path: Path
    load_heads: bool = False
    n_gpu_layers: int = -1
    load_mode: str = "auto"
    overrides: tuple[tuple[str, str], ...] = ()
    """(Pattern of tensor names, buffer type): tensors that don't lie where their layer does."""
    tensor_split: tuple[float, ...] = ()
    """Shares of the layers of several GPUs; () splits by free memory."""
    rpc: tuple[str, ...] = ()
    """HOST:PORT of rpc-servers, whose GPUs come first."""
    spreads_numa: bool = False
    """For the whole process, from the first such load on."""
    vocab_only: bool = False


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """The size of a context; its `n_seq` sequences share `n_ctx` cells."""

    n_ctx: int
    n_batch: int
    n_seq: int = 1
    n_outputs: int = 0
    """Rows of logits one decode may ask for; 0 = n_batch."""
    n_threads: int = 0
    """0 = as many as llama.cpp takes by itself, but no more than there are cores."""
    n_threads_batch: int = 0
    kv_type: str = "f16"
    flash_attention: bool | None = None
    """None lets llama.cpp choose."""
    offload_kqv: bool = True
    op_offload: bool = True


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What is loaded, and how large; all sessions share `n_ctx` tokens."""

    model: Path
    mtp: Path | None = None
    """A file with the MTP heads, when the model's own has none."""
    draft: str = "auto"
    n_ctx: int = 32768
    n_batch: int = 512
    n_sessions: int = 1
    n_checkpoints: int = 4
    """Copies of the sliding window's cells kept for each session."""
    n_threads: int = 0
    n_threads_batch: int = 0
    n_gpu_layers: int = -1
    load_mode: str = "auto"
    kv_type: str = "f16"
    flash_attention: bool | None = None
    offload_kqv: bool = True
    op_offload: bool = True
    overrides: tuple[tuple[str, str], ...] = ()
    tensor_split: tuple[float, ...] = ()
    rpc: tuple[str, ...] = ()
    spreads_numa: bool = False

    def __post_init__(self) -> None:
        _check_range("n_ctx", self.n_ctx, 8, 1 << 30)
        _check_range("n_batch", self.n_batch, 8, 1 << 16)
        _check_range("n_sessions", self.n_sessions, 1, min(MAX_SEQUENCES, self.n_batch))
        _check_range("n_checkpoints", self.n_checkpoints, 0, 1 << 10)
        _check_range("n_threads", self.n_threads, 0, 4096)
        _check_range("n_threads_batch", self.n_threads_batch, 0, 4096)
        check_choice("draft", self.draft, DRAFTS)
        check_choice("load_mode", self.load_mode, LOAD_MODES)
        check_choice("kv_type", self.kv_type, KV_TYPES)

    @property
    def drafting(self) -> Draft:
        """What `draft` names."""
        return DRAFTS[self.draft]

    @property
    def side_file(self) -> Path | None:
        """The file of its own that the heads are loaded from; None where none is."""
        return self.mtp if self.drafting.uses_heads else None

    def load(self, path: Path, *, with_heads: bool) -> ModelOptions:
        """Returns the options of loading one of the engine's files.

        The heads of a file of their own go where the trunk ends, whatever share of the trunk is on GPUs.
        """
        is_side = path == self.mtp
        return ModelOptions(
            path,
            with_heads,
            -1 if is_side and self.n_gpu_layers else self.n_gpu_layers,
            self.load_mode,
            self.overrides,
            _last_alone(self.tensor_split) if is_side else self.tensor_split,
            self.rpc,
            self.spreads_numa,
        )

    def context(self, *, n_batch: int | None = None, n_outputs: int = 0) -> ContextOptions:
        """Returns the options of one of the engine's contexts."""
        return ContextOptions(
            self.n_ctx,
            n_batch or self.n_batch,
            self.n_sessions,
            n_outputs,
            self.n_threads,
            self.n_threads_batch,
            self.kv_type,
            self.flash_attention,
            self.offload_kqv,
            self.op_offload,
        )


def _last_alone(shares: tuple[float, ...]) -> tuple[float, ...]:
    return (*(0.0,) * (len(shares) - 1), 1.0) if shares else ()


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SettingsError(f"bad option: {name} expected {low} to {high}, got {value}")
