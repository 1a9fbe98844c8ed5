"""Prints, as JSON, what the first head of the tiny model returns for four rows: run with each backend, see test_real_build.

For each number of output rows: the hidden states that come back, and the last row's best tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np

from step35.native.context import Context
from step35.native.model import Model
from step35.native.rows import Rows
from step35.options import ContextOptions, ModelOptions

N_ROWS = 4


def run(head: Context, n_outputs: int) -> dict[str, object]:
    hidden = np.random.default_rng(0).standard_normal((N_ROWS, head.n_embd), np.float32)
    head.decode([Rows(0, 0, range(300, 300 + N_ROWS), n_outputs, hidden)])
    best = np.argsort(head.logits()[-1])[-5:].tolist() if n_outputs else []
    result = {"hidden": head.hidden().tolist(), "best": best}
    head.truncate(0, 0)
    return result


def main(path: Path) -> None:
    model = Model(ModelOptions(path, load_heads=True))
    head = model.open_head(0, ContextOptions(64, 32))
    print(json.dumps({"all_rows": head.returns_all_rows, **{str(n): run(head, n) for n in (N_ROWS, 2, 1, 0)}}))
    head.close()
    model.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
