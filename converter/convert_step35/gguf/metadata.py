"""The metadata keys of a GGUF file for the step35 architecture: the contract of docs/gguf.md."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import GGUFValueType as V
from gguf import Keys, LlamaFileType

from convert_step35.errors import CheckpointError, quoted
from convert_step35.gguf.header import Entry
from convert_step35.source.architecture import Architecture, LayerShape
from convert_step35.source.mapping import MappedTensor
from convert_step35.source.tokenizer import PRE_TOKENIZER, Tokenizer

ARCH = "step35"
_SIGMOID = int(gguf.ExpertGatingFuncType.SIGMOID)

# generation_config.json's names and the general.sampling keys that llama.cpp reads.
_SAMPLING = {
    "top_k": (Keys.General.SAMPLING_TOP_K, V.INT32),
    "top_p": (Keys.General.SAMPLING_TOP_P, V.FLOAT32),
    "min_p": (Keys.General.SAMPLING_MIN_P, V.FLOAT32),
    "temperature": (Keys.General.SAMPLING_TEMP, V.FLOAT32),
    "repetition_penalty": (Keys.General.SAMPLING_PENALTY_REPEAT, V.FLOAT32),
}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a file comes from: the same input and command give the same text, so no dates."""

    title: str
    license: str | None
    source: str
    source_sha256: str
    recipe: str
    version: str
    imatrix: tuple[Entry, ...] = ()


def build_metadata(
    arch: Architecture,
    tokenizer: Tokenizer,
    tensors: Iterable[MappedTensor],
    *,
    with_mtp: bool,
    ftype: LlamaFileType,
    generation: dict[str, Any],
    provenance: Provenance,
) -> tuple[Entry, ...]:
    """Every key of one file, in file order; arrays run over the trunk and, `with_mtp`, over the MTP layers."""
    layers = arch.layers if with_mtp else arch.trunk
    general = _general(tensors, ftype, generation, provenance)
    return (*general, *_model(arch, layers), *_tokenizer(tokenizer), *_provenance(provenance))


def _text(key: str, value: str) -> Entry:
    return Entry(key, V.STRING, value)


def _u32(key: str, value: int) -> Entry:
    return Entry(key, V.UINT32, value)


def _f32(key: str, value: float) -> Entry:
    return Entry(key, V.FLOAT32, value)


def _general(
    tensors: Iterable[MappedTensor], ftype: LlamaFileType, generation: dict[str, Any], provenance: Provenance
) -> Iterator[Entry]:
    yield _text(Keys.General.ARCHITECTURE, ARCH)
    yield _text(Keys.General.TYPE, gguf.GGUFType.MODEL)
    yield from _sampling(generation)
    yield _text(Keys.General.NAME, provenance.title)
    yield _text(Keys.General.SIZE_LABEL, size_label(tensors))
    if provenance.license is not None:
        yield _text(Keys.General.LICENSE, provenance.license)
    yield _u32(Keys.General.FILE_TYPE, int(ftype))
    yield _u32(Keys.General.QUANTIZATION_VERSION, gguf.GGML_QUANT_VERSION)


def _sampling(generation: dict[str, Any]) -> Iterator[Entry]:
    """The settings that generation_config.json has; null is none."""
    for name, (key, kind) in _SAMPLING.items():
        value = generation.get(name)
        if value is None:
            continue
        wanted = (int,) if kind is V.INT32 else (int, float)
        if type(value) not in wanted or not -1 <= value < 2**31:
            raise CheckpointError(
                f"generation_config.json: {name} expected a {'whole ' if kind is V.INT32 else ''}number of -1 or "
                f"more, got {quoted(value)}"
            )
        yield Entry(key, kind, value if kind is V.INT32 else float(value))


