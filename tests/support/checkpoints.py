"""Step checkpoints in the original format: small random ones, and sparse ones of the real shapes.

`write_checkpoint` makes a folder as a publisher would: config.json, sharded safetensors with an
index, and the bundled checkpoint's tokenizer files. A sparse one has exact headers over holes, so
the 399 GB of the real model take a few kilobytes of disk.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

BUNDLED = Path(__file__).parents[1] / "data" / "tiny-step35"
FP8_BLOCK = 128
MAX_CHUNK = 1 << 23  # weights generated at a time: a 3 GB tensor must not need 3 GB of memory
N_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a checkpoint, under config.json's names where it has one."""

    num_hidden_layers: int = 6
    num_nextn_predict_layers: int = 3
    hidden_size: int = 256
    intermediate_size: int = 768
    num_attention_heads: int = 4
    num_sliding_heads: int = 8
    num_attention_groups: int = 2
    head_dim: int = 64
    sliding_window: int = 64
    first_moe_layer: int = 3
    moe_num_experts: int = 8
    moe_top_k: int = 2
    moe_intermediate_size: int = 256
    share_expert_dim: int = 256
    vocab_size: int = 2048
    max_position_embeddings: int = 262144

    @property
    def n_layers(self) -> int:
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_mtp(self, layer: int) -> bool:
        return layer >= self.num_hidden_layers

    def is_sliding(self, layer: int) -> bool:
        return layer % 4 != 0 or self.is_mtp(layer)

    def is_moe(self, layer: int) -> bool:
        return self.first_moe_layer <= layer < self.num_hidden_layers

    def n_heads(self, layer: int) -> int:
        return self.num_sliding_heads if self.is_sliding(layer) else self.num_attention_heads


TINY = Shape()
REAL = Shape(
    num_hidden_layers=45,
    hidden_size=4096,
    intermediate_size=11264,
    num_attention_heads=64,
    num_sliding_heads=96,
    num_attention_groups=8,
    head_dim=128,
    sliding_window=512,
    moe_num_experts=288,
    moe_top_k=8,
    moe_intermediate_size=1280,
    share_expert_dim=1280,
    vocab_size=128896,
)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file; `chunks` yields its data in order, None leaves a hole."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]] | None = None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * N_BYTES[self.dtype]


# config.json


def config(shape: Shape, *, eos: list[int], list_length: int | None = None) -> dict[str, object]:
    """Returns config.json of Step-3.5-Flash's schema; `list_length` cuts the per-layer lists."""
    layers = range(shape.n_layers)[:list_length]
    sliding = [shape.is_sliding(i) for i in layers]
    clamped = {shape.num_hidden_layers - 2, shape.num_hidden_layers - 1}
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_step3p5.Step3p5Config",
            "AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM",
        },
        "model_type": "step3p5",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_nextn_predict_layers": shape.num_nextn_predict_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_attention_groups": shape.num_attention_groups,
        "head_dim": shape.head_dim,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": shape.num_sliding_heads,
            "num_attention_groups": shape.num_attention_groups,
            "head_dim": shape.head_dim,
            "true_head_dim": shape.head_dim,
        },
        "att_impl_type": "GQA",
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "sink": False,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": shape.sliding_window,
        "rope_theta": [10000.0 if s else 5000000.0 for s in sliding],
        "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "max_seq_len": shape.max_position_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "use_moe": True,
        "moe_layers_enum": ",".join(str(i) for i in range(shape.n_layers) if shape.is_moe(i)),
        "moe_num_experts": shape.moe_num_experts,
        "moe_top_k": shape.moe_top_k,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "share_expert_dim": shape.share_expert_dim,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "swiglu_limits": [7 if i in clamped else 0.0 for i in layers],
        "swiglu_limits_shared": [16 if i in clamped else 0.0 for i in layers],
        "zero_centered": True,
        "vocab_size": shape.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": eos,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def fp8_settings() -> dict[str, object]:
    """Returns config.json's `quantization_config` of the FP8 releases."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def step37_config(text: dict[str, object]) -> dict[str, object]:
    """Wraps a text config as Step-3.7-Flash does (`use_qk_norm` false although q/k norms exist)."""
    text = {k: v for k, v in text.items() if k not in ("zero_centered", "auto_map")}
    top = {"quantization_config": text.pop("quantization_config")} if "quantization_config" in text else {}
    return top | {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "text_config": text | {"use_qk_norm": False},
        "vision_config": {"model_type": "perception_encoder", "width": 64, "layers": 2, "heads": 4},
        "image_token_id": 128001,
        "understand_projector_stride": 2,
        "projector_bias": False,
    }


# tensors


def layer_shapes(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    """Returns the names under `model.layers.N.` and shapes of one layer, in checkpoint order."""
    d, hd = shape.hidden_size, shape.head_dim
    q, kv = shape.n_heads(layer) * hd, shape.num_attention_groups * hd
    attention = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "self_attn.g_proj.weight": (shape.n_heads(layer), d),
        "self_attn.q_norm.weight": (hd,),
        "self_attn.k_norm.weight": (hd,),
    }
    if shape.is_moe(layer):
        return attention | _moe_shapes(shape)
    dense = attention | _mlp_shapes("mlp", shape.intermediate_size, d)
    return dense | _mtp_shapes(shape) if shape.is_mtp(layer) else dense


def _mlp_shapes(prefix: str, width: int, d: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, d),
        f"{prefix}.up_proj.weight": (width, d),
        f"{prefix}.down_proj.weight": (d, width),
    }


def _moe_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    n, width, d = shape.moe_num_experts, shape.moe_intermediate_size, shape.hidden_size
    return {
        "moe.gate.weight": (n, d),
        "moe.router_bias": (n,),
        "moe.gate_proj.weight": (n, width, d),
        "moe.up_proj.weight": (n, width, d),
        "moe.down_proj.weight": (n, d, width),
    } | _mlp_shapes("share_expert", shape.share_expert_dim, d)


def _mtp_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    d = shape.hidden_size
    return {
        "enorm.weight": (d,),
        "hnorm.weight": (d,),
        "eh_proj.weight": (d, 2 * d),
        "transformer.shared_head.norm.weight": (d,),
        "transformer.shared_head.output.weight": (shape.vocab_size, d),
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Returns every tensor's original name and shape."""
    d, v = shape.hidden_size, shape.vocab_size
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for layer in range(shape.n_layers):
        shapes |= {f"model.layers.{layer}.{k}": s for k, s in layer_shapes(shape, layer).items()}
    return shapes


