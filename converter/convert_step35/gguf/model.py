"""A Step-3.5 GGUF as one model, of one file or of shards, and the architecture its metadata describes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_step35.errors import GgufError, quoted
from convert_step35.gguf.metadata import ARCH
from convert_step35.gguf.reader import GgufFile, GgufTensor, read_gguf
from convert_step35.gguf.shard_names import parse_shard_name, shard_path
from convert_step35.source.architecture import Architecture, LayerShape, Llama3Rope

# Trimmed heads: llama.cpp refuses the name, since the token ids inside are not the model's.
TRIMMED_ARCH = "step35-trimmed-heads"

# llama.cpp's own limit (LLAMA_MAX_LAYERS).
MAX_LAYERS = 512

# llama.cpp reads the divisors from rope_freqs.weight, so the file does not say what they were made of.
_UNKNOWN_ROPE = Llama3Rope(1.0, 1.0, 1.0, 1)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """All files of a model: their tensors by name, the first one's metadata, and in `homes` which has a tensor."""

    files: tuple[GgufFile, ...]
    tensors: dict[str, GgufTensor]
    homes: dict[str, Path]

    @property
    def path(self) -> Path:
        return self.files[0].path

    @property
    def metadata(self) -> dict[str, Any]:
        return self.files[0].metadata

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def has_layer(self, i: int) -> bool:
        """True where any tensor of this layer is there."""
        return any(name.startswith(f"blk.{i}.") for name in self.tensors)


def open_model(path: Path) -> GgufModel:
    """Read the headers of a GGUF and, from any shard's name, of all its shards."""
    files = tuple(read_gguf(shard) for shard in _shards(path))
    _check_split(files)
    tensors: dict[str, GgufTensor] = {}
    homes: dict[str, Path] = {}
    for file in files:
        if double := sorted(tensors.keys() & file.tensors.keys()):
            raise GgufError(
                f"duplicate tensor: {quoted(double[0])} stands in {homes[double[0]].name} and in {file.path.name}; "
                "convert again"
            )
        tensors |= file.tensors
        homes |= dict.fromkeys(file.tensors, file.path)
    return GgufModel(files, tensors, homes)


def _shards(path: Path) -> list[Path]:
    shard = parse_shard_name(path.name)
    if shard is None:
        return [path]
    if not 1 <= shard.number <= shard.count:
        raise GgufError(
            f"misnamed shard: {path} expected a number of 1 to {shard.count}, got {shard.number}; "
            "name the file as it was"
        )
    paths = [shard_path(path.with_name(shard.whole_name), i, shard.count) for i in range(shard.count)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise GgufError(
            f"missing shard: {path.parent} expected {shard.count} shards, got none named {missing[0]}; download it"
        )
    return paths


def _check_split(files: tuple[GgufFile, ...]) -> None:
    """The metadata of each file says the same number of shards as the names, and its own number."""
    for i, file in enumerate(files):
        want = (i, len(files))
        got = (file.metadata.get("split.no", 0), file.metadata.get("split.count", 1))
        # A file of one shard may leave the keys out, or count none.
        if got != want and not (len(files) == 1 and got == (0, 0)):
            raise GgufError(
                f"misnamed shard: {file.path} expected shard {want[0] + 1} of {want[1]} by its name, "
                f"got {_one_more(got[0])} of {quoted(got[1])} "
                "by its metadata; name the file as it was"
            )


def _one_more(number: Any) -> str:
    return str(number + 1) if type(number) is int else quoted(number)


def is_trimmed_heads(model: GgufModel) -> bool:
    """True for the side file that `convert-step35 mtp trim` makes: heads that know some of the tokens only."""
    return model.metadata.get("general.architecture") == TRIMMED_ARCH


def require_step35(model: GgufModel) -> None:
    """GgufError for a file of another architecture."""
    name = model.metadata.get("general.architecture")
    if name == ARCH:
        return
    hint = (
        "; it was made for StepFun's own fork of February 2026, convert the checkpoint again"
        if str(name).startswith("Step35")
        else ""
    )
    raise GgufError(f"another architecture: {model.path} expected {ARCH}, got {quoted(name)}{hint}")


class _Keys:
    """The step35.* keys with checked look-ups."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path = path
        self._metadata = metadata

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"{ARCH}.{name}", default)
        if type(value) is not kind:
            raise self.unexpected(name, kind.__name__, value)
        return value

    def each(self, name: str, kind: type, n: int, default: Any = None) -> list[Any]:
        """An array over the layers, or one value for all of them."""
        value = self._metadata.get(f"{ARCH}.{name}", default)
        values = value if isinstance(value, list) else [value] * n
        if len(values) != n:
            raise self.unexpected(name, f"{n} values", len(values))
        wrong = [v for v in values if type(v) is not kind]
        if wrong:
            raise self.unexpected(name, f"{n} values of {kind.__name__}", wrong[0])
        return values

    def unexpected(self, name: str, want: str, got: Any) -> GgufError:
        return GgufError(
            f"wrong metadata: {self._path}: {ARCH}.{name} expected {want}, got {quoted(got)}; "
            "convert the checkpoint again"
        )


def architecture_of(model: GgufModel) -> Architecture:
    """The dimensions that the metadata describes; GgufError names the first key that is missing or wrong."""
    keys = _Keys(model.path, model.metadata)
    return Architecture(
        layers=_layers(keys),
        hidden_size=keys.get("embedding_length", int),
        intermediate_size=keys.get("feed_forward_length", int),
        vocab_size=_vocab_size(model, keys),
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


def has_trunk(model: GgufModel, arch: Architecture) -> bool:
    """False for a file that holds nothing but MTP heads."""
    return any(model.has_layer(i) for i in range(arch.n_trunk))


def has_mtp(model: GgufModel, arch: Architecture) -> bool:
    """True for a file that holds any of the MTP heads it declares."""
    return any(model.has_layer(i) for i in range(arch.n_trunk, len(arch.layers)))


def _vocab_size(model: GgufModel, keys: _Keys) -> int:
    if is_trimmed_heads(model):
        return keys.get("vocab_size", int)
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise GgufError(
            f"wrong metadata: {model.path}: tokenizer.ggml.tokens expected a list of texts, got {quoted(tokens)}; "
            "convert the checkpoint again"
        )
    return len(tokens)


def _layers(keys: _Keys) -> tuple[LayerShape, ...]:
    n, n_mtp = keys.get("block_count", int), keys.get("nextn_predict_layers", int, 0)
    n_dense = keys.get("leading_dense_block_count", int)
    if not 0 < n <= MAX_LAYERS:
        raise keys.unexpected("block_count", f"1 to {MAX_LAYERS}", n)
    if not 0 <= n_mtp < n:
        raise keys.unexpected("nextn_predict_layers", f"less than block_count, {n}", n_mtp)
    if not 0 <= n_dense < n - n_mtp:
        raise keys.unexpected("leading_dense_block_count", f"less than the trunk's {n - n_mtp} layers", n_dense)
    columns = (
        keys.each("attention.sliding_window_pattern", bool, n),
        keys.each("attention.head_count", int, n),
        keys.each("attention.head_count_kv", int, n),
        keys.each("swiglu_clamp_exp", float, n, default=0.0),
        keys.each("swiglu_clamp_shexp", float, n, default=0.0),
    )
    return tuple(
        LayerShape(sliding, n_dense <= i < n - n_mtp, i >= n - n_mtp, heads, kv_heads, routed, shared)
        for i, (sliding, heads, kv_heads, routed, shared) in enumerate(zip(*columns, strict=True))
    )
