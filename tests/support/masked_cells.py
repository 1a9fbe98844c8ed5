"""Prints, as JSON, the CPU seconds of a decode of two sequences, side by side and with a third one's cells between.

A program of test_real_build, run with each backend.
"""

import json
import sys
import time
from pathlib import Path

from step35.native.context import Context
from step35.native.model import Model
from step35.native.rows import Rows
from step35.options import ContextOptions, ModelOptions

N_BETWEEN, N_BATCH = 16_384, 512
N_TIMES, N_BLOCKS = 20, 10


def fill(context: Context, seq: int, n: int) -> None:
    for start in range(0, n, N_BATCH):
        context.decode([Rows(seq, start, [17] * min(N_BATCH, n - start))])


def least_seconds(context: Context) -> float:
    """Decodes the token after the 32nd of sequences 0 and 2, again and again."""
    blocks = []
    for _ in range(N_BLOCKS):
        started = time.process_time()
        for _ in range(N_TIMES):
            context.decode([Rows(0, 32, [18], outputs=1), Rows(2, 32, [19], outputs=1)])
            for seq in (0, 2):
                context.truncate(seq, 32)
        blocks.append((time.process_time() - started) / N_TIMES)
    return min(blocks)


def main(path: Path) -> None:
    model = Model(ModelOptions(path))
    context = model.open_trunk(ContextOptions(2 * N_BETWEEN, N_BATCH, n_seq=3, n_threads=1))
    fill(context, 0, 32)
    fill(context, 2, 32)
    seconds = {"beside": least_seconds(context)}
    context.truncate(2, 0)
    fill(context, 1, N_BETWEEN)
    fill(context, 2, 32)
    seconds["apart"] = least_seconds(context)
    print(json.dumps(seconds))
    context.close()
    model.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
