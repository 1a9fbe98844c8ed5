"""The shape of a Step-3.5 model, read from config.json as data and checked key by key."""

from dataclasses import dataclass
from typing import Any

from convert_step35.errors import CheckpointError, quoted

ARCHITECTURES = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")
_FULL, _SLIDING = "full_attention", "sliding_attention"

# What the forward pass in llama.cpp takes for granted: any other value is another model.
_TAKEN_FOR_GRANTED = {
    "use_head_wise_attn_gate": True,
    "sink": False,
    "att_impl_type": "GQA",
    "use_moe": True,
    "use_moe_router_bias": True,
    "moe_router_activation": "sigmoid",
    "moe_layer_offset": 0,
    "moe_every_n_layer": 1,
    "tie_word_embeddings": False,
    "use_rope_layers": [],
    "yarn_only_types": [_FULL],
}


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """The llama3 rope scaling of the full-attention layers."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One decoder layer, of the trunk or of an MTP head. A clamp of 0.0 means none."""

    is_sliding: bool
    is_moe: bool
    is_mtp: bool
    n_heads: int
    n_kv_heads: int
    clamp_routed: float
    clamp_shared: float


@dataclass(frozen=True, slots=True)
class Architecture:
    """Every dimension that the mapping and the metadata need. `layers` holds the trunk, then the MTP layers."""

    layers: tuple[LayerShape, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    sliding_window: int
    context_length: int
    rms_norm_eps: float
    rope_theta_full: float
    rope_theta_sliding: float
    rotary_factor_full: float
    rope_scaling: Llama3Rope | None
    n_experts: int
    n_experts_used: int
    moe_intermediate_size: int
    share_expert_dim: int
    router_scaling_factor: float
    norm_expert_weight: bool
    eos_token_ids: tuple[int, ...]
    fp8_block: tuple[int, int] | None
    has_vision: bool

    @property
    def trunk(self) -> tuple[LayerShape, ...]:
        return tuple(layer for layer in self.layers if not layer.is_mtp)

    @property
    def n_trunk(self) -> int:
        return len(self.trunk)

    @property
    def n_mtp(self) -> int:
        return len(self.layers) - self.n_trunk

    @property
    def n_leading_dense(self) -> int:
        return next(i for i, layer in enumerate(self.layers) if layer.is_moe)


class _Config:
    """config.json with checked look-ups; the text part of a Step-3.7 config overrides its outer keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        text = config.get("text_config", {})
        if not isinstance(text, dict):
            raise CheckpointError(f"config.json: text_config expected an object, got {quoted(text)}")
        self._data = {**config, **text}

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {key} is missing, expected {_a(kind)}; this is no Step-3.5 config")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"config.json: {key} expected {_a(kind)}, got {quoted(value)}")
        return value

    def size(self, key: str, most: int = 2**31 - 1, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if not 0 < value <= most:
            raise CheckpointError(f"config.json: {key} expected 1 to {most}, got {value}")
        return value

    def raw(self, key: str) -> Any:
        return self._data.get(key)


def _a(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", list: "a list", dict: "an object", bool: "true or false"}
    return names[kind]


def read_architecture(config: dict[str, Any]) -> Architecture:
    """Check a parsed config.json of Step-3.5 (or 3.7) and return its dimensions; CheckpointError names the key."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise CheckpointError(f"config.json: architectures expected one of {list(ARCHITECTURES)}, got {quoted(names)}; only Step-3.5 and 3.7 convert here")
    cfg = _Config(config)
    _check_taken_for_granted(cfg)
    layers = _layers(cfg)
    theta_full, theta_sliding = _rope_thetas(cfg, layers)
    return Architecture(
        layers=layers,
        hidden_size=cfg.size("hidden_size"),
        intermediate_size=cfg.size("intermediate_size"),
        vocab_size=cfg.size("vocab_size"),
        head_dim=cfg.size("head_dim"),
        sliding_window=cfg.size("sliding_window"),
        context_length=cfg.size("max_position_embeddings"),
        rms_norm_eps=cfg.get("rms_norm_eps", float, 1e-5),
        rope_theta_full=theta_full,
        rope_theta_sliding=theta_sliding,
        rotary_factor_full=_rotary_factor_full(cfg, layers),
        rope_scaling=_rope_scaling(cfg),
        n_experts=cfg.size("moe_num_experts"),
        n_experts_used=cfg.size("moe_top_k", most=cfg.size("moe_num_experts")),
        moe_intermediate_size=cfg.size("moe_intermediate_size"),
        share_expert_dim=cfg.size("share_expert_dim"),
        router_scaling_factor=cfg.get("moe_router_scaling_factor", float),
        norm_expert_weight=cfg.get("norm_expert_weight", bool),
        eos_token_ids=_eos_ids(cfg),
        fp8_block=_fp8_block(cfg),
        has_vision=isinstance(config.get("vision_config"), dict),
    )


def _check_taken_for_granted(cfg: _Config) -> None:
    for key, want in _TAKEN_FOR_GRANTED.items():
        got = cfg.raw(key)
        if got is not None and (type(got) is not type(want) or got != want):
            raise CheckpointError(f"config.json: {key} expected {want!r}, got {quoted(got)}; llama.cpp's step35 graph has no such variant")


def _layers(cfg: _Config) -> tuple[LayerShape, ...]:
    n_trunk, n_mtp = cfg.size("num_hidden_layers", most=512), _count(cfg, "num_nextn_predict_layers", most=16)
    n_all = n_trunk + n_mtp
    kinds = _per_layer(cfg, "layer_types", n_trunk, n_all, pad=_SLIDING)
    unknown = sorted({quoted(kind) for kind in kinds} - {quoted(_FULL), quoted(_SLIDING)})
    if unknown:
        raise CheckpointError(f"config.json: layer_types expected {_FULL} or {_SLIDING}, got {', '.join(unknown)}")
    heads = {_FULL: (cfg.size("num_attention_heads"), cfg.size("num_attention_groups")), _SLIDING: _sliding_heads(cfg)}
    moe = _moe_layers(cfg, n_trunk)
    routed, shared = _clamps(cfg, "swiglu_limits", n_trunk, n_all), _clamps(cfg, "swiglu_limits_shared", n_trunk, n_all)
    return tuple(
        LayerShape(
            is_sliding=kind == _SLIDING,
            is_moe=i in moe,
            is_mtp=i >= n_trunk,
            n_heads=heads[kind][0],
            n_kv_heads=heads[kind][1],
            clamp_routed=routed[i],
            clamp_shared=shared[i],
        )
        for i, kind in enumerate(kinds)
    )


def _count(cfg: _Config, key: str, most: int) -> int:
    value = cfg.get(key, int, 0)
    if not 0 <= value <= most:
        raise CheckpointError(f"config.json: {key} expected 0 to {most}, got {value}")
    return value


def _per_layer(cfg: _Config, key: str, n_trunk: int, n_all: int, pad: Any) -> list[Any]:
    """A list over the layers; one cut to the trunk (the NVFP4 configs) is padded for the MTP layers."""
    values = cfg.get(key, list)
    if len(values) not in (n_trunk, n_all):
        raise CheckpointError(f"config.json: {key} expected {n_all} entries (or {n_trunk}, the trunk's), got {len(values)}")
    return values + [pad] * (n_all - len(values))


def _sliding_heads(cfg: _Config) -> tuple[int, int]:
    other = _Config(cfg.get("attention_other_setting", dict))
    if (kind := other.raw("attention_type")) != _SLIDING:
        raise CheckpointError(f"config.json: attention_other_setting.attention_type expected {_SLIDING}, got {quoted(kind)}")
    if (head_dim := other.size("head_dim", default=cfg.size("head_dim"))) != cfg.size("head_dim"):
        raise CheckpointError(f"config.json: attention_other_setting.head_dim expected {cfg.size('head_dim')}, got {head_dim}")
    return other.size("num_attention_heads"), other.size("num_attention_groups")


def _moe_layers(cfg: _Config, n_trunk: int) -> frozenset[int]:
    """The MoE layers of `moe_layers_enum`: "3,4,...,44", a run that ends with the trunk."""
    text = cfg.get("moe_layers_enum", str)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
        raise CheckpointError(f"config.json: moe_layers_enum expected layer numbers with commas, got {quoted(text)}")
    layers = sorted({int(part) for part in parts})
    if layers != list(range(layers[0], n_trunk)):
        raise CheckpointError(f"config.json: moe_layers_enum expected a run that ends with layer {n_trunk - 1}, got {quoted(text)}")
    return frozenset(layers)


def _clamps(cfg: _Config, key: str, n_trunk: int, n_all: int) -> list[float]:
    if cfg.raw(key) is None:
        return [0.0] * n_all
    values = [0.0 if value is None else value for value in _per_layer(cfg, key, n_trunk, n_all, pad=0.0)]
    if not all(type(value) in (int, float) and value >= 0 for value in values):
        raise CheckpointError(f"config.json: {key} expected numbers of 0 or more, got {quoted(values)}")
    return [float(value) for value in values]


def _rope_thetas(cfg: _Config, layers: tuple[LayerShape, ...]) -> tuple[float, float]:
    n_trunk = sum(not layer.is_mtp for layer in layers)
    values = cfg.get("rope_theta", list)
    if len(values) not in (n_trunk, len(layers)) or not all(type(v) in (int, float) and v > 0 for v in values):
        raise CheckpointError(f"config.json: rope_theta expected {len(layers)} positive numbers, got {quoted(values)}")
    full = _the_one(values, [not layer.is_sliding for layer in layers], "rope_theta of the full-attention layers")
    sliding = _the_one(values, [layer.is_sliding for layer in layers], "rope_theta of the sliding layers")
    return full, sliding


def _rotary_factor_full(cfg: _Config, layers: tuple[LayerShape, ...]) -> float:
    n_trunk = sum(not layer.is_mtp for layer in layers)
    values = _per_layer(cfg, "partial_rotary_factors", n_trunk, len(layers), pad=1.0)
    want = [1.0 if layer.is_sliding else 0.5 for layer in layers]
    if values != want:
        raise CheckpointError(f"config.json: partial_rotary_factors expected 0.5 on full and 1.0 on sliding layers, got {quoted(values)}")
    return 0.5


def _the_one(values: list[Any], chosen: list[bool], what: str) -> float:
    found = {float(value) for value, keep in zip(values, chosen) if keep}
    if len(found) != 1:
        raise CheckpointError(f"config.json: {what} expected one value, got {sorted(found)}")
    return found.pop()


def _rope_scaling(cfg: _Config) -> Llama3Rope | None:
    if cfg.raw("rope_scaling") is None:
        return None
    scaling = _Config(cfg.get("rope_scaling", dict))
    if (kind := scaling.raw("rope_type")) != "llama3":
        raise CheckpointError(f"config.json: rope_scaling.rope_type expected llama3, got {quoted(kind)}")
    return Llama3Rope(
        factor=scaling.get("factor", float),
        low_freq_factor=scaling.get("low_freq_factor", float),
        high_freq_factor=scaling.get("high_freq_factor", float),
        original_context=scaling.size("original_max_position_embeddings"),
    )


def _eos_ids(cfg: _Config) -> tuple[int, ...]:
    value = cfg.raw("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    n_vocab = cfg.size("vocab_size")
    if not all(type(i) is int and 0 <= i < n_vocab for i in ids) or len(ids) > 16:
        raise CheckpointError(f"config.json: eos_token_id expected ids under {n_vocab}, got {quoted(value)}")
    return tuple(dict.fromkeys(ids))


def _fp8_block(cfg: _Config) -> tuple[int, int] | None:
    quantization = cfg.raw("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise CheckpointError(f"config.json: quantization_config.quant_method expected fp8, got {quoted(method)}; convert the bf16 or FP8 checkpoint instead")
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise CheckpointError(f"config.json: quantization_config.weight_block_size expected [128, 128], got {quoted(block)}")
    return block[0], block[1]
