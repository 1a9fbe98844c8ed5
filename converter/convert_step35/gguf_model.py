"""A Step-3.5 GGUF as one model, of one file or of shards, and the architecture its metadata describes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_step35.architecture import Architecture, LayerShape, Llama3Rope
from convert_step35.errors import GgufError
from convert_step35.gguf_reader import GgufFile, GgufTensor, read_gguf
from convert_step35.metadata import ARCH
from convert_step35.plan import shard_path

_SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")

# llama.cpp reads the divisors from rope_freqs.weight, so the file does not say what they were made of.
_UNKNOWN_ROPE = Llama3Rope(1.0, 1.0, 1.0, 1)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """All files of a model; `metadata` is the first file's."""

    files: tuple[GgufFile, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.files[0].metadata

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def file_of(self, name: str) -> GgufFile:
        return next(file for file in self.files if name in file.tensors)


def open_model(path: Path) -> GgufModel:
    """Read the headers of a GGUF and, from any shard's name, of all its shards."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return GgufModel((read_gguf(path),))
    count = int(match["count"])
    paths = [shard_path(path.with_name(match["stem"] + ".gguf"), i, count) for i in range(count)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise GgufError(f"missing shard: {path.parent} expected {count} shards, got none named {missing[0]}; download it")
    return GgufModel(tuple(read_gguf(p) for p in paths))


class _Keys:
    """The step35.* keys with checked look-ups."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"{ARCH}.{name}", default)
        if type(value) is not kind:
            raise GgufError(f"metadata: {ARCH}.{name} expected {kind.__name__}, got {value!r}")
        return value

    def each(self, name: str, kind: type, n: int) -> list[Any]:
        """An array over the layers, or one value for all of them."""
        value = self._metadata.get(f"{ARCH}.{name}")
        values = value if isinstance(value, list) else [value] * n
        if len(values) != n or not all(type(v) is kind for v in values):
            raise GgufError(f"metadata: {ARCH}.{name} expected {n} values of {kind.__name__}, got {str(value)[:80]}")
        return values


def architecture_of(model: GgufModel) -> Architecture:
    """The dimensions that the metadata describes; GgufError names the first key that is missing or wrong."""
    keys = _Keys(model.metadata)
    return Architecture(
        layers=_layers(keys),
        hidden_size=keys.get("embedding_length", int),
        intermediate_size=keys.get("feed_forward_length", int),
        vocab_size=len(model.metadata.get("tokenizer.ggml.tokens", [])),
        head_dim=keys.get("attention.key_length", int),
        sliding_window=keys.get("attention.sliding_window", int),
        context_length=keys.get("context_length", int),
        rms_norm_eps=keys.get("attention.layer_norm_rms_epsilon", float),
        rope_theta_full=keys.get("rope.freq_base", float),
        rope_theta_sliding=keys.get("rope.freq_base_swa", float),
        rotary_factor_full=0.5,
        rope_scaling=_UNKNOWN_ROPE if "rope_freqs.weight" in model.tensors else None,
        n_experts=keys.get("expert_count", int),
        n_experts_used=keys.get("expert_used_count", int),
        moe_intermediate_size=keys.get("expert_feed_forward_length", int),
        share_expert_dim=keys.get("expert_shared_feed_forward_length", int),
        router_scaling_factor=keys.get("expert_weights_scale", float),
        norm_expert_weight=keys.get("expert_weights_norm", bool),
        eos_token_ids=(),
        fp8_block=None,
        has_vision=False,
    )


def _layers(keys: _Keys) -> tuple[LayerShape, ...]:
    n, n_mtp = keys.get("block_count", int), keys.get("nextn_predict_layers", int, 0)
    n_dense = keys.get("leading_dense_block_count", int)
    if not 0 <= n_mtp < n or not 0 <= n_dense < n - n_mtp:
        raise GgufError(f"metadata: {ARCH}.block_count {n} does not fit {n_dense} dense and {n_mtp} MTP layers")
    columns = (
        keys.each("attention.sliding_window_pattern", bool, n),
        keys.each("attention.head_count", int, n),
        keys.each("attention.head_count_kv", int, n),
        keys.each("swiglu_clamp_exp", float, n),
        keys.each("swiglu_clamp_shexp", float, n),
    )
    return tuple(
        LayerShape(sliding, n_dense <= i < n - n_mtp, i >= n - n_mtp, heads, kv_heads, routed, shared)
        for i, (sliding, heads, kv_heads, routed, shared) in enumerate(zip(*columns))
    )
