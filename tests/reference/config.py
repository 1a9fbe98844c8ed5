"""Read a Step-3.5 `config.json`, and the one the bundled tiny checkpoint ships with."""

import json
from dataclasses import dataclass
from pathlib import Path

FULL, SLIDING = "full_attention", "sliding_attention"

N_TRUNK, N_MTP = 6, 3
LAYER_TYPES = [FULL if i % 4 == 0 and i < N_TRUNK else SLIDING for i in range(N_TRUNK + N_MTP)]
CLAMPED_LAYERS = (4, 5)

TINY_CONFIG = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "auto_map": {
        "AutoConfig": "configuration_step3p5.Step3p5Config",
        "AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM",
    },
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": N_TRUNK,
    "num_nextn_predict_layers": N_MTP,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": 64,
    "attention_other_setting": {
        "attention_type": SLIDING,
        "num_attention_heads": 8,
        "num_attention_groups": 2,
        "head_dim": 64,
        "true_head_dim": 64,
    },
    "att_impl_type": "GQA",
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "sink": False,
    "layer_types": LAYER_TYPES,
    "sliding_window": 64,
    "rope_theta": [5000000.0 if kind == FULL else 10000.0 for kind in LAYER_TYPES],
    "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in LAYER_TYPES],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "yarn_only_types": [FULL],
    "use_rope_layers": [],
    "max_seq_len": 262144,
    "max_position_embeddings": 262144,
    "use_moe": True,
    "moe_layers_enum": "3,4,5",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_intermediate_size": 256,
    "share_expert_dim": 256,
    "moe_layer_offset": 0,
    "moe_every_n_layer": 1,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "swiglu_limits": [3.0 if i in CLAMPED_LAYERS else 0.0 for i in range(N_TRUNK + N_MTP)],
    "swiglu_limits_shared": [5.0 if i in CLAMPED_LAYERS else 0.0 for i in range(N_TRUNK + N_MTP)],
    "zero_centered": True,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "bos_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 frequency scaling; lengths are in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """The shape of one decoder layer; a limit of 0.0 means no clamp, a window of 0 full attention."""

    n_heads: int
    window: int
    n_rotated: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    is_moe: bool
    expert_limit: float
    shared_limit: float


@dataclass(frozen=True, slots=True)
class Config:
    """What the forward pass needs to know; layers lists the trunk first, then the MTP heads."""

    hidden_size: int
    intermediate_size: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    expert_scale: float
    vocab_size: int
    norm_eps: float
    n_trunk: int
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        n_layers = raw["num_hidden_layers"] + raw["num_nextn_predict_layers"]
        return cls(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            n_kv_heads=raw["num_attention_groups"],
            head_dim=raw["head_dim"],
            n_experts=raw["moe_num_experts"],
            top_k=raw["moe_top_k"],
            expert_size=raw["moe_intermediate_size"],
            shared_size=raw["share_expert_dim"],
            expert_scale=raw["moe_router_scaling_factor"],
            vocab_size=raw["vocab_size"],
            norm_eps=raw.get("rms_norm_eps", 1e-5),
            n_trunk=raw["num_hidden_layers"],
            layers=tuple(_layer(raw, i) for i in range(n_layers)),
        )

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _layer(raw: dict, i: int) -> LayerConfig:
    sliding = raw["layer_types"][i] == SLIDING
    heads = raw["attention_other_setting"] if sliding else raw
    return LayerConfig(
        n_heads=heads["num_attention_heads"],
        window=raw["sliding_window"] if sliding else 0,
        n_rotated=int(raw["head_dim"] * raw["partial_rotary_factors"][i]),
        rope_theta=raw["rope_theta"][i],
        rope_scaling=_scaling(raw["rope_scaling"]) if raw["layer_types"][i] in raw["yarn_only_types"] else None,
        is_moe=str(i) in raw["moe_layers_enum"].split(","),
        expert_limit=raw["swiglu_limits"][i],
        shared_limit=raw["swiglu_limits_shared"][i],
    )


def _scaling(raw: dict) -> RopeScaling:
    return RopeScaling(
        factor=raw["factor"],
        low_freq_factor=raw["low_freq_factor"],
        high_freq_factor=raw["high_freq_factor"],
        original_length=raw["original_max_position_embeddings"],
    )
