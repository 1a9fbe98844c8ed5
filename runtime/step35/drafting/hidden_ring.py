"""The hidden states of a timeline's last rows, in a ring. Pure."""

import numpy as np


class HiddenRows:
    """Consecutive rows [start, end) of width n_embd, float32; at most `capacity` of them are kept."""

    def __init__(self, capacity: int, n_embd: int) -> None:
        self.capacity = capacity
        self._ring = np.zeros((capacity, n_embd), np.float32)
        self.start = self.end = 0

    def put(self, first: int, rows: np.ndarray) -> None:
        """Stores rows from position `first` on; rows after them are forgotten.

        A gap before `first` forgets everything older: a row must follow its predecessor.
        """
        if not self.start <= first <= self.end:
            self.start = first
        self.end = first + len(rows)
        if len(rows) == 1:  # every plain step
            self._ring[first % self.capacity] = rows[0]
        else:
            rows = rows[-self.capacity :]
            self._ring[np.arange(self.end - len(rows), self.end) % self.capacity] = rows
        self.start = max(self.start, self.end - self.capacity)

    def get(self, first: int, end: int) -> np.ndarray:
        """Returns a copy of rows [first, end); they must be stored."""
        if not self.start <= first <= end <= self.end:
            raise IndexError(f"hidden rows [{first}, {end}) not stored: have [{self.start}, {self.end})")
        return self._ring[np.arange(first, end) % self.capacity]

    def truncate(self, n_keep: int) -> None:
        """Forgets rows from position `n_keep` on."""
        self.end = min(self.end, n_keep)
        self.start = min(self.start, self.end)
