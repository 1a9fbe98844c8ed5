"""Plays with sequences that share a cache; prints, as JSON, what came of it. Run by test_real_build, with each backend.

`logits`: of the last row of each decode, with flash attention and without. `cells`: how many cells of a layer with full
attention each decode looked at.
"""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from step35.native import context as context_module
from step35.native import library
from step35.native.model import Model
from step35.native.rows import Rows
from step35.options import ContextOptions, ModelOptions

N_CTX, N_SEQ, N_BATCH = 4096, 4, 64
N_STEPS = 60
FULL_LAYER = b"kq-4"


class Cache:
    """A context, and the lengths of its sequences."""

    def __init__(self, model: Model, flash_attention: bool, watch: Any) -> None:
        options = ContextOptions(N_CTX, N_BATCH, n_seq=N_SEQ, flash_attention=flash_attention)
        self.context = model.open_trunk(options, on_experts=watch)
        self.lengths = [0] * N_SEQ
        self._random = Random(0)

    def grow(self, *by: tuple[int, int]) -> np.ndarray:
        """Decodes so many more tokens of each of some sequences, in one batch; returns the last one's logits."""
        rows = [Rows(seq, self.lengths[seq], self._tokens(n), outputs=1) for seq, n in by]
        self.context.decode(rows)
        for seq, n in by:
            self.lengths[seq] += n
        return self.context.logits()[-1]

    def _tokens(self, n: int) -> list[int]:
        return [self._random.randrange(10, 2000) for _ in range(n)]

    def cut(self, seq: int, n: int) -> None:
        self.context.truncate(seq, n)
        self.lengths[seq] = n

    def copy(self, source: int, target: int) -> None:
        """As a session is forked: full-attention cells are shared, the window's are not."""
        window = self.context.save_state(source, window_only=True)
        self.cut(target, 0)
        self.context.copy(source, target, self.lengths[source])
        self.context.load_state(target, window, window_only=True)
        self.lengths[target] = self.lengths[source]


def play(model: Model, flash_attention: bool, watch: object = None) -> list[list[float]]:
    """Sequences rest and go on, together and alone, go back, are copied, begin anew."""
    cache, random, logits = Cache(model, flash_attention, watch), Random(1), []
    for seq in range(N_SEQ):
        for _ in range(random.randrange(5, 12)):
            cache.grow((seq, N_BATCH))
    for _ in range(N_STEPS):
        seq, what = random.randrange(N_SEQ), random.random()
        if what < 0.2:
            cache.cut(seq, 0)
        elif what < 0.4:
            cache.cut(seq, max(0, cache.lengths[seq] - random.randrange(1, 6)))
        elif what < 0.5 and cache.lengths[seq]:
            cache.copy(seq, (seq + 1) % N_SEQ)
        others = [other for other in range(N_SEQ) if other != seq and random.random() < 0.2]
        n = random.choice([1, 1, 2, 4, 24, 48])
        logits.append(cache.grow(*((other, 1) for other in others), (seq, n)).astype(float).round(5).tolist())
    cache.context.close()
    return logits


def counting(cells: list[int]) -> object:
    """Returns a callback that notes the cells: without flash attention, a layer's scores are (cells, rows, heads)."""

    @library.C.ggml_backend_sched_eval_callback
    def watch(tensor: int, is_asking: bool, _: object) -> bool:
        if is_asking and context_module._tensor_name(tensor) == FULL_LAYER:
            cells.append(context_module._Tensor.from_address(tensor).ne[0])
        return not is_asking

    return watch


def main(path: Path) -> None:
    context_module._expert_watch = lambda watch: watch
    model, cells = Model(ModelOptions(path)), []
    logits = [play(model, True), play(model, False, counting(cells))]
    print(json.dumps({"cells": cells, "logits": logits}))
    model.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
