"""How short the memory is: levels with thresholds to rise and margins to fall. Pure."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

RELIEF = 1.5
"""How far beyond a threshold the memory must recover before its level ends."""
SOME_STALL, FULL_STALL = 0.3, 0.4
"""Shares of the last ten seconds in which some, or all, tasks waited for memory: mapped weights that were evicted
count as available, and only this tells."""


class Level(IntEnum):
    """How short the memory is, and what follows."""

    CALM = 0
    SHRINK = 1
    """Caches and checkpoints go."""
    REJECT = 2
    """New work is refused."""
    STOP = 3
    """The running work ends. There is no way back."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The memory at one moment; stalls are shares of time, 0 where the system doesn't tell."""

    available: int
    some_stall: float = 0.0
    full_stall: float = 0.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Bytes of available memory below which each level begins."""

    shrink: int
    reject: int
    stop: int

    @classmethod
    def of_reserve(cls, reserve_bytes: int) -> Self:
        """Returns the thresholds for a box whose plans leave `reserve_bytes` free."""
        return cls(reserve_bytes // 2, reserve_bytes // 4, reserve_bytes // 8)


def next_level(level: Level, reading: Reading, thresholds: Thresholds) -> Level:
    """Returns the level after a reading: up one at a time, so that each remedy is tried first; down with a margin."""
    if level is Level.STOP or (wanted := _level(reading, thresholds, 1.0)) == level:
        return level
    if wanted > level:
        return Level(level + 1)
    return min(level, _level(reading, thresholds, RELIEF))


def _level(reading: Reading, thresholds: Thresholds, margin: float) -> Level:
    if reading.available < thresholds.stop * margin:
        return Level.STOP
    if reading.available < thresholds.reject * margin or reading.full_stall * margin > FULL_STALL:
        return Level.REJECT
    if reading.available < thresholds.shrink * margin or reading.some_stall * margin > SOME_STALL:
        return Level.SHRINK
    return Level.CALM
