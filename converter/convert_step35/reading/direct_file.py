"""A file read past the page cache where the system can: so that a checkpoint does not evict all other files."""

import errno
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from convert_step35.reading.ranges import read_into, truncated

# Direct reads need offsets, lengths and memory in whole blocks of the disk; no disk has larger ones.
BLOCK_BYTES = 4096
_F_NOCACHE = 48  # macOS, fcntl.h


def read_buffer(n_bytes: int) -> np.ndarray:
    """uint8 memory for DirectFile.read of up to `n_bytes` from any offset."""
    memory = mmap.mmap(-1, _up(n_bytes) + BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A direct read looks up every page it fills. A kernel without huge pages refuses, and reads all the same.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class DirectFile:
    """One file of a checkpoint, open for large reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_direct = hasattr(os, "O_DIRECT")
        self._file = self._open()

    def close(self) -> None:
        os.close(self._file)

    def read(self, offset: int, n_bytes: int, buffer: np.ndarray) -> np.ndarray:
        """The bytes from `offset` on, as a part of `buffer`; CheckpointError where the file ends early."""
        if self.is_direct:
            try:
                return self._read_blocks(offset, n_bytes, buffer)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
            # Some file systems open for direct reads and then refuse them.
            self.is_direct = False
            os.close(self._file)
            self._file = self._open()
        return self._read_cached(offset, n_bytes, buffer)

    def _open(self) -> int:
        if self.is_direct:
            try:
                return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                self.is_direct = False
        file = os.open(self.path, os.O_RDONLY)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(file, _F_NOCACHE, 1)
        return file

    def _read_blocks(self, offset: int, n_bytes: int, buffer: np.ndarray) -> np.ndarray:
        before = offset % BLOCK_BYTES
        first, n_wanted = offset - before, before + n_bytes
        view, done = buffer.data[: _up(n_wanted)], 0
        while done < n_wanted:
            n = os.preadv(self._file, [view[done:]], first + done)
            done += n
            # Only the end of the file leaves a part of a block.
            if n == 0 or (done % BLOCK_BYTES and done < n_wanted):
                raise truncated(self.path, offset + n_bytes, first + done)
        return buffer[before:n_wanted]

    def _read_cached(self, offset: int, n_bytes: int, buffer: np.ndarray) -> np.ndarray:
        data = buffer[:n_bytes]
        if hasattr(os, "posix_fadvise"):
            # Asks for all of it at once; a plain read asks for a little at a time.
            os.posix_fadvise(self._file, offset, n_bytes, os.POSIX_FADV_WILLNEED)
        read_into(self._file, data, offset, self.path)
        if hasattr(os, "posix_fadvise"):
            # With the page that it shares with what was read before.
            before = min(offset, BLOCK_BYTES)
            os.posix_fadvise(self._file, offset - before, before + n_bytes, os.POSIX_FADV_DONTNEED)
        return data


def _up(n_bytes: int) -> int:
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES
