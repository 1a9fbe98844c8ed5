"""The sha256 of a tensor's bytes, from its chunks while they are still in memory; they end nearly in order."""

import hashlib
from threading import Condition

import numpy as np

# More early chunks than that are not kept; the tensor is then read back when it is whole.
MOST_WAITING_BYTES = 64 * 1024**2


class TensorDigest:
    """Takes each of a tensor's chunks once, from any thread, in any order."""

    def __init__(self, n_chunks: int, *, is_partial: bool = False) -> None:
        """`is_partial` says that some chunks were made by an earlier run and will not come."""
        self._n_chunks = n_chunks
        self._is_partial = is_partial
        self._sha = hashlib.sha256()
        self._next = 0
        self._is_busy = False
        self._waiting: dict[int, bytes] = {}
        self._n_waiting_bytes = 0
        self._changed = Condition()

    def add(self, index: int, data: np.ndarray) -> None:
        """Digest a chunk, or keep a copy until those before it are there."""
        with self._changed:
            if self._is_partial:
                return
            if self._is_busy or index != self._next:
                self._keep(index, data)
                return
            self._is_busy = True
        self._digest_from(data.data)

    def result(self) -> str | None:
        """The digest in hex, once every chunk was added; None where the file must be read for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_partial or self._next == self._n_chunks)
            return None if self._is_partial else self._sha.hexdigest()

    def _keep(self, index: int, data: np.ndarray) -> None:
        self._waiting[index] = data.tobytes()
        self._n_waiting_bytes += data.nbytes
        if self._n_waiting_bytes > MOST_WAITING_BYTES:
            self._is_partial = True
            self._waiting.clear()
            self._changed.notify_all()

    def _digest_from(self, data: memoryview | bytes | None) -> None:
        """Digest a chunk and the kept ones that follow it, without the lock: other threads add theirs meanwhile."""
        while data is not None:
            self._sha.update(data)
            with self._changed:
                self._next += 1
                data = self._waiting.pop(self._next, None)
                self._n_waiting_bytes -= len(data) if data is not None else 0
                self._is_busy = data is not None
                if self._next == self._n_chunks:
                    self._changed.notify_all()
