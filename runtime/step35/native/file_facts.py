"""What a GGUF's header says, read through libllama."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from step35.errors import ModelError
from step35.native import draft_vocabulary
from step35.native.draft_vocabulary import DraftVocabulary
from step35.native.library import bind, reason

ARCHITECTURE = "step35"


class _GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_gguf_open = bind("gguf_init_from_file", "", [ctypes.c_char_p, _GgufParams], ctypes.c_void_p)
_gguf_free = bind("gguf_free", "", [ctypes.c_void_p], None)
_gguf_find_key = bind("gguf_find_key", "", [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int64)
_gguf_find_tensor = bind("gguf_find_tensor", "", [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int64)
_gguf_kv_type = bind("gguf_get_kv_type", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int)
_gguf_u16 = bind("gguf_get_val_u16", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint16)
_gguf_u32 = bind("gguf_get_val_u32", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint32)
_gguf_str = bind("gguf_get_val_str", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_char_p)
_gguf_array_type = bind("gguf_get_arr_type", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int)
_gguf_array_length = bind("gguf_get_arr_n", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_size_t)
_gguf_array_data = bind("gguf_get_arr_data", "", [ctypes.c_void_p, ctypes.c_int64], ctypes.c_void_p)
_GGUF_U16, _GGUF_U32, _GGUF_I32, _GGUF_STRING, _GGUF_ARRAY = 2, 4, 5, 8, 9


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a GGUF's header says, before any weight is read."""

    path: Path
    n_trunk_layers: int
    n_ctx_train: int
    has_trunk: bool
    n_declared_heads: int
    n_heads: int
    """MTP heads whose tensors are in the file: all declared ones or none."""
    draft_vocabulary: DraftVocabulary | None = None
    """Of trimmed heads."""


def read_facts(path: Path) -> FileFacts:
    """Reads a GGUF's header; raises ModelError unless it is a Step-3.5 trunk, its MTP heads, or both."""
    _check_file(path)
    with _open_gguf(path) as gguf:
        architecture = _text(gguf, "general.architecture")
        is_trimmed = architecture == draft_vocabulary.ARCHITECTURE
        if architecture != ARCHITECTURE and not is_trimmed:
            raise ModelError(
                f"not a Step-3.5 model: {path} expected general.architecture={ARCHITECTURE}, "
                f"got {architecture!r}; convert a checkpoint with convert-step35"
            )
        n_layers = _number(gguf, f"{ARCHITECTURE}.block_count")
        n_heads = _number(gguf, f"{ARCHITECTURE}.nextn_predict_layers", 0)
        n_ctx = _number(gguf, f"{ARCHITECTURE}.context_length")
        shards = _shards(path, _number(gguf, "split.count", 1))
        vocabulary = _draft_vocabulary(path, gguf) if is_trimmed else None
    n_found, has_trunk = _find_blocks(path, n_layers - n_heads, n_heads, shards)
    return FileFacts(path, n_layers - n_heads, n_ctx, has_trunk, n_heads, n_found, vocabulary)


def _draft_vocabulary(path: Path, gguf: int) -> DraftVocabulary:
    tokens, stand_ins = (_integers(gguf, f"{ARCHITECTURE}.draft.{name}") for name in ("tokens", "stand_ins"))
    return draft_vocabulary.checked(path, tokens, stand_ins, _text(gguf, f"{ARCHITECTURE}.draft.vocab_sha256"))


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no model file: {path} doesn't exist or isn't a file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"not a GGUF file: {path} expected the magic b'GGUF', got {magic!r}")


def _find_blocks(path: Path, n_trunk: int, n_heads: int, shards: list[Path]) -> tuple[int, bool]:
    """Returns how many MTP heads have tensors, and whether the trunk has."""
    wanted = [b"blk.0.attn_norm.weight"]
    wanted += [b"blk.%d.nextn.eh_proj.weight" % (n_trunk + head) for head in range(n_heads)]
    found: set[bytes] = set()
    for shard in shards:
        with _open_gguf(shard) as gguf:
            found.update(name for name in wanted if _gguf_find_tensor(gguf, name) >= 0)
    n_found = len(found & set(wanted[1:]))
    if n_found not in (0, n_heads):
        raise ModelError(
            f"incomplete MTP heads: {path} expected {n_heads} (nextn_predict_layers), got {n_found}; "
            "convert the checkpoint again, or make a side file with convert-step35 run --mtp only"
        )
    return n_found, wanted[0] in found


def _shards(path: Path, n_shards: int) -> list[Path]:
    if n_shards <= 1:
        return [path]
    stem, _, _ = path.name.rpartition("-00001-of-")
    if not stem:
        raise ModelError(f"not the first shard: {path} expected a name with -00001-of-{n_shards:05}; open that one")
    return [path.with_name(f"{stem}-{i:05}-of-{n_shards:05}.gguf") for i in range(1, n_shards + 1)]


@contextmanager
def _open_gguf(path: Path) -> Iterator[int]:
    _check_file(path)
    gguf = _gguf_open(os.fsencode(path), _GgufParams(True, None))
    if not gguf:
        raise ModelError(f"unreadable GGUF header: {path}: {reason()}; download or convert it again")
    try:
        yield gguf
    finally:
        _gguf_free(gguf)


def _number(gguf: int, key: str, default: int | None = None) -> int:
    index = _gguf_find_key(gguf, key.encode())
    if index < 0 and default is not None:
        return default
    kind = _gguf_kv_type(gguf, index) if index >= 0 else None
    if kind == _GGUF_U32:
        return _gguf_u32(gguf, index)
    if kind == _GGUF_U16:
        return _gguf_u16(gguf, index)
    raise ModelError(
        f"bad metadata: {key} expected an unsigned integer, got {'nothing' if kind is None else f'type {kind}'}"
    )


def _integers(gguf: int, key: str) -> np.ndarray:
    index = _gguf_find_key(gguf, key.encode())
    if index < 0 or _gguf_kv_type(gguf, index) != _GGUF_ARRAY or _gguf_array_type(gguf, index) != _GGUF_I32:
        raise ModelError(f"bad metadata: {key} expected an array of int32, got nothing or another type")
    n, address = _gguf_array_length(gguf, index), _gguf_array_data(gguf, index)
    return np.array((ctypes.c_int32 * n).from_address(address), np.int32) if n else np.zeros(0, np.int32)


def _text(gguf: int, key: str) -> str:
    index = _gguf_find_key(gguf, key.encode())
    if index < 0 or _gguf_kv_type(gguf, index) != _GGUF_STRING:
        return ""
    return _gguf_str(gguf, index).decode(errors="replace")
