"""llama.cpp's own dry run as an oracle: the bytes it would take, with nothing allocated.

`llama_get_memory_breakdown` returns a std::map by value; it is walked here in libstdc++'s layout, so
this works on Linux only. See src/llama-ext.h of llama.cpp 0c1e57098.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as C

from step35.native import library
from step35.native.context import Context
from step35.options import ContextOptions


class _Sizes(ctypes.Structure):
    _fields_ = [("model", ctypes.c_size_t), ("context", ctypes.c_size_t), ("compute", ctypes.c_size_t)]


class _Node(ctypes.Structure):
    """A std::map's node: colour, parent, left, right, then the pair of key and value."""


_Node._fields_ = [
    ("color", ctypes.c_size_t),
    ("parent", ctypes.POINTER(_Node)),
    ("left", ctypes.POINTER(_Node)),
    ("right", ctypes.POINTER(_Node)),
    ("key", ctypes.c_void_p),
    ("sizes", _Sizes),
]


class _Map(ctypes.Structure):
    _fields_ = [("compare", ctypes.c_size_t), ("color", ctypes.c_size_t), ("root", ctypes.POINTER(_Node))]
    _fields_ += [("first", ctypes.c_void_p), ("last", ctypes.c_void_p), ("n", ctypes.c_size_t)]


_breakdown = C._lib._Z26llama_get_memory_breakdownPK13llama_context
_breakdown.argtypes, _breakdown.restype = [ctypes.c_void_p, ctypes.c_void_p], None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes over all buffer types: weights, KV cells and compute buffers."""

    model: int
    context: int
    compute: int


class DryModel:
    """A model whose weights are never read. Closes itself as a context manager."""

    def __init__(self, path: Path, *, load_heads: bool) -> None:
        library.start_backend()
        params = C.llama_model_default_params()
        params.no_alloc, params.load_mode, params.load_mtp = True, C.LLAMA_LOAD_MODE_NONE, load_heads
        handle = C.llama_model_load_from_file(str(path).encode(), params)
        assert handle, f"llama.cpp refuses {path}"
        self._handle = handle

    def __enter__(self) -> "DryModel":
        return self

    def __exit__(self, *_: object) -> None:
        C.llama_model_free(self._handle)

    def context(self, options: ContextOptions, *, head: int | None = None) -> Sizes:
        """Returns what a context takes, opened exactly as the engine opens it."""
        ctx = Context._open(self._handle, options, head)
        try:
            return sizes_of(ctx)
        finally:
            C.llama_free(ctx)


def sizes_of(ctx: object) -> Sizes:
    """Returns what an open context takes, dry or real."""
    result = _Map()
    # a large class comes back through a hidden first argument
    _breakdown(ctypes.addressof(result), ctx)
    nodes = list(_walk(result.root))
    return Sizes(*(sum(getattr(node.sizes, name) for node in nodes) for name in ("model", "context", "compute")))


def _walk(pointer: "ctypes._Pointer[_Node]"):
    if pointer:
        node = pointer.contents
        yield from _walk(node.left)
        yield node
        yield from _walk(node.right)
