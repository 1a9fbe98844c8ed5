"""Watches the free memory while a model runs: sheds caches, then refuses work, then ends, before the system freezes."""

import threading
from collections.abc import Callable

from step35.planning.hardware import Sources, ram, stalls
from step35.planning.memory_pressure import Level, Reading, Thresholds, next_level

INTERVAL_S = 0.5


def read_memory(sources: Sources) -> Reading | None:
    """Returns what the system says now; None if it can't be read."""
    memory = ram(sources)
    return None if memory is None else Reading(memory.available, *stalls(sources))


class Watchdog:
    """A thread that reads the memory: `shrink` at every reading that isn't calm, `on_change` when the level changes."""

    def __init__(
        self,
        read: Callable[[], Reading | None],
        thresholds: Thresholds,
        *,
        shrink: Callable[[], object],
        on_change: Callable[[Level, Reading], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.level = Level.CALM
        self._read, self._thresholds, self._interval_s = read, thresholds, interval_s
        self._shrink, self._on_change = shrink, on_change
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step35-watchdog", daemon=True)

    def check(self) -> Level:
        """Takes one reading and acts on it; a reading that fails changes nothing."""
        reading = self._read()
        if reading is None:
            return self.level
        before, self.level = self.level, next_level(self.level, reading, self._thresholds)
        if self.level is not Level.CALM:
            self._shrink()
        if self.level is not before:
            self._on_change(self.level, reading)
        return self.level

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; returns when it has ended."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.check()
