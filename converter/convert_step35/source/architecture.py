"""The shape of a Step-3.5 model, read from config.json as data and checked key by key."""

from dataclasses import dataclass
from typing import Any

from convert_step35.errors import CheckpointError, quoted

ARCHITECTURES = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MAX_NUMBER = 1e30
_MAX_VOCAB = 1_000_000

# The values that llama.cpp's step35 graph has built in: any other is another model.
_BUILT_IN = {
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
    """An object of config.json with checked look-ups; `where` leads to it."""

    def __init__(self, data: dict[str, Any], where: str = "") -> None:
        self._data = data
        self._where = where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(
                f"config.json: {self._where}{key} is missing, expected {_a(kind)}; this is no Step-3.5 config"
            )
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.unexpected(key, _a(kind), value)
        return value

    def size(self, key: str, most: int = 2**31 - 1, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if not 0 < value <= most:
            raise self.unexpected(key, f"1 to {most}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number that a float32 holds."""
        value = self.get(key, float, default)
        if not _is_positive(value):
            raise self.unexpected(key, "a positive number", value)
        return value

    def inner(self, key: str) -> "_Config":
        return _Config(self.get(key, dict), f"{self._where}{key}.")

    def raw(self, key: str) -> Any:
        return self._data.get(key)

    def unexpected(self, key: str, want: str, got: Any, advice: str = "") -> CheckpointError:
        return CheckpointError(f"config.json: {self._where}{key} expected {want}, got {quoted(got)}{advice}")


def _is_positive(value: Any) -> bool:
    """True for a positive number well inside float32's range."""
    return type(value) in (int, float) and 1e-30 <= value <= _MAX_NUMBER


def _text_part(config: dict[str, Any]) -> _Config:
    """The keys of a Step-3.7 config's text part override the outer ones."""
    text = config.get("text_config", {})
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config expected an object, got {quoted(text)}")
    return _Config({**config, **text})


def _a(kind: type) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
        bool: "true or false",
    }
    return names[kind]


def read_architecture(config: dict[str, Any]) -> Architecture:
    """Check a parsed config.json of Step-3.5 (or 3.7) and return its dimensions; CheckpointError names the key."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"config.json: architectures expected one of {list(ARCHITECTURES)}, got {quoted(names)}; "
            "only Step-3.5 and 3.7 convert here"
        )
    cfg = _text_part(config)
    _check_built_in(cfg)
    layers = _layers(cfg)
    theta_full, theta_sliding = _rope_thetas(cfg, layers)
    return Architecture(
        layers=layers,
        hidden_size=cfg.size("hidden_size"),
        intermediate_size=cfg.size("intermediate_size"),
        vocab_size=cfg.size("vocab_size", most=_MAX_VOCAB),
        head_dim=cfg.size("head_dim"),
        sliding_window=cfg.size("sliding_window"),
        context_length=cfg.size("max_position_embeddings"),
        rms_norm_eps=cfg.number("rms_norm_eps", default=1e-5),
        rope_theta_full=theta_full,
        rope_theta_sliding=theta_sliding,
        rotary_factor_full=_rotary_factor_full(cfg, layers),
        rope_scaling=_rope_scaling(cfg),
        n_experts=cfg.size("moe_num_experts"),
        n_experts_used=cfg.size("moe_top_k", most=cfg.size("moe_num_experts")),
        moe_intermediate_size=cfg.size("moe_intermediate_size"),
        share_expert_dim=cfg.size("share_expert_dim"),
        router_scaling_factor=cfg.number("moe_router_scaling_factor"),
        norm_expert_weight=cfg.get("norm_expert_weight", bool),
        eos_token_ids=_eos_ids(cfg),
        fp8_block=_fp8_block(cfg),
        has_vision=isinstance(config.get("vision_config"), dict),
    )


def _check_built_in(cfg: _Config) -> None:
    for key, want in _BUILT_IN.items():
        got = cfg.raw(key)
        if got is not None and (type(got) is not type(want) or got != want):
            raise cfg.unexpected(key, repr(want), got, "; llama.cpp's step35 graph has no such variant")


def _layers(cfg: _Config) -> tuple[LayerShape, ...]:
    n_trunk, n_mtp = cfg.size("num_hidden_layers", most=512), _count(cfg, "num_nextn_predict_layers", most=16)
    n_all = n_trunk + n_mtp
    kinds = _per_layer(cfg, "layer_types", n_trunk, n_all, pad=_SLIDING)
    for i, kind in enumerate(kinds):
        if kind not in (_FULL, _SLIDING):
            raise cfg.unexpected(f"layer_types[{i}]", f"{_FULL} or {_SLIDING}", kind)
    heads = {_FULL: _heads(cfg), _SLIDING: _sliding_heads(cfg)}
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
        raise cfg.unexpected(key, f"0 to {most}", value)
    return value


def _per_layer(cfg: _Config, key: str, n_trunk: int, n_all: int, pad: Any) -> list[Any]:
    """A list over the layers; one cut to the trunk (the NVFP4 configs) is padded for the MTP layers."""
    values = cfg.get(key, list)
    if len(values) not in (n_trunk, n_all):
        raise CheckpointError(
            f"config.json: {key} expected {n_all} entries (or {n_trunk}, the trunk's), got {len(values)}"
        )
    return values + [pad] * (n_all - len(values))


def _sliding_heads(cfg: _Config) -> tuple[int, int]:
    other = cfg.inner("attention_other_setting")
    if (kind := other.raw("attention_type")) != _SLIDING:
        raise other.unexpected("attention_type", _SLIDING, kind)
    if (head_dim := other.size("head_dim", default=cfg.size("head_dim"))) != cfg.size("head_dim"):
        raise other.unexpected("head_dim", str(cfg.size("head_dim")), head_dim)
    return _heads(other)


def _heads(cfg: _Config) -> tuple[int, int]:
    """Query heads and KV heads; every KV head serves the same number of query heads."""
    n_heads, n_kv_heads = cfg.size("num_attention_heads"), cfg.size("num_attention_groups")
    if n_heads % n_kv_heads:
        raise cfg.unexpected("num_attention_heads", f"a multiple of num_attention_groups, {n_kv_heads}", n_heads)
    return n_heads, n_kv_heads


def _moe_layers(cfg: _Config, n_trunk: int) -> frozenset[int]:
    """The MoE layers of `moe_layers_enum`: "3,4,...,44", a run that ends with the trunk."""
    text = cfg.get("moe_layers_enum", str)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
        raise cfg.unexpected("moe_layers_enum", "layer numbers with commas", text)
    layers = sorted({int(part) for part in parts})
    if layers != list(range(layers[0], n_trunk)):
        raise cfg.unexpected("moe_layers_enum", f"a run that ends with layer {n_trunk - 1}", text)
    return frozenset(layers)


def _clamps(cfg: _Config, key: str, n_trunk: int, n_all: int) -> list[float]:
    if cfg.raw(key) is None:
        return [0.0] * n_all
    values = [0.0 if value is None else value for value in _per_layer(cfg, key, n_trunk, n_all, pad=0.0)]
    for i, value in enumerate(values):
        if value != 0 and not _is_positive(value):
            raise cfg.unexpected(f"{key}[{i}]", "a number of 0 or more", value)
    return [float(value) for value in values]


def _rope_thetas(cfg: _Config, layers: tuple[LayerShape, ...]) -> tuple[float, float]:
    values = cfg.get("rope_theta", list)
    n_trunk = sum(not layer.is_mtp for layer in layers)
    if len(values) not in (n_trunk, len(layers)) or not all(map(_is_positive, values)):
        raise cfg.unexpected("rope_theta", f"{len(layers)} positive numbers (or {n_trunk}, the trunk's)", values)
    full = _the_one(values, [not layer.is_sliding for layer in layers], "full-attention")
    return full, _the_one(values, [layer.is_sliding for layer in layers], "sliding")


def _rotary_factor_full(cfg: _Config, layers: tuple[LayerShape, ...]) -> float:
    n_trunk = sum(not layer.is_mtp for layer in layers)
    values = _per_layer(cfg, "partial_rotary_factors", n_trunk, len(layers), pad=1.0)
    for i, (got, layer) in enumerate(zip(values, layers, strict=True)):
        want = 1.0 if layer.is_sliding else 0.5
        if got != want:
            kind = "sliding" if layer.is_sliding else "full-attention"
            raise cfg.unexpected(f"partial_rotary_factors[{i}]", f"{want} on a {kind} layer", got)
    return 0.5


def _the_one(values: list[Any], chosen: list[bool], kind: str) -> float:
    found = {float(value) for value, keep in zip(values, chosen, strict=False) if keep}
    if len(found) != 1:
        raise CheckpointError(
            f"config.json: rope_theta expected one value for all {kind} layers, got {quoted(sorted(found))}"
        )
    return found.pop()


def _rope_scaling(cfg: _Config) -> Llama3Rope | None:
    if cfg.raw("rope_scaling") is None:
        return None
    scaling = cfg.inner("rope_scaling")
    if (kind := scaling.raw("rope_type")) != "llama3":
        raise scaling.unexpected("rope_type", "llama3", kind)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.unexpected("low_freq_factor", f"less than high_freq_factor, {high}", low)
    return Llama3Rope(
        factor=scaling.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=scaling.size("original_max_position_embeddings"),
    )


def _eos_ids(cfg: _Config) -> tuple[int, ...]:
    value = cfg.raw("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    n_vocab = cfg.size("vocab_size")
    if not all(type(i) is int and 0 <= i < n_vocab for i in ids) or len(ids) > 16:
        raise cfg.unexpected("eos_token_id", f"at most 16 ids under {n_vocab}", value)
    return tuple(dict.fromkeys(ids))


def _fp8_block(cfg: _Config) -> tuple[int, int] | None:
    if cfg.raw("quantization_config") is None:
        return None
    quantization = cfg.inner("quantization_config")
    if (method := quantization.raw("quant_method")) != "fp8":
        raise quantization.unexpected("quant_method", "fp8", method, "; convert the bf16 or the FP8 checkpoint instead")
    block = quantization.raw("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise quantization.unexpected("weight_block_size", "two block sizes such as [128, 128]", block)
    return block[0], block[1]
