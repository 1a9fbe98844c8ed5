"""Prints the greedy tokens after a prompt at each way of drafting, and how wide the trunk's choices were.

Run as a program: llama.cpp's libraries are chosen once a process.
"""

import json
import sys
from pathlib import Path

import numpy as np

from real_engine import open_engine
from step35.engine.decode_loop import begin, generate
from step35.engine.engine import Engine
from step35.native.rows import Rows
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
N_PREDICT = 40


def main(model: Path, drafts: list[str]) -> None:
    texts = {draft: tokens_of(model, draft) for draft in drafts}
    print(json.dumps({"texts": texts, "margin": margin(model, texts[drafts[0]])}))


def tokens_of(model: Path, draft: str) -> list[int]:
    """Returns the greedy tokens."""
    with (
        open_engine(EngineOptions(model, draft=draft, n_ctx=256, n_batch=64)) as engine,
        engine.open_session() as session,
    ):
        return list(generate(begin(session, engine.tokenize(PROMPT), Chooser(Sampling(0)), N_PREDICT)))


def margin(model: Path, tokens: list[int]) -> float:
    """Returns the least lead that a chosen token had over the next best, in logits."""
    with open_engine(EngineOptions(model, draft="off", n_ctx=256, n_batch=64)) as engine:
        steps = [engine.tokenize(PROMPT), *([token] for token in tokens[:-1])]
        return min(_lead(engine, sum(map(len, steps[:i])), step) for i, step in enumerate(steps))


def _lead(engine: Engine, start: int, tokens: list[int]) -> float:
    engine.trunk.decode([Rows(0, start, tokens, outputs=1)])
    second, first = np.partition(engine.trunk.logits()[-1], -2)[-2:]
    return float(first - second)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