def size_label(tensors: Iterable[MappedTensor]) -> str:
    """Upstream's size label, such as 288x4.6B: experts, and the weights that one expert's model would have."""
    shared = experts = total = 0
    counts = []
    for tensor in tensors:
        n = math.prod(tensor.shape)
        total += n
        if "_exps." in tensor.name:
            counts.append(tensor.shape[0])
            experts += n // tensor.shape[0]
        else:
            shared += n
    return gguf.size_label(total, shared, experts, sum(counts) // len(counts) if counts else 0)


def _key(template: str) -> str:
    return template.format(arch=ARCH)


def _model(arch: Architecture, layers: tuple[LayerShape, ...]) -> Iterator[Entry]:
    llm, attention, rope = Keys.LLM, Keys.Attention, Keys.Rope
    yield _u32(_key(llm.BLOCK_COUNT), len(layers))
    yield _u32(_key(llm.CONTEXT_LENGTH), arch.context_length)
    yield _u32(_key(llm.EMBEDDING_LENGTH), arch.hidden_size)
    yield _u32(_key(llm.FEED_FORWARD_LENGTH), arch.intermediate_size)
    yield Entry(_key(attention.HEAD_COUNT), V.INT32, tuple(layer.n_heads for layer in layers))
    yield Entry(_key(attention.HEAD_COUNT_KV), V.INT32, tuple(layer.n_kv_heads for layer in layers))
    yield _u32(_key(attention.KEY_LENGTH), arch.head_dim)
    yield _u32(_key(attention.VALUE_LENGTH), arch.head_dim)
    yield _f32(_key(attention.LAYERNORM_RMS_EPS), arch.rms_norm_eps)
    yield _u32(_key(attention.SLIDING_WINDOW), arch.sliding_window)
    yield Entry(_key(attention.SLIDING_WINDOW_PATTERN), V.BOOL, tuple(layer.is_sliding for layer in layers))
    # No rope.dimension_count: the loader halves it for the full layers, and any written value breaks both kinds.
    yield _f32(_key(rope.FREQ_BASE), arch.rope_theta_full)
    yield _f32(_key(rope.FREQ_BASE_SWA), arch.rope_theta_sliding)
    yield from _experts(arch, layers)
    if n_mtp := sum(layer.is_mtp for layer in layers):
        yield _u32(_key(llm.NEXTN_PREDICT_LAYERS), n_mtp)


def _experts(arch: Architecture, layers: tuple[LayerShape, ...]) -> Iterator[Entry]:
    llm = Keys.LLM
    yield _u32(_key(llm.EXPERT_COUNT), arch.n_experts)
    yield _u32(_key(llm.EXPERT_USED_COUNT), arch.n_experts_used)
    yield _u32(_key(llm.EXPERT_FEED_FORWARD_LENGTH), arch.moe_intermediate_size)
    yield _u32(_key(llm.EXPERT_SHARED_FEED_FORWARD_LENGTH), arch.share_expert_dim)
    yield _f32(_key(llm.EXPERT_WEIGHTS_SCALE), arch.router_scaling_factor)
    yield Entry(_key(llm.EXPERT_WEIGHTS_NORM), V.BOOL, arch.norm_expert_weight)
    yield _u32(_key(llm.EXPERT_GATING_FUNC), _SIGMOID)
    yield _u32(_key(llm.LEADING_DENSE_BLOCK_COUNT), arch.n_leading_dense)
    yield _u32(_key(llm.MOE_EVERY_N_LAYERS), 1)
    yield Entry(_key(llm.SWIGLU_CLAMP_EXP), V.FLOAT32, tuple(layer.clamp_routed for layer in layers))
    yield Entry(_key(llm.SWIGLU_CLAMP_SHEXP), V.FLOAT32, tuple(layer.clamp_shared for layer in layers))


_SPECIAL_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
_ADD_KEYS = {"bos": Keys.Tokenizer.ADD_BOS, "eos": Keys.Tokenizer.ADD_EOS, "sep": Keys.Tokenizer.ADD_SEP}


def _tokenizer(tokenizer: Tokenizer) -> Iterator[Entry]:
    names = Keys.Tokenizer
    yield _text(names.MODEL, "gpt2")
    yield _text(names.PRE, PRE_TOKENIZER)
    yield Entry(names.LIST, V.STRING, tokenizer.tokens)
    yield Entry(names.TOKEN_TYPE, V.INT32, tokenizer.types)
    yield Entry(names.MERGES, V.STRING, tokenizer.merges)
    for name, key in _SPECIAL_KEYS.items():
        if name in tokenizer.special_ids:
            yield _u32(key, tokenizer.special_ids[name])
    for name, key in _ADD_KEYS.items():
        if name in tokenizer.add_flags:
            yield Entry(key, V.BOOL, tokenizer.add_flags[name])
    if tokenizer.chat_template is not None:
        yield _text(names.CHAT_TEMPLATE, tokenizer.chat_template)


def _provenance(provenance: Provenance) -> Iterator[Entry]:
    yield _text("convert_step35.version", provenance.version)
    yield _text("convert_step35.recipe", provenance.recipe)
    yield _text("convert_step35.source", provenance.source)
    yield _text("convert_step35.source.sha256", provenance.source_sha256)
    yield from provenance.imatrix
