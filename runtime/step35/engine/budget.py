"""One budget for all that is kept for later: checkpoints, snapshots, prompt caches. What is oldest goes first."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Hold:
    """Bytes that are kept. `drop` lets go of them; None where only their owner may."""

    n_bytes: int
    drop: Callable[[], None] | None


class Budget:
    """Accounts for bytes up to `limit`; None is no limit.

    Holds may be dropped by another thread: who uses what can be dropped takes `lock` for that long. `drop` is called
    under it, and must not call back.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.lock = threading.RLock()
        self._holds: dict[Hold, None] = {}  # the oldest first
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes held now."""
        return self._used

    def hold(self, n_bytes: int, drop: Callable[[], None] | None = None) -> Hold | None:
        """Accounts for bytes, dropping older ones if it must; None if they don't fit even so."""
        with self.lock:
            if self.limit is not None:
                if n_bytes + self._fixed() > self.limit:
                    return None
                self._shrink_to(self.limit - n_bytes)
            hold = Hold(n_bytes, drop)
            self._holds[hold] = None
            self._used += n_bytes
            return hold

    def release(self, hold: Hold) -> None:
        """Forgets bytes that their owner has let go of; a hold that was dropped is forgotten already."""
        with self.lock:
            if hold in self._holds:
                del self._holds[hold]
                self._used -= hold.n_bytes

    def touch(self, hold: Hold) -> None:
        """Makes a hold the youngest."""
        with self.lock:
            if hold in self._holds:
                self._holds[hold] = self._holds.pop(hold)

    def halve(self) -> int:
        """Drops the older half of what can be dropped, at least one hold; returns the bytes let go of."""
        with self.lock:
            before, fixed = self._used, self._fixed()
            self._shrink_to(fixed + max(0, before - fixed - 1) // 2)
            return before - self._used

    def _fixed(self) -> int:
        return sum(hold.n_bytes for hold in self._holds if hold.drop is None)

    def _shrink_to(self, n_bytes: int) -> None:
        for hold in [hold for hold in self._holds if hold.drop is not None]:
            if self._used <= n_bytes:
                return
            self.release(hold)
            hold.drop()
