"""Sessions of the bundled model, and the logits after a prompt in one: what tests of reuse compare."""

import numpy as np

from real_engine import open_engine
from step35.engine.decode_loop import begin, step
from step35.engine.engine import Engine
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser
from tiny_model import tiny_gguf

GREEDY = Sampling(temperature=0)
# Batches of another shape add up in another order: above that, far below any real difference.
FLOAT_NOISE = 2e-2


def engine(**options) -> Engine:
    defaults = {"draft": "off", "n_ctx": 2048, "n_batch": 32, "n_threads": 1, "kv_type": "f32"}
    return open_engine(EngineOptions(tiny_gguf("F32"), **defaults | options))


def text_tokens(e: Engine, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 1900, n).tolist()


def logits_after(session, prompt: list[int]) -> tuple[np.ndarray, int]:
    """Returns the logits that follow a prompt, and how many tokens were reused for them."""
    turn = begin(session, prompt, Chooser(GREEDY), 1)
    while turn.finish is None:
        step(session.engine, [turn])
    return session.engine.trunk.logits()[-1].copy(), turn.stats.n_reused


def fresh_logits(e: Engine, prompt: list[int]) -> np.ndarray:
    with e.open_session() as session:
        return logits_after(session, prompt)[0]
