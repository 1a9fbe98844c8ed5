"""Reads the headers of a safetensors checkpoint and checks every statement in them.

The rules are those of the reference library, and tighter where it leaves room: every byte of the data belongs to
exactly one tensor, no tensor is empty, names are printable, and a shard lies in its own folder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from convert_step35.errors import CheckpointError, quoted
from convert_step35.source.regular_file import is_lfs_pointer, open_regular, read_exactly
from convert_step35.source.strict_json import parse_json, read_json

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_TENSORS = 100_000
MAX_NAME_CHARS = 512
MAX_DIMS = 8
MAX_TENSOR_BITS = 2**63 - 1

# https://github.com/huggingface/safetensors/blob/v0.8.0/safetensors/src/tensor.rs, Dtype::bitsize
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_LENGTH_BYTES = 8
_INCOMPLETE = "the download is incomplete"
_DOWNLOAD = "download the file again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies; `offset` counts from the start of the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one safetensors file in the order of their data, from its header alone."""
    file, file_bytes = open_regular(path)
    with file:
        header_bytes = _header_length(read_exactly(file, min(_LENGTH_BYTES, file_bytes), path), file_bytes, path)
        header = _parse(read_exactly(file, header_bytes, path), path)
    data_offset = _LENGTH_BYTES + header_bytes
    tensors = [_tensor(name, entry, path, data_offset) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    _check_layout(tensors, data_offset, file_bytes, path)
    return tuple(tensors)


def _header_length(prefix: bytes, file_bytes: int, path: Path) -> int:
    if is_lfs_pointer(prefix):
        raise CheckpointError(f"not a safetensors file: {path} is a Git LFS pointer; fetch the file with git lfs pull")
    if len(prefix) < _LENGTH_BYTES:
        raise _damaged(path, f"expected at least {_LENGTH_BYTES} bytes, got {file_bytes}")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _damaged(path, f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {header_bytes}")
    got_bytes = file_bytes - _LENGTH_BYTES
    if header_bytes > got_bytes:
        raise _damaged(path, f"expected a header of {header_bytes} bytes, got {got_bytes}: {_INCOMPLETE}")
    return header_bytes


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    """The header's tensor entries by name; only spaces may pad it, and only at its end."""
    if data[:1] != b"{":
        raise _damaged(path, f"expected a header that starts with '{{', got {quoted(data[:1].decode('latin-1'))}")
    if not data.rstrip(b" ").endswith(b"}"):
        raise _damaged(path, "expected a header that ends with '}' and spaces, got other bytes")
    header = parse_json(data, f"header of {path}", max_bytes=MAX_HEADER_BYTES, max_depth=8)
    _check_metadata(header.pop("__metadata__", {}), path)
    if len(header) > MAX_TENSORS:
        raise _damaged(path, f"expected at most {MAX_TENSORS} tensors, got {len(header)}")
    return header


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "expected __metadata__ to map text to text, got other values")


def _tensor(name: str, entry: Any, path: Path, data_offset: int) -> StoredTensor:
    _check_name(name, path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"expected dtype, shape and data_offsets, got {quoted(entry)}", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"expected a known dtype, got {quoted(dtype)}", name)
    if not _is_sizes(shape) or len(shape) > MAX_DIMS or 0 in shape:
        raise _damaged(path, f"expected a shape of at most {MAX_DIMS} positive integers, got {quoted(shape)}", name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"expected data_offsets of begin <= end, got {quoted(offsets)}", name)
    n_bytes = _stored_bytes(dtype, shape, path, name)
    begin, end = offsets
    if end - begin != n_bytes:
        raise _damaged(path, f"expected {n_bytes} bytes for {dtype} {shape}, got data_offsets of {end - begin}", name)
    return StoredTensor(name, dtype, tuple(shape), path, data_offset + begin, n_bytes)


def _check_name(name: str, path: Path) -> None:
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise _damaged(path, f"expected tensor names of 1 to {MAX_NAME_CHARS} printable characters, got {quoted(name)}")


def _is_sizes(value: Any) -> bool:
    # bool is a subclass of int, so isinstance would let true through.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _stored_bytes(dtype: str, shape: list[int], path: Path, name: str) -> int:
    n_bits = DTYPE_BITS[dtype]
    for size in shape:
        n_bits *= size
        if n_bits > MAX_TENSOR_BITS:
            raise _damaged(path, f"expected a size that fits in 64 bits, got {dtype} {shape}", name)
    if n_bits % 8:
        raise _damaged(path, f"expected whole bytes, got {n_bits} bits for {dtype} {shape}", name)
    return n_bits // 8


def _check_layout(tensors: list[StoredTensor], data_offset: int, file_bytes: int, path: Path) -> None:
    """The tensors, sorted by offset, fill the data from first byte to last without gap or overlap."""
    for before, tensor in pairwise(tensors):
        _check_begin(tensor, before.offset + before.n_bytes, path)
    if tensors:
        _check_begin(tensors[0], data_offset, path)
    end = tensors[-1].offset + tensors[-1].n_bytes if tensors else data_offset
    if end > file_bytes:
        raise _damaged(path, f"expected {end} bytes, got {file_bytes}: {_INCOMPLETE}, {end - file_bytes} bytes missing")
    if end < file_bytes:
        raise _damaged(path, f"expected {end} bytes, got {file_bytes}: {file_bytes - end} bytes belong to no tensor")


def _check_begin(tensor: StoredTensor, expected: int, path: Path) -> None:
    if tensor.offset != expected:
        kind = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap before it"
        raise _damaged(path, f"expected data at byte {expected}, got {tensor.offset}, which {kind}", tensor.name)


def _damaged(path: Path, problem: str, tensor: str | None = None) -> CheckpointError:
    where = f"{path}, tensor {quoted(tensor)}," if tensor is not None else f"{path}"
    return CheckpointError(f"damaged checkpoint file: {where} {problem}; {_DOWNLOAD}")


def read_index(path: Path) -> dict[str, str]:
    """The shard file name of each tensor, from `model.safetensors.index.json`."""
    shards = read_json(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not 0 < len(shards) <= MAX_TENSORS:
        got = len(shards) if isinstance(shards, dict) else quoted(shards)
        raise CheckpointError(
            f"damaged index: {path} expected a weight_map of 1 to {MAX_TENSORS} tensors, got {got}; {_DOWNLOAD}"
        )
    for name, shard in shards.items():
        _check_name(name, path)
        _check_shard_name(shard, path)
    return shards


def _check_shard_name(shard: Any, path: Path) -> None:
    if not isinstance(shard, str) or not _is_plain_shard_name(shard):
        raise CheckpointError(
            f"unsafe shard name: {path} expected a plain file name that ends in .safetensors, got {quoted(shard)}; "
            "take the checkpoint from its publisher"
        )


def _is_plain_shard_name(name: str) -> bool:
    # A colon would name a drive or a stream on Windows.
    return name.isprintable() and not set(name) & set("/\\:") and name.endswith(".safetensors") and len(name) <= 255


def resolve_shard(folder: Path, name: str) -> Path:
    """The path of a shard that an index names, once it is known to be a regular file of this checkpoint.

    Links may stay in the folder or, in a Hugging Face cache, lead from `snapshots/REVISION` to `blobs`; no link may
    lead elsewhere, so that no index can have another file of this machine read into a model.
    """
    _check_shard_name(name, folder)
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as exc:
        raise CheckpointError(f"missing shard: {path} expected a file, got none; download it") from exc
    if not any(target.is_relative_to(allowed) for allowed in _allowed_folders(folder.resolve())):
        raise CheckpointError(
            f"unsafe link: {path} expected a file of this checkpoint, got a link to {target}; copy the file here"
        )
    if not target.is_file():
        raise CheckpointError(f"cannot read {path}: expected a regular file, got a folder, pipe or device")
    return path


def _allowed_folders(folder: Path) -> Iterator[Path]:
    yield folder
    if folder.parent.name == "snapshots":
        yield folder.parent.parent / "blobs"
