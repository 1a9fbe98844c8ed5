"""Rows of a decode: what a context is fed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence, from position `start`.

    `outputs` is how many of the last rows return logits. `hidden` (len(tokens), n_embd) float32 goes
    with the tokens into a head's context and is None for the trunk's.
    """

    seq: int
    start: int
    tokens: Sequence[int]
    outputs: int = 0
    hidden: np.ndarray | None = None
