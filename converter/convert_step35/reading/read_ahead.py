"""Reads ahead of the workers: threads of their own fill a ring of buffers in the order of the source."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np

from convert_step35.planning.chunks import Chunk
from convert_step35.reading.direct_file import DirectFile, read_buffer

# Two reads of this size at a time keep a disk busy, and the ring of buffers is small beside any model.
SPAN_BYTES = 8 * 1024**2
N_READERS = 2
N_BUFFERS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a chunk stand."""

    path: Path
    offset: int
    n_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.n_bytes


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """A chunk of the plan's tensor `index`, and where its bytes stand."""

    index: int
    chunk: Chunk
    place: Place


@dataclass(frozen=True, slots=True)
class Unread:
    """Work on the plan's tensor `index` for which nothing is read: a generated chunk, or None for a whole tensor."""

    index: int
    chunk: Chunk | None


Item = ChunkRead | Unread


@dataclass(slots=True)
class _Lease:
    """A buffer, and how many items still need its bytes."""

    buffer: np.ndarray
    n_left: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A chunk with its bytes, which stay valid until it is given back."""

    item: ChunkRead
    data: np.ndarray
    lease: _Lease = field(repr=False)


def spans(items: Iterable[Item], most: int = SPAN_BYTES) -> Iterator[list[Item]]:
    """Items in runs that one read brings: one after the other in a file, `most` bytes unless a single one is larger."""
    run: list[Item] = []
    for item in items:
        if run and not _goes_on(run, item, most):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _goes_on(run: list[Item], item: Item, most: int) -> bool:
    first, last = run[0], run[-1]
    if not (isinstance(first, ChunkRead) and isinstance(last, ChunkRead) and isinstance(item, ChunkRead)):
        return isinstance(first, Unread) and isinstance(item, Unread)
    follows = (item.place.path, item.place.offset) == (last.place.path, last.place.end)
    return follows and item.place.end - first.place.offset <= most


class ReadAhead:
    """Items with their bytes, in order but for the readers' race; `read` runs in each of N_READERS threads.

    `take` waits for the next item and returns None at the end; who took a Loaded one gives it back when its bytes are
    used.
    """

    def __init__(self, items: Iterable[Item], largest: int, n_takers: int) -> None:
        self._spans = spans(items)
        self._lock = Lock()
        self._n_takers = n_takers
        self._n_reading = N_READERS
        self._is_stopped = False
        self._ready: SimpleQueue[Loaded | Unread | None] = SimpleQueue()
        self._free: SimpleQueue[np.ndarray | None] = SimpleQueue()
        for _ in range(N_BUFFERS):
            self._free.put(read_buffer(max(largest, SPAN_BYTES)))

    def read(self) -> None:
        """Read spans until there are no more, or until `stop`."""
        files: dict[Path, DirectFile] = {}
        try:
            while (buffer := self._free.get()) is not None and (span := self._next()) is not None:
                self._load(span, buffer, files)
        finally:
            for file in files.values():
                file.close()
            self._end()

    def take(self) -> Loaded | Unread | None:
        return self._ready.get()

    def give_back(self, loaded: Loaded) -> None:
        """Say that an item's bytes are used; the last one of a read frees the buffer."""
        with self._lock:
            loaded.lease.n_left -= 1
            is_free = loaded.lease.n_left == 0
        if is_free:
            self._free.put(loaded.lease.buffer)

    def stop(self) -> None:
        """End the waiting of all threads: readers return, and takers get None after what is ready."""
        self._is_stopped = True
        for _ in range(N_READERS):
            self._free.put(None)
        for _ in range(self._n_takers):
            self._ready.put(None)

    def _next(self) -> list[Item] | None:
        with self._lock:
            return None if self._is_stopped else next(self._spans, None)

    def _load(self, span: list[Item], buffer: np.ndarray, files: dict[Path, DirectFile]) -> None:
        for item in span:
            if isinstance(item, Unread):
                self._ready.put(item)
        if reads := [item for item in span if isinstance(item, ChunkRead)]:
            self._load_together(reads, buffer, files)
        else:
            self._free.put(buffer)

    def _load_together(self, reads: list[ChunkRead], buffer: np.ndarray, files: dict[Path, DirectFile]) -> None:
        """Read neighbours in a file at once."""
        first, end = reads[0].place, reads[-1].place.end
        data = _opened(files, first.path).read(first.offset, end - first.offset, buffer)
        lease = _Lease(buffer, len(reads))
        for item in reads:
            at = item.place.offset - first.offset
            self._ready.put(Loaded(item, data[at : at + item.place.n_bytes], lease))

    def _end(self) -> None:
        """The last reader to end puts a None for every taker."""
        with self._lock:
            self._n_reading -= 1
            is_last = self._n_reading == 0
        if is_last:
            for _ in range(self._n_takers):
                self._ready.put(None)


def _opened(files: dict[Path, DirectFile], path: Path) -> DirectFile:
    """The file, open; a reader goes through the shards in turn and keeps one."""
    if path not in files:
        for old in files.values():
            old.close()
        files.clear()
        files[path] = DirectFile(path)
    return files[path]
