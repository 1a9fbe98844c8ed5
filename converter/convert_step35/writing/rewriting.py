"""Rewrites a GGUF: some tensors made anew, all others copied byte for byte; streamed, and published by one rename."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.errors import OutputError
from convert_step35.gguf.header import Entry, TensorInfo, encode_header, padded
from convert_step35.gguf.model import GgufModel
from convert_step35.gguf.reader import GgufFile, GgufTensor
from convert_step35.reading.ranges import read_piece
from convert_step35.writing.output import partial_path, require_space, reserve, sync_folder

_PIECE_BYTES = 8 * 1024**2


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor with data of its own: `pieces` yields its bytes in order, `n_bytes` in all, as uint8 arrays."""

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    n_bytes: int
    pieces: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of the new file; `offset` counts from the start of the file."""

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    sha256: str


def entries_of(file: GgufFile) -> tuple[Entry, ...]:
    """The metadata of a file, ready to be written again."""
    return tuple(_entry(file, key) for key in file.metadata)


def rewrite(
    source: GgufModel,
    out: Path,
    entries: Sequence[Entry],
    tensors: Sequence[GgufTensor | Made],
    *,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> list[Written]:
    """Write `out`, one file, with these entries and tensors, in this order; a GgufTensor is copied out of `source`.

    Until all of it is on the disk `out` is not touched; an error leaves nothing behind. The disk's room
    is reserved first. `on_bytes` is called with the bytes written since.
    """
    alignment = source.files[0].alignment
    infos, n_data = _placed(tensors, alignment)
    header = encode_header(entries, infos, alignment)
    written = []
    with _published(out, len(header) + n_data) as target:
        os.pwrite(target, header, 0)
        on_bytes(len(header))
        for tensor, info in zip(tensors, infos, strict=True):
            pieces = tensor.pieces() if isinstance(tensor, Made) else _copied(tensor, source.homes[tensor.name])
            offset = len(header) + info.offset
            digest = _write(target, pieces, offset, tensor.n_bytes, on_bytes)
            written.append(Written(info.name, info.ggml_type, info.shape, offset, tensor.n_bytes, digest))
    return written


def _entry(file: GgufFile, key: str) -> Entry:
    kind, item = file.value_types[key]
    value = file.metadata[key]
    return Entry(key, kind, value) if item is None else Entry(key, item, tuple(value))


def _placed(tensors: Sequence[GgufTensor | Made], alignment: int) -> tuple[list[TensorInfo], int]:
    """The infos with their final offsets, and the bytes of all data."""
    infos: list[TensorInfo] = []
    offset = 0
    for tensor in tensors:
        infos.append(TensorInfo(tensor.name, tensor.ggml_type, tensor.shape, offset))
        offset += padded(tensor.n_bytes, alignment)
    return infos, offset


def _copied(tensor: GgufTensor, path: Path) -> Iterator[np.ndarray]:
    """The tensor's bytes in pieces, each read while the one before is used."""
    places = [(at, min(_PIECE_BYTES, tensor.n_bytes - at)) for at in range(0, tensor.n_bytes, _PIECE_BYTES)]
    with path.open("rb") as file, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(read_piece, file.fileno(), tensor.offset, places[0][1], path)
        for at, n_bytes in places[1:]:
            piece = following.result()
            following = ahead.submit(read_piece, file.fileno(), tensor.offset + at, n_bytes, path)
            yield piece
        yield following.result()


def _write(
    target: int, pieces: Iterator[np.ndarray], offset: int, n_bytes: int, on_bytes: Callable[[int], None]
) -> str:
    """Write the pieces from `offset` on; the sha256 of them all."""
    sha, done = hashlib.sha256(), 0
    for piece in pieces:
        view = piece.data
        sha.update(view)
        while view:
            n = os.pwrite(target, view, offset + done)
            done, view = done + n, view[n:]
        on_bytes(len(piece))
    assert done == n_bytes
    return sha.hexdigest()


@contextmanager
def _published(out: Path, n_bytes: int) -> Iterator[int]:
    """A file of `n_bytes` under a temporary name, which becomes `out` at the end, or is removed after an error."""
    require_space(out.parent, n_bytes)
    partial = partial_path(out)
    target = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(target, partial)
        try:
            os.ftruncate(target, 0)
            reserve(target, out, n_bytes)
            yield target
            os.fsync(target)
            partial.replace(out)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(target)
    sync_folder(out.parent)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise OutputError(f"already running: another command writes {path}; wait for it or stop it") from exc
