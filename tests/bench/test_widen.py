"""The bench's wide and deep model computes what the tiny one does."""

import json

import pytest
import torch

from checkpoints import BUNDLED
from reference.checkpoint import load_checkpoint, load_tensors
from reference.config import Config
from reference.model import Step35
from widen import Factors, deepened, deepened_config, widened, widened_config

FACTORS = Factors(hidden=4, heads=2, dense=8, expert=2)  # all different where they meet in one matrix
N_MORE = 3  # layers, the last with full attention
N_TOKENS = 150  # more than two windows


@torch.no_grad()
def all_logits(model: Step35, tokens: torch.Tensor) -> list[torch.Tensor]:
    logits, hidden = model.trunk(tokens)
    return [logits, *model.chain(tokens, hidden)]


def wide_model() -> Step35:
    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    tensors = deepened(load_tensors(BUNDLED), config, N_MORE)
    model = Step35(Config.from_dict(widened_config(deepened_config(config, N_MORE), FACTORS)))
    model.load_state_dict({name: widened(name, tensor, FACTORS).float() for name, tensor in tensors.items()})
    return model.eval()


def test_trunk_and_heads_of_the_wide_model_give_the_tiny_models_logits():
    tokens = torch.randint(3, 2000, (1, N_TOKENS), generator=torch.Generator().manual_seed(3))
    for tiny, wide in zip(all_logits(load_checkpoint(BUNDLED), tokens), all_logits(wide_model(), tokens), strict=True):
        assert tiny.std() > 1  # a model with opinions
        torch.testing.assert_close(wide, tiny, rtol=0, atol=2e-3)


def test_division_loses_no_bit_in_bfloat16():
    weights = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    wide = widened("model.layers.0.self_attn.q_proj.weight", weights, FACTORS)
    assert wide.shape == (12, 32)
    assert torch.equal(wide[6:, 24:] * FACTORS.hidden, weights)


def test_a_factor_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="heads expected a power of two, got 3"):
        Factors(heads=3)
