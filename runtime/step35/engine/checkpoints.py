"""A session's checkpoints, within the engine's budget: under pressure another thread may drop them."""

from collections.abc import Iterator, Mapping

from step35.engine.budget import Budget, Reservation


class CheckpointStore:
    """Copies of the sliding window's cells by number of tokens.

    Whoever looks one up takes the budget's lock until it has been used.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._states: dict[int, tuple[bytes, Reservation]] = {}

    def __contains__(self, n_tokens: int) -> bool:
        return n_tokens in self._states

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._states))

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, n_tokens: int) -> bytes:
        state, reservation = self._states[n_tokens]
        self._budget.touch(reservation)
        return state

    def keep(self, n_tokens: int, state: bytes) -> None:
        """Keeps a checkpoint if the budget has room for it, at the price of older ones."""
        with self._budget.lock:
            self.drop(n_tokens)
            reservation = self._budget.reserve(len(state), lambda: self._states.pop(n_tokens))
            if reservation is not None:
                self._states[n_tokens] = state, reservation

    def drop(self, n_tokens: int) -> None:
        """Drops a checkpoint, if it is still kept."""
        with self._budget.lock:
            if n_tokens in self._states:
                self._budget.release(self._states.pop(n_tokens)[1])

    def cut(self, n_keep: int) -> None:
        """Drops the checkpoints beyond `n_keep` tokens."""
        for n_tokens in [n for n in self if n > n_keep]:
            self.drop(n_tokens)

    def replace(self, states: Mapping[int, bytes]) -> None:
        """Keeps these checkpoints instead."""
        self.cut(-1)
        for n_tokens, state in states.items():
            self.keep(n_tokens, state)

    def states(self) -> dict[int, bytes]:
        """Returns all checkpoints."""
        with self._budget.lock:
            return {n_tokens: state for n_tokens, (state, _) in self._states.items()}
