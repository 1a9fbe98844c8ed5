"""The journal of an unfinished conversion: what is safely on disk, so that the same command resumes there.

One line names the format, one holds the fingerprint as JSON, then come fixed records, one for each finished
chunk. A record is appended only after its data is synced, and carries its own CRC, so an incomplete tail is dropped.
"""

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from convert_step35.errors import OutputError
from convert_step35.quantization.measure import ErrorSums

_MAGIC = b"convert-step35 journal 1\n"
_RECORD = struct.Struct("<IIIfddI")


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One finished chunk: of which tensor of the plan, the CRC-32 of its output bytes, and its error sums."""

    tensor: int
    chunk: int
    crc: int
    errors: ErrorSums


def journal_path(out: Path) -> Path:
    """Where the journal of a conversion to OUT lies."""
    return out.with_name(out.name + ".journal")


def _pack(record: ChunkRecord) -> bytes:
    errors = record.errors
    numbers = errors.max_error, errors.squared_error, errors.squared_sum
    body = _RECORD.pack(record.tensor, record.chunk, record.crc, *numbers, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def _unpack(data: bytes) -> Iterator[ChunkRecord]:
    for at in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        tensor, chunk, data_crc, *numbers, crc = _RECORD.unpack_from(data, at)
        if crc != zlib.crc32(data[at : at + _RECORD.size - 4]):
            return
        yield ChunkRecord(tensor, chunk, data_crc, ErrorSums(*numbers))


class Journal:
    """An open, locked journal. `done` are the records that were found in it."""

    def __init__(self, path: Path, fingerprint: dict[str, str]) -> None:
        self.path = path
        self.done: tuple[ChunkRecord, ...] = ()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._file, path)
            data = path.read_bytes()
            if _is_incomplete_start(data):
                self._start(fingerprint)
            else:
                self._resume(data, fingerprint)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def append(self, records: Iterable[ChunkRecord]) -> None:
        """Add records whose data is already synced."""
        os.write(self._file, b"".join(_pack(record) for record in records))
        os.fdatasync(self._file)

    def remove(self) -> None:
        self.path.unlink()

    def _start(self, fingerprint: dict[str, str]) -> None:
        os.ftruncate(self._file, 0)
        os.write(self._file, _MAGIC + json.dumps(fingerprint, sort_keys=True).encode() + b"\n")
        os.fsync(self._file)

    def _resume(self, data: bytes, fingerprint: dict[str, str]) -> None:
        head, _, records = data.removeprefix(_MAGIC).partition(b"\n")
        if not data.startswith(_MAGIC):
            raise OutputError(
                f"not a journal: {self.path} expected {_MAGIC!r} first; remove it and run again with --restart"
            )
        try:
            recorded = json.loads(head)
        except ValueError as exc:
            raise OutputError(f"damaged journal: {self.path}; start over with --restart") from exc
        _check_fingerprint(recorded, fingerprint, self.path)
        self.done = tuple(_unpack(records))
        # Drop an incomplete tail, so that new records stay aligned.
        os.ftruncate(self._file, len(data) - len(records) + len(self.done) * _RECORD.size)
        os.lseek(self._file, 0, os.SEEK_END)


def drop_journal(path: Path) -> None:
    """Remove a journal, if there is one; OutputError while a conversion has it open."""
    if not path.exists():
        return
    file = os.open(path, os.O_RDWR)
    try:
        _lock(file, path)
        path.unlink()
    finally:
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise OutputError(f"already running: another conversion holds {path}; wait for it or stop it") from exc


def _is_incomplete_start(data: bytes) -> bool:
    """True for an empty journal, or one killed before its first two lines were whole: nothing was done yet."""
    return _MAGIC.startswith(data) or (data.startswith(_MAGIC) and b"\n" not in data[len(_MAGIC) :])


def _check_fingerprint(recorded: dict[str, str], now: dict[str, str], path: Path) -> None:
    changed = [key for key in now if recorded.get(key) != now[key]]
    if changed:
        pairs = "; ".join(f"{key} was {recorded.get(key)}, is {now[key]}" for key in changed)
        raise OutputError(f"can't resume {path}: {pairs}; restore it, or start over with --restart")
