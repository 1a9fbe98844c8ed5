"""The made-up model of `step35 doctor` in the torch reference: the logits that llama.cpp must give."""

import numpy as np
import torch

from reference.config import Config, LayerConfig
from reference.model import Step35
from step35.selftest import synthetic_model

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.g_proj": "attn_gate",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "moe.gate": "ffn_gate_inp",
}
_STACKS = {"mlp": "", "moe": "_exps", "share_expert": "_shexp"}


def reference_logits(prompt: tuple[int, ...] = synthetic_model.PROMPT) -> np.ndarray:
    """Returns the logits (n_vocab,) after a prompt, float32."""
    model = Step35(_config())
    weights = synthetic_model.tensors()
    state = {name: torch.from_numpy(_stored(name, weights[_gguf_name(name)])) for name in model.state_dict()}
    model.load_state_dict(state)
    with torch.no_grad():
        return model.trunk(torch.tensor([prompt]))[0][0, -1].numpy()


def _stored(name: str, values: np.ndarray) -> np.ndarray:
    """The reference's norms are zero-centred."""
    return values - 1 if "norm" in name else values


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    if rest == "moe.router_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    rest = rest.removesuffix(".weight")
    if rest in _NAMES:
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    stack, projection = rest.split(".")
    return f"blk.{layer}.ffn_{projection.removesuffix('_proj')}{_STACKS[stack]}.weight"


def _config() -> Config:
    return Config(
        hidden_size=synthetic_model.N_EMBD,
        intermediate_size=synthetic_model.N_FF,
        n_kv_heads=synthetic_model.N_HEAD_KV,
        head_dim=synthetic_model.HEAD_DIM,
        n_experts=synthetic_model.N_EXPERT,
        top_k=synthetic_model.N_EXPERT_USED,
        expert_size=synthetic_model.N_FF_EXPERT,
        shared_size=synthetic_model.N_FF_EXPERT,
        expert_scale=synthetic_model.EXPERT_SCALE,
        vocab_size=synthetic_model.N_VOCAB,
        norm_eps=synthetic_model.EPS,
        n_trunk=len(synthetic_model.LAYERS),
        layers=tuple(map(_layer, synthetic_model.LAYERS)),
    )


def _layer(layer: synthetic_model.Layer) -> LayerConfig:
    return LayerConfig(
        n_heads=layer.n_head,
        window=synthetic_model.WINDOW if layer.is_sliding else 0,
        n_rotated=synthetic_model.HEAD_DIM if layer.is_sliding else synthetic_model.HEAD_DIM // 2,
        rope_theta=synthetic_model.ROPE_BASE_SLIDING if layer.is_sliding else synthetic_model.ROPE_BASE,
        rope_scaling=None,
        is_moe=layer.is_moe,
        expert_limit=layer.clamp_experts,
        shared_limit=layer.clamp_shared,
    )
