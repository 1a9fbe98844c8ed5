"""The header of one GGUF file, its metadata and tensors, read without llama.cpp; nothing in it is believed unchecked.

What llama.cpp's reader refuses (ggml/src/gguf.cpp) is refused here. The data is never read and may be a hole. Memory
and time are bounded by MAX_HEADER_BYTES, whatever the file's counts say.
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from step35.errors import ModelError

MAX_HEADER_BYTES = 128 * 2**20
"""All that is mapped of a file; a real model's header is a tenth of it."""
MAX_KEYS, MAX_TENSORS, MAX_ELEMENTS = 1 << 16, 100_000, 4_000_000
"""Of metadata keys, of tensors, and of the elements of one array."""
MAX_NAME_BYTES, MAX_DIMS, MAX_TENSOR_BYTES = 63, 4, 2**63 - 1
DEFAULT_ALIGNMENT = 32

_Name = TypeVar("_Name", bytes, str)
_Thing = TypeVar("_Thing")

U16, U32, _STRING, _ARRAY = 2, 4, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value and its GGUF type.

    `data` is a Python number, a text's bytes, an array of numbers, or None for an array of texts, which are skipped.
    """

    kind: int
    data: Any

    def __str__(self) -> str:
        if self.data is None:
            return "an array of texts"
        if isinstance(self.data, np.ndarray):
            return f"an array of {len(self.data)} {self.data.dtype}"
        return ascii(self.data[:32].decode(errors="replace")) if self.kind == _STRING else repr(self.data)


@dataclass(frozen=True, slots=True)
class Metadata:
    """A file's metadata. What is asked for is there in a type that fits, or ModelError says what is wrong."""

    path: Path
    values: dict[bytes, Value]

    def text(self, key: str, default: str = "") -> str:
        """Returns a text, or the default where there is none."""
        value = self.values.get(key.encode())
        return value.data.decode(errors="replace") if value is not None and value.kind == _STRING else default

    def number(
        self,
        key: str,
        default: int | None = None,
        *,
        low: int = 0,
        high: int = 2**32 - 1,
        kinds: Sequence[int] = (U16, U32),
    ) -> int:
        """Returns an unsigned integer of 16 or 32 bits; llama.cpp takes no other for what is counted."""
        value = self.values.get(key.encode())
        if value is None and default is not None:
            return default
        if value is None or value.kind not in kinds:
            raise self.fault(key, "an unsigned integer")
        if not low <= value.data <= high:
            raise self.fault(key, f"{low} to {high}")
        return value.data

    def each(self, key: str, n: int, default: float | None = None) -> list[Any]:
        """Returns n numbers, one a layer; a scalar stands for all of them."""
        value = self.values.get(key.encode())
        if value is None and default is not None:
            return [default] * n
        if value is None or value.kind == _STRING or value.data is None:
            raise self.fault(key, f"{n} numbers")
        values = value.data.tolist() if isinstance(value.data, np.ndarray) else [value.data] * n
        if len(values) < n:
            raise self.fault(key, f"{n} numbers")
        return values[:n]

    def counts(self, key: str, n: int) -> list[int]:
        """Returns n whole numbers from 0 on, one a layer; a scalar stands for all of them."""
        values = self.each(key, n)
        if not all(type(value) is int and value >= 0 for value in values):
            raise self.fault(key, f"{n} whole numbers from 0 on")
        return values

    def integers(self, key: str) -> np.ndarray:
        """Returns an array of int32."""
        value = self.values.get(key.encode())
        if value is None or not isinstance(value.data, np.ndarray) or value.data.dtype != np.int32:
            raise self.fault(key, "an array of int32")
        return value.data

    def fault(self, key: str, want: str) -> ModelError:
        """Returns the error that names a key, what was expected of it and what it is."""
        got = self.values.get(key.encode(), "nothing")
        return ModelError(f"bad metadata: {self.path} {key} expected {want}, got {got}; convert it again")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file; `shape` has the slowest dimension first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int
    """From the start of the data."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file's header. `digest` is the sha256 of its bytes, in hex."""

    metadata: Metadata
    tensors: tuple[StoredTensor, ...]
    digest: str