def vision_shapes() -> dict[str, tuple[int, ...]]:
    """Returns a few of Step-3.7's vision tensors, small: a text converter has to skip them."""
    w = 64
    block = {
        "attn.in_proj_weight": (3 * w, w),
        "attn.in_proj_bias": (3 * w,),
        "attn.out_proj.weight": (w, w),
        "ln_1.weight": (w,),
        "ls_1.gamma": (w,),
        "mlp.c_fc.weight": (4 * w, w),
        "mlp.c_proj.weight": (w, 4 * w),
    }
    return {
        "vision_model.conv1.weight": (w, 3, 14, 14),
        "vision_model.positional_embedding": (16, w),
        "vision_model.vit_downsampler1.weight": (2 * w, w, 3, 3),
        "vision_model.vit_downsampler1.bias": (2 * w,),
        "vit_large_projector.weight": (w, 4 * w),
    } | {f"vision_model.transformer.resblocks.{i}.{k}": s for i in range(2) for k, s in block.items()}


def is_expert_stack(name: str) -> bool:
    """Asks whether a tensor is one the FP8 releases store in FP8."""
    return ".moe." in name and name.endswith("_proj.weight")


def _chunk_shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    row = math.prod(shape[1:])
    step = max(1, MAX_CHUNK // row)
    for start in range(0, shape[0], step):
        yield (min(step, shape[0] - start), *shape[1:])


def random_weights(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Yields a tensor's float32 weights in chunks of rows, the same for the same name and seed."""
    rng = np.random.Generator(np.random.SFC64([seed, crc32(name.encode())]))
    scale = np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
    for chunk in _chunk_shapes(shape):
        yield rng.standard_normal(chunk, dtype=np.float32) * scale


def encode(weights: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float32 to F32, F16 or BF16, ties to even; BF16 comes back as its bits in uint16."""
    if dtype != "BF16":
        return weights.astype({"F32": np.float32, "F16": np.float16}[dtype])
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _random(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> Stored:
    return Stored(dtype, shape, lambda: (encode(w, dtype) for w in random_weights(name, shape, seed)))


# FP8: e4m3 codes with one float32 factor for each 128x128 block


def e4m3_values() -> np.ndarray:
    """Returns what the 127 finite non-negative e4m3fn codes stand for, ascending."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, (code & 7) / 8
    return np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))


def to_fp8(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds to e4m3 codes (uint8) and `weight_scale_inv` (float32, to be multiplied), per block."""
    factor = _block_maxima(weights) / np.float32(448)
    rows, columns = weights.shape[-2:]
    spread = factor.repeat(FP8_BLOCK, -2).repeat(FP8_BLOCK, -1)[..., :rows, :columns]
    values = e4m3_values()
    codes = np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(weights / spread))
    return (codes | np.signbit(weights) << 7).astype(np.uint8), factor


def _block_maxima(weights: np.ndarray) -> np.ndarray:
    edges = [(0, 0)] * (weights.ndim - 2) + [(0, -n % FP8_BLOCK) for n in weights.shape[-2:]]
    padded = np.pad(np.abs(weights), edges)
    *lead, rows, columns = padded.shape
    blocks = padded.reshape(*lead, rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    return blocks.max(axis=(-3, -1))


def _fp8_pair(name: str, shape: tuple[int, ...], seed: int) -> dict[str, Stored]:
    def part(index: int) -> Iterator[np.ndarray]:
        yield to_fp8(np.concatenate(list(random_weights(name, shape, seed))))[index]

    blocks = tuple(-(-n // FP8_BLOCK) for n in shape[-2:])
    return {
        name: Stored("F8_E4M3", shape, lambda: part(0)),
        f"{name}_scale_inv": Stored("F32", (*shape[:-2], *blocks), lambda: part(1)),
    }


# the folder


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: str = "BF16", fp8_experts: bool = False, seed: int = 0
) -> dict[str, Stored]:
    """Returns random tensors of `dtype`; the router bias is F32 in every release."""
    tensors: dict[str, Stored] = {}
    for name, shape in shapes.items():
        if fp8_experts and is_expert_stack(name):
            tensors |= _fp8_pair(name, shape, seed)
        else:
            tensors[name] = _random(name, shape, "F32" if name.endswith("router_bias") else dtype, seed)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes one safetensors file; a tensor without data becomes a hole of the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.n_bytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            _write_data(file, tensor)
        file.truncate()


def _write_data(file: BinaryIO, tensor: Stored) -> None:
    if tensor.chunks is None:
        file.seek(tensor.n_bytes, 1)
        return
    file.writelines(np.ascontiguousarray(chunk).data.cast("B") for chunk in tensor.chunks())


def shard_of(name: str, shape: Shape, n_shards: int) -> int:
    """Returns a tensor's shard: the trunk in layer order, the MTP layers in the first two shards.

    The real release has them so: of the MTP only the first head's norm is in shard 1.
    """
    if not name.startswith("model.layers."):
        return 0 if name.startswith("model.embed") else n_shards - 1
    layer = int(name.split(".")[2])
    if not shape.is_mtp(layer):
        return layer * n_shards // shape.num_hidden_layers
    first = layer == shape.num_hidden_layers and name.endswith("shared_head.norm.weight")
    return 0 if first else min(1, n_shards - 1)


def write_checkpoint(
    folder: Path,
    shape: Shape = TINY,
    *,
    dtype: str = "BF16",
    fp8_experts: bool = False,
    step37: bool = False,
    truncated_lists: bool = False,
    mtp_weights: bool = True,
    sparse: bool = False,
    n_shards: int = 2,
    seed: int = 0,
    without: tuple[str, ...] = (),
    changed: Mapping[str, tuple[int, ...]] = {},
    tokenizer: Path = BUNDLED,
) -> Path:
    """Writes a checkpoint folder and returns it; one shard means model.safetensors and no index.

    Args:
        mtp_weights: False for a release that declares MTP layers and ships none. One that does not
            declare them either has `num_nextn_predict_layers=0` in its shape.
        truncated_lists: cuts config.json's per-layer lists to the trunk.
        without, changed: tensors to leave out; tensors to add or to give another shape.
        sparse: writes headers only, over holes.
    """
    shapes = tensor_shapes(shape) | (vision_shapes() if step37 else {}) | dict(changed)
    dropped = set(without) | ({n for n in shapes if not mtp_weights and _is_mtp_name(n, shape)})
    tensors = random_tensors(
        {n: s for n, s in shapes.items() if n not in dropped}, dtype=dtype, fp8_experts=fp8_experts, seed=seed
    )
    if sparse:
        tensors = {n: Stored(t.dtype, t.shape) for n, t in tensors.items()}
    list_length = shape.num_hidden_layers if truncated_lists else None
    settings = config(shape, eos=eos_ids(tokenizer), list_length=list_length)
    if fp8_experts:
        settings["quantization_config"] = fp8_settings()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(step37_config(settings) if step37 else settings, indent=2))
    copy_tokenizer(tokenizer, folder)
    write_shards(folder, tensors, lambda name: shard_of(name, shape, n_shards), n_shards)
    return folder


def _is_mtp_name(name: str, shape: Shape) -> bool:
    return name.startswith("model.layers.") and shape.is_mtp(int(name.split(".")[2]))


def eos_ids(tokenizer: Path) -> list[int]:
    """Returns the ids that end a generation in the checkpoint whose tokenizer is taken."""
    return json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))["eos_token_id"]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies tokenizer, chat template and generation settings of another checkpoint."""
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)


def write_shards(folder: Path, tensors: Mapping[str, Stored], shard_index: Callable[[str], int], n_shards: int) -> None:
    """Writes the weights in `n_shards` files and their index."""
    if n_shards == 1:
        return write_safetensors(folder / "model.safetensors", tensors)
    files = [f"model-{i + 1:05d}.safetensors" for i in range(n_shards)]
    weight_map = {name: files[shard_index(name)] for name in tensors}
    for file in files:
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
    total = sum(t.n_bytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
