"""Engines over real files for tests that aren't about memory: nothing is refused or ended because the box is busy."""

import time
from collections.abc import Callable
from dataclasses import replace

from step35.engine.engine import Engine
from step35.engine.loading import ON_THIS_BOX
from step35.options import EngineOptions

UNWATCHED = replace(ON_THIS_BOX, admit=lambda options, headers: None)


def open_engine(options: EngineOptions, clock: Callable[[], float] = time.perf_counter) -> Engine:
    """Returns an engine without a memory check and without a watchdog."""
    return Engine(options, loading=UNWATCHED, clock=clock)
