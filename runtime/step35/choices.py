"""What an option may be, and what each choice means: ways to draft, ways to load a file, types of the KV cache."""

from collections.abc import Collection
from dataclasses import dataclass

from step35.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Draft:
    """A way to draft."""

    name: str
    uses_heads: bool
    uses_lookup: bool
    """Whether drafts are looked up in the text, and what is drafted follows from measured costs."""
    depth: int | None = None
    """Heads that run in every round; None where costs decide, or where no head runs."""

    @classmethod
    def of(cls, name: str) -> "Draft":
        """Returns the way of this name; raises SettingsError if there is none."""
        check_choice("draft", name, DRAFTS)
        return DRAFTS[name]

    def n_heads(self, n_there: int) -> int:
        """Returns how many of a file's heads draft."""
        if not self.uses_heads:
            return 0
        return n_there if self.depth is None else min(self.depth, n_there)


_DRAFTS = (
    Draft("auto", uses_heads=True, uses_lookup=True),
    Draft("off", uses_heads=False, uses_lookup=False),
    *(Draft(str(depth), uses_heads=True, uses_lookup=False, depth=depth) for depth in (1, 2, 3)),
    Draft("ngram", uses_heads=False, uses_lookup=True),
)
DRAFTS = {draft.name: draft for draft in _DRAFTS}


@dataclass(frozen=True, slots=True)
class LoadMode:
    """A way to load a file's weights."""

    name: str
    native: str
    """The end of llama.cpp's name for it, LLAMA_LOAD_MODE_..."""
    is_planned: bool
    """Whether a plan may name it; the others leave the choice to llama.cpp, or to the user."""
    copies: bool
    """Whether the weights are read into memory of their own, always."""


_LOAD_MODES = (
    LoadMode("auto", "AUTO", is_planned=False, copies=False),
    LoadMode("none", "NONE", is_planned=True, copies=True),
    LoadMode("mmap", "MMAP", is_planned=True, copies=False),
    LoadMode("mlock", "MMAP_MLOCK", is_planned=False, copies=False),
    LoadMode("direct_io", "DIRECT_IO", is_planned=True, copies=True),
)
LOAD_MODES = {mode.name: mode for mode in _LOAD_MODES}
PLANNED_LOAD_MODES = tuple(mode.name for mode in _LOAD_MODES if mode.is_planned)


@dataclass(frozen=True, slots=True)
class KvType:
    """A type of the KV cache; `native` is its number in ggml."""

    name: str
    native: int
    n_bits: float
    """A value, the scales of its block included."""

    @property
    def is_quantized(self) -> bool:
        return self.n_bits < 16


_KV_TYPES = (
    KvType("f32", 0, 32.0),
    KvType("f16", 1, 16.0),
    KvType("bf16", 30, 16.0),
    KvType("q8_0", 8, 8.5),
    KvType("q4_0", 2, 4.5),
)
KV_TYPES = {kv_type.name: kv_type for kv_type in _KV_TYPES}


def check_choice(what: str, value: str, known: Collection[str]) -> None:
    """Raises SettingsError unless a value is one of those known."""
    if value not in known:
        raise SettingsError(f"bad option: {what} expected one of {', '.join(known)}, got {value!r}")
