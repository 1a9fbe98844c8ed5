"""Encodes the header of a GGUF v3 file: metadata, tensor infos and the padding up to the data.

Layout: ggml's docs/gguf.md. All offsets are known from types and shapes, so the header is final before any data.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as V

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
_PACK = {
    V.UINT8: "<B", V.INT8: "<b", V.UINT16: "<H", V.INT16: "<h", V.UINT32: "<I", V.INT32: "<i",
    V.FLOAT32: "<f", V.UINT64: "<Q", V.INT64: "<q", V.FLOAT64: "<d", V.BOOL: "<?",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata key. For an array `value_type` is the type of its items and `value` a tuple."""

    key: str
    value_type: V
    value: Any

    @property
    def is_array(self) -> bool:
        return isinstance(self.value, tuple)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header: `shape` outermost first, `offset` in bytes from the start of the data."""

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    offset: int


def padded(n_bytes: int, alignment: int = ALIGNMENT) -> int:
    """`n_bytes` up to the next multiple of the alignment."""
    return -(-n_bytes // alignment) * alignment


def encode_header(entries: Sequence[Entry], tensors: Sequence[TensorInfo], alignment: int = ALIGNMENT) -> bytes:
    """All bytes before the tensor data, padding included; another alignment than 32 must stand in the entries too."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(entries))]
    parts += [_string(entry.key) + _typed(entry) for entry in entries]
    parts += [_tensor(tensor) for tensor in tensors]
    header = b"".join(parts)
    return header.ljust(padded(len(header), alignment), b"\0")


def _typed(entry: Entry) -> bytes:
    if entry.is_array:
        items = b"".join(_value(entry.value_type, item) for item in entry.value)
        return struct.pack("<IIQ", V.ARRAY, entry.value_type, len(entry.value)) + items
    return struct.pack("<I", entry.value_type) + _value(entry.value_type, entry.value)


def _value(kind: V, value: Any) -> bytes:
    return _string(value) if kind is V.STRING else struct.pack(_PACK[kind], value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _tensor(tensor: TensorInfo) -> bytes:
    n_dims = len(tensor.shape)
    return _string(tensor.name) + struct.pack(
        f"<I{n_dims}QIQ", n_dims, *reversed(tensor.shape), tensor.ggml_type, tensor.offset
    )
