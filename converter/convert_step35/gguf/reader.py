"""Reads the header of a GGUF file that may be damaged or hostile; tensor data is never touched.

What llama.cpp refuses is refused here too (ggml/src/gguf.cpp, gguf_init_from_reader), and each count, length and size
is checked against the bytes that are there before memory is spent on it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from convert_step35.errors import GgufError, quoted
from convert_step35.source.regular_file import is_lfs_pointer, open_regular, read_exactly

# Far beyond any real model: a vocabulary of 128 896 tokens with its merges takes 6 MB and 0.5 million array elements.
MAX_HEADER_BYTES = 256 * 2**20
MAX_KEYS = 65_536
MAX_ARRAY_ELEMENTS = 4_000_000
MAX_TENSORS = 100_000

MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63  # ggml.h: GGML_MAX_NAME less the closing zero
MAX_DIMS = 4
MIN_ALIGNMENT = 8
MAX_INT64 = 2**63 - 1

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DTYPES = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("<u1"),
}


# Q8_1 and Q8_K hold activations while llama.cpp computes; no file has them, and gguf 0.19.0 has the size of Q8_1 wrong.
_STORED_TYPES = GGML_QUANT_SIZES.keys() - {GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K}

# A value's type and, for an array, the type of its elements.
ValueType = tuple[GGUFValueType, GGUFValueType | None]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `shape` outermost first, `offset` from the start of the file."""

    name: str
    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says of itself.

    `n_bytes` is the file's size; bytes after the last tensor are allowed, as llama.cpp allows them.
    """

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any]
    value_types: dict[str, ValueType]
    tensors: dict[str, GgufTensor]
    data_offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """A tensor as its header entry has it: `offset` from the start of the data."""

    name: str
    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(slots=True)
class _Header:
    """A header read front to back, never past its file's end."""

    path: Path
    file: BinaryIO
    file_bytes: int
    position: int = 0
    n_array_elements: int = 0

    def take(self, n_bytes: int, what: str) -> bytes:
        end = self.position + n_bytes
        if end > self.file_bytes:
            raise self.damaged(
                f"expected {n_bytes} bytes of {what} at byte {self.position}, got {self.file_bytes - self.position}: "
                "the download is incomplete or the file damaged"
            )
        if end > MAX_HEADER_BYTES:
            raise self.damaged(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {what} up to byte {end}")
        self.position = end
        return read_exactly(self.file, n_bytes, self.path, error=GgufError)

    def integer(self, n_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(n_bytes, what), "little")

    def text(self, what: str) -> str:
        data = self.take(self.integer(8, what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self.damaged(f"expected {what} in UTF-8, got byte 0x{data[exc.start]:02x}") from exc

    def damaged(self, problem: str) -> GgufError:
        return GgufError(f"damaged GGUF file: {self.path} {problem}; download or convert it again")


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file, version 2 or 3, little endian."""
    file, file_bytes = open_regular(path, error=GgufError)
    with file:
        header = _Header(path, file, file_bytes)
        version = _version(header)
        n_tensors = _count(header, "tensors", MAX_TENSORS)
        n_keys = _count(header, "metadata keys", MAX_KEYS)
        metadata, value_types = _metadata(header, n_keys)
        alignment = _alignment(header, metadata, value_types)
        infos = _tensor_infos(header, n_tensors)
    # llama.cpp pads only when data follows.
    data_offset = _padded(header.position, alignment) if infos else header.position
    tensors = {tensor.name: tensor for tensor in _placed(header, infos, data_offset, alignment)}
    _check_end(header, tensors)
    return GgufFile(path, version, alignment, metadata, value_types, tensors, data_offset, file_bytes)


def _version(header: _Header) -> int:
    magic = header.take(min(4, header.file_bytes), "magic")
    if is_lfs_pointer(magic):
        raise GgufError(f"not a GGUF file: {header.path} is a Git LFS pointer; fetch the real file with git lfs pull")
    if magic != _MAGIC:
        raise GgufError(f"not a GGUF file: {header.path} expected to start with b'GGUF', got {magic!r}")
    version = header.integer(4, "version")
    if version and version & 0xFFFF == 0:
        raise GgufError(f"big-endian GGUF file: {header.path} expected little endian; take a little-endian file")
    if version not in _VERSIONS:
        raise GgufError(f"unknown GGUF version: {header.path} expected 2 or 3, got {version}; convert the model again")
    return version


def _count(header: _Header, what: str, most: int) -> int:
    count = header.integer(8, f"number of {what}")
    if count > most:
        raise header.damaged(f"expected at most {most} {what}, got {count}")
    return count


def _metadata(header: _Header, n_keys: int) -> tuple[dict[str, Any], dict[str, ValueType]]:
    metadata: dict[str, Any] = {}
    value_types: dict[str, ValueType] = {}
    for _ in range(n_keys):
        key = header.text("a metadata key")
        if not key or len(key.encode()) > MAX_KEY_BYTES or not key.isprintable():
            raise header.damaged(f"expected metadata keys of 1 to {MAX_KEY_BYTES} printable bytes, got {quoted(key)}")
        if key in metadata:
            raise header.damaged(f"expected each metadata key once, got {quoted(key)} twice")
        metadata[key], value_types[key] = _value(header, key)
    return metadata, value_types


def _value(header: _Header, key: str) -> tuple[Any, ValueType]:
    what = f"the value of {quoted(key)}"
    value_type = _value_type(header, what)
    if value_type is not GGUFValueType.ARRAY:
        return _elements(header, value_type, 1, what)[0], (value_type, None)
    element_type = _value_type(header, what)
    if element_type is GGUFValueType.ARRAY:
        raise header.damaged(f"expected {what} to be a flat array, got an array of arrays")
    return _elements(header, element_type, _array_length(header, what), what), (value_type, element_type)


def _value_type(header: _Header, what: str) -> GGUFValueType:
    number = header.integer(4, f"the type of {what}")
    try:
        return GGUFValueType(number)
    except ValueError as exc:
        raise header.damaged(f"expected a known type for {what}, got type {number}") from exc


def _array_length(header: _Header, what: str) -> int:
    length = header.integer(8, f"the length of {what}")
    header.n_array_elements += length
    if header.n_array_elements > MAX_ARRAY_ELEMENTS:
        raise header.damaged(f"expected at most {MAX_ARRAY_ELEMENTS} array elements in all, got {length} in {what}")
    return length


def _elements(header: _Header, element_type: GGUFValueType, length: int, what: str) -> list[Any]:
    if element_type is GGUFValueType.STRING:
        return [header.text(what) for _ in range(length)]
    dtype = _DTYPES[element_type]
    values = np.frombuffer(header.take(length * dtype.itemsize, what), dtype)
    if element_type is not GGUFValueType.BOOL:
        return values.tolist()
    if (values > 1).any():
        raise header.damaged(f"expected {what} to be 0 or 1, got {values.max()}")
    return values.astype(bool).tolist()


def _alignment(header: _Header, metadata: dict[str, Any], value_types: dict[str, ValueType]) -> int:
    key = "general.alignment"
    alignment = metadata.get(key, GGUF_DEFAULT_ALIGNMENT)
    if value_types.get(key, (GGUFValueType.UINT32, None)) != (GGUFValueType.UINT32, None):
        raise header.damaged(f"expected {key} to be a UINT32, got {value_types[key][0].name}")
    if alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
        raise header.damaged(f"expected {key} to be a power of two of at least {MIN_ALIGNMENT}, got {alignment}")
    return alignment


def _tensor_infos(header: _Header, n_tensors: int) -> list[_TensorInfo]:
    infos = [_tensor_info(header) for _ in range(n_tensors)]
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            raise header.damaged(f"expected each tensor once, got {quoted(info.name)} twice")
        seen.add(info.name)
    return infos


def _tensor_info(header: _Header) -> _TensorInfo:
    name = header.text("a tensor name")
    if not name or len(name.encode()) > MAX_NAME_BYTES or not name.isprintable():
        raise header.damaged(f"expected tensor names of 1 to {MAX_NAME_BYTES} printable bytes, got {quoted(name)}")
    n_dims = header.integer(4, f"the shape of {quoted(name)}")
    if n_dims > MAX_DIMS:
        raise header.damaged(f"expected at most {MAX_DIMS} dimensions for {quoted(name)}, got {n_dims}")
    shape = tuple(reversed([header.integer(8, f"the shape of {quoted(name)}") for _ in range(n_dims)]))
    ggml_type = _ggml_type(header, name)
    n_bytes = _tensor_bytes(header, name, ggml_type, shape)
    return _TensorInfo(name, ggml_type, shape, header.integer(8, f"the offset of {quoted(name)}"), n_bytes)


def _ggml_type(header: _Header, name: str) -> GGMLQuantizationType:
    number = header.integer(4, f"the type of {quoted(name)}")
    if number not in _STORED_TYPES:
        raise header.damaged(f"expected a known ggml type for {quoted(name)}, got type {number}")
    return GGMLQuantizationType(number)


def _tensor_bytes(header: _Header, name: str, ggml_type: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block_values, block_bytes = GGML_QUANT_SIZES[ggml_type]
    n_values = math.prod(shape)
    n_bytes = n_values // block_values * block_bytes
    if n_values < 1 or max(n_values, n_bytes) > MAX_INT64:
        raise header.damaged(f"expected 1 to 2^63 - 1 bytes for {quoted(name)}, got {ggml_type.name} {shape}")
    row_values = shape[-1] if shape else 1
    if row_values % block_values:
        raise header.damaged(
            f"expected rows of {quoted(name)} to be whole blocks of {block_values}, got {ggml_type.name} {shape}"
        )
    return n_bytes


def _placed(header: _Header, infos: list[_TensorInfo], data_offset: int, alignment: int) -> Iterator[GgufTensor]:
    """The tensors at their places in the file: one after the other in header order, each padded to the alignment."""
    expected = 0
    for info in infos:
        if info.offset != expected:
            raise header.damaged(_misplaced(info, expected, alignment))
        expected = _padded(info.offset + info.n_bytes, alignment)
        yield GgufTensor(info.name, info.ggml_type, info.shape, data_offset + info.offset, info.n_bytes)


def _misplaced(info: _TensorInfo, expected: int, alignment: int) -> str:
    problem = "leaves a gap" if info.offset > expected else "overlaps the tensor before"
    if info.offset % alignment:
        problem = f"is not a multiple of {alignment}"
    return f"expected {quoted(info.name)} at offset {expected}, got {info.offset}, which {problem}"


def _check_end(header: _Header, tensors: dict[str, GgufTensor]) -> None:
    end = max((tensor.offset + tensor.n_bytes for tensor in tensors.values()), default=0)
    if end > header.file_bytes:
        raise header.damaged(
            f"expected {end} bytes, got {header.file_bytes}: the download is incomplete, "
            f"{end - header.file_bytes} bytes missing"
        )


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