def read_gguf(path: Path) -> GgufFile:
    """Reads a file's header; raises ModelError on what isn't a whole GGUF file."""
    if not path.is_file():
        raise ModelError(f"no model file: {path} doesn't exist or isn't a file")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelError(f"not a GGUF file: {path} expected the magic b'GGUF', got {magic!r}")
            n_bytes = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), min(n_bytes, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data:
                return _parse(path, data, n_bytes)
    except OSError as error:
        raise ModelError(f"can't read the model: {path}: {error.strerror}") from error
    except (struct.error, ValueError, OverflowError) as error:
        raise ModelError(f"unreadable GGUF header: {path}: {error}; download or convert it again") from error


def _parse(path: Path, data: mmap.mmap, file_bytes: int) -> GgufFile:
    cursor = _Cursor(data, 4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ModelError(f"unknown GGUF version: {path} expected 2 or 3, got {version}; convert the model again")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    metadata = Metadata(path, dict(_distinct("metadata key", MAX_KEYS, n_keys, cursor.entry)))
    tensors = [t for _, t in _distinct("tensor", MAX_TENSORS, n_tensors, cursor.tensor)]
    _check_data(metadata, tensors, cursor.at, file_bytes)
    with memoryview(data) as view, view[: cursor.at] as header:
        return GgufFile(metadata, tuple(tensors), hashlib.sha256(header).hexdigest())


def _distinct(
    what: str, most: int, n: int, read: "Callable[[], tuple[_Name, _Thing]]"
) -> "Iterator[tuple[_Name, _Thing]]":
    """Yields n named things; raises ValueError if there are too many, or if one has no name or another's."""
    if n > most:
        raise ValueError(f"expected at most {most} {what}s, got {n}")
    seen: set[_Name] = set()
    for _ in range(n):
        name, thing = read()
        if name in seen or not name:
            raise ValueError(f"expected each {what} once and with a name, got {name[:64]!a}")
        seen.add(name)
        yield name, thing


def _check_data(metadata: Metadata, tensors: Sequence[StoredTensor], header_end: int, file_bytes: int) -> None:
    """Raises unless the tensors lie one after the other, and the file ends no earlier than the last."""
    alignment = metadata.number("general.alignment", DEFAULT_ALIGNMENT, low=1, kinds=(U32,))
    if alignment & (alignment - 1):
        raise metadata.fault("general.alignment", "a power of two")
    start, end = _padded(header_end, alignment), 0
    for tensor in tensors:
        if tensor.offset != end:
            raise ValueError(f"{tensor.name!a} expected to lie at byte {end} of the data, got {tensor.offset}")
        if start + end + tensor.n_bytes > file_bytes:
            raise ModelError(
                f"incomplete file: {metadata.path} expected at least {start + end + tensor.n_bytes} bytes, "
                f"got {file_bytes}; download it again"
            )
        end += _padded(tensor.n_bytes, alignment)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


@dataclass(slots=True)
class _Cursor:
    """A place in the header, moving forward; struct.error or ValueError at the file's end."""

    data: mmap.mmap
    at: int

    def number(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> bytes:
        start = self.at + 8
        self._move_to(start + self.number("Q"))
        return self.data[start : self.at]

    def entry(self) -> tuple[bytes, Value]:
        """Returns a metadata key with its value."""
        name, kind = self.text(), self.number("I")
        if kind == _ARRAY:
            return name, Value(kind, self._array(self.number("I"), self.number("Q")))
        return name, Value(kind, self.text() if kind == _STRING else self.number(_scalar(kind)))

    def _array(self, kind: int, n: int) -> np.ndarray | None:
        """Returns an array of numbers; the texts of a vocabulary are skipped."""
        if n > MAX_ELEMENTS:
            raise ValueError(f"expected at most {MAX_ELEMENTS} elements of an array, got {n}")
        if kind == _STRING:
            self._skip_texts(n)
            return None
        start, dtype = self.at, np.dtype(f"<{_scalar(kind)}")
        self._move_to(start + n * dtype.itemsize)
        return np.frombuffer(self.data[start : self.at], dtype)

    def _skip_texts(self, n: int) -> None:
        data, at, length = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(n):  # a vocabulary and its merges: a quarter of a million
            at += 8 + length(data, at)[0]
        self._move_to(at)

    def tensor(self) -> tuple[str, StoredTensor]:
        """Returns a tensor with its name."""
        name, n_dims = self.text(), self.number("I")
        if len(name) > MAX_NAME_BYTES:
            raise ValueError(f"a tensor's name expected at most {MAX_NAME_BYTES} bytes, got {len(name)}")
        if n_dims > MAX_DIMS:
            raise ValueError(f"{name!a} expected at most {MAX_DIMS} dimensions, got {n_dims}")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        kind, offset = GGMLQuantizationType(self.number("I")), self.number("Q")
        text = name.decode()
        return text, StoredTensor(text, kind.name, shape, _n_bytes(text, kind, shape), offset)

    def _move_to(self, at: int) -> None:
        if at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, {at - len(self.data)} bytes too early")
        self.at = at


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value's type expected one of GGUF's, got {kind}")
    return _SCALARS[kind]


def _n_bytes(name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    n_per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if (shape[-1] if shape else 1) % n_per_block:
        raise ValueError(f"{name!a} expected rows of whole blocks of {n_per_block}, got {shape}")
    n_weights = prod(shape)
    n_bytes = n_weights // n_per_block * block_bytes
    if max(n_weights, n_bytes, *shape, 0) > MAX_TENSOR_BYTES:
        raise ValueError(f"{name!a} expected at most {MAX_TENSOR_BYTES} bytes, got {shape}")
    return n_bytes
