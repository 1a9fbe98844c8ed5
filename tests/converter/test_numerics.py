"""An F32 GGUF computes in llama.cpp what the torch reference computes, several windows deep.

The MTP heads' logits are compared with the reference in runtime/drafting/test_mtp_heads.py, the reference with
transformers in test_reference.py.
"""

import inspect
import json

import llama_cpp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from checkpoints import BUNDLED
from reference.checkpoint import load_checkpoint
from tiny_model import tiny_gguf

N_TOKENS = 448  # seven windows of 64
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n<think>\n" * 24


def texts() -> dict[str, str]:
    return {
        "code": inspect.getsource(json.JSONDecoder),
        "chat": CHAT,
        "bytes": "".join(chr(33 + i % 900) for i in range(800)),
    }


@pytest.fixture(scope="module")
def llama() -> llama_cpp.Llama:
    """Stock llama-cpp-python with F32 weights, F32 cache and all logits."""
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(tiny_gguf("F32")), n_ctx=512, type_k=f32, type_v=f32, logits_all=True, verbose=False, n_threads=2
    )


def divergences(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(wanted || got) at each position, in float64."""
    p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("name", texts())
def test_the_trunk_in_llama_cpp_is_the_reference(llama: llama_cpp.Llama, name: str) -> None:
    """Same argmax, or one within float noise of the best; KL under 1e-5 at every position."""
    tokens = [
        0,
        *Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(texts()[name], add_special_tokens=False).ids,
    ][:N_TOKENS]
    assert len(tokens) == N_TOKENS
    llama.reset()
    llama.eval(tokens)
    got = torch.from_numpy(np.array(llama.scores[: len(tokens)]))
    with torch.no_grad():
        wanted = load_checkpoint(BUNDLED).trunk(torch.tensor([tokens]))[0][0].float()
    assert divergences(wanted, got).max() < 1e-5
    best = wanted.max(-1).values
    chosen = wanted.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    assert (best - chosen).max() < 1e-3
