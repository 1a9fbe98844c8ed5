"""The MTP driver against the torch reference: the drafts are those of the exact chain."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from checkpoints import BUNDLED
from real_engine import open_engine
from reference.checkpoint import load_checkpoint
from reference.decode import draft
from step35.drafting.draft_round import DraftRound
from step35.engine.decode_loop import begin, step
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser
from tiny_model import tiny_gguf

PROMPT = "def read_file(path, encoding='utf-8'):\n    "


@pytest.fixture(scope="module")
def reference():
    return load_checkpoint(BUNDLED)


@torch.no_grad()
def reference_drafts(model, tokens: list[int]) -> list[np.ndarray]:
    _, hidden = model.trunk(torch.tensor([tokens[:-1]]))
    return [logits.float().numpy() for logits in draft(model, torch.tensor(tokens), hidden[0])]


def test_every_head_drafts_what_the_reference_drafts(reference):
    """F32 weights and cache, twice the window: same argmax, or nearly equal scores; KL under 1e-4."""
    options = EngineOptions(tiny_gguf("F32"), draft="3", n_ctx=512, n_threads=1, kv_type="f32")
    seen = []
    with open_engine(options) as e, e.open_session() as session:
        run = e.drafter.heads.run

        def spy(head: int, rounds: Sequence[DraftRound]) -> list[np.ndarray]:
            logits = run(head, rounds)
            seen.append((head, list(session.tokens), rounds[0].draft_tokens, logits[0]))
            return logits

        e.drafter.heads.run = spy
        turn = begin(session, e.tokenize(PROMPT), Chooser(Sampling(temperature=0)), 128)
        while turn.finish is None:
            step(e, [turn])
    n_checked, wanted_of = 0, {}
    for head, tokens, drafts, logits in seen:
        if len(tokens) not in wanted_of:
            wanted_of[len(tokens)] = reference_drafts(reference, tokens)
        wanted = wanted_of[len(tokens)]
        if drafts != [int(row.argmax()) for row in wanted[:head]]:
            continue  # an earlier head's tie was broken the other way
        assert divergence(wanted[head], logits) < 1e-4
        n_checked += 1
    assert n_checked > 0.95 * len(seen) > 60


def divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    p, q = (torch.tensor(x).double().log_softmax(-1) for x in (wanted, got))
    return float((p.exp() * (p - q)).sum())
