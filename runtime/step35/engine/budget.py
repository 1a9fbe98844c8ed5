"""One budget for all that is kept for later: checkpoints, snapshots, prompt caches. The oldest is dropped first."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Reservation:
    """Bytes that are kept. `drop` frees them; None where only their owner may."""

    n_bytes: int
    drop: Callable[[], object] | None


class Budget:
    """Accounts for bytes up to `limit`; None is no limit.

    Another thread may drop what is reserved: whoever uses bytes that can be dropped takes `lock` for that long. `drop`
    is called under it, and must not call back.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.lock = threading.RLock()
        self._reservations: dict[Reservation, None] = {}  # the oldest first
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def reserve(self, n_bytes: int, drop: Callable[[], object] | None = None) -> Reservation | None:
        """Accounts for bytes, dropping older ones if it must; None if they don't fit even so."""
        with self.lock:
            if self.limit is not None:
                if n_bytes + self._fixed() > self.limit:
                    return None
                self._shrink_to(self.limit - n_bytes)
            reservation = Reservation(n_bytes, drop)
            self._reservations[reservation] = None
            self._used += n_bytes
            return reservation

    def release(self, reservation: Reservation) -> None:
        """Forgets bytes that their owner has freed; a reservation that was dropped is forgotten already."""
        with self.lock:
            if reservation in self._reservations:
                del self._reservations[reservation]
                self._used -= reservation.n_bytes

    def touch(self, reservation: Reservation) -> None:
        """Makes a reservation the youngest."""
        with self.lock:
            if reservation in self._reservations:
                self._reservations[reservation] = self._reservations.pop(reservation)

    def halve(self) -> int:
        """Drops the older half of what can be dropped, at least one reservation; returns the bytes freed."""
        with self.lock:
            before, fixed = self._used, self._fixed()
            self._shrink_to(fixed + max(0, before - fixed - 1) // 2)
            return before - self._used

    def _fixed(self) -> int:
        return sum(reservation.n_bytes for reservation in self._reservations if reservation.drop is None)

    def _shrink_to(self, n_bytes: int) -> None:
        for reservation in list(self._reservations):
            if self._used <= n_bytes:
                return
            if reservation.drop is not None:
                self.release(reservation)
                reservation.drop()
