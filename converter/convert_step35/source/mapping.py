"""The checkpoint's tensors and the GGUF tensors they become: names, shapes and transforms."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from convert_step35.source.architecture import Architecture, LayerShape


class Kind(Enum):
    """What becomes of a tensor's values."""

    MATRIX = auto()  # takes the recipe's type
    NORM = auto()  # the checkpoint stores w - 1: add 1.0 in float32, stay F32
    FLOAT32 = auto()  # router matrix and router bias: copied to F32
    ROPE_FREQS = auto()  # generated from the config, F32


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One GGUF tensor and where it comes from.

    `shape` is row-major, outermost first, and equal to the checkpoint's; `source` is None for a generated
    tensor; `layer` is None for the global ones.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None
    is_mtp: bool = False

    @property
    def row_size(self) -> int:
        """Weights in one row, the dimension that ggml cuts into blocks."""
        return self.shape[-1]


_VISION = ("vision_model.", "model.vision_model.", "vit_large_projector.", "model.vit_large_projector.")


def is_vision(source: str) -> bool:
    """True for a tensor of Step-3.7's vision tower or of its projector."""
    return source.startswith(_VISION)


def canonical_source(source: str) -> str:
    """A tensor's name as Step-3.5 spells it: Step-3.7 in NVFP4 form nests the text under language_model."""
    return source.replace("model.language_model.", "model.", 1)


def map_tensors(arch: Architecture, *, trunk: bool, mtp: bool) -> tuple[MappedTensor, ...]:
    """The tensors of one GGUF file in file order; an MTP-only file also holds embedding, output and norm.

    Names as llama.cpp's conversion/step3.py writes them.
    """
    return tuple(_all(arch, trunk=trunk, mtp=mtp))


def _all(arch: Architecture, *, trunk: bool, mtp: bool) -> Iterator[MappedTensor]:
    vocab = (arch.vocab_size, arch.hidden_size)
    if arch.rope_scaling is not None:
        yield MappedTensor("rope_freqs.weight", None, (arch.head_dim // 2,), Kind.ROPE_FREQS)
    yield MappedTensor("token_embd.weight", "model.embed_tokens.weight", vocab, Kind.MATRIX)
    for i, layer in enumerate(arch.layers):
        if mtp if layer.is_mtp else trunk:
            yield from _layer(arch, i, layer)
    yield MappedTensor("output_norm.weight", "model.norm.weight", (arch.hidden_size,), Kind.NORM)
    yield MappedTensor("output.weight", "lm_head.weight", vocab, Kind.MATRIX)


def _layer(arch: Architecture, i: int, layer: LayerShape) -> Iterator[MappedTensor]:
    parts = [
        _attention(arch, layer),
        _experts(arch) if layer.is_moe else _dense(arch),
        _mtp_head(arch) if layer.is_mtp else (),
    ]
    for part in parts:
        for name, source, shape, kind in part:
            yield MappedTensor(
                f"blk.{i}.{name}", f"model.layers.{i}.{source}", shape, kind, layer=i, is_mtp=layer.is_mtp
            )


_Row = tuple[str, str, tuple[int, ...], Kind]


def _attention(arch: Architecture, layer: LayerShape) -> Iterator[_Row]:
    hidden, q, kv = arch.hidden_size, layer.n_heads * arch.head_dim, layer.n_kv_heads * arch.head_dim
    yield "attn_norm.weight", "input_layernorm.weight", (hidden,), Kind.NORM
    yield "attn_q.weight", "self_attn.q_proj.weight", (q, hidden), Kind.MATRIX
    yield "attn_k.weight", "self_attn.k_proj.weight", (kv, hidden), Kind.MATRIX
    yield "attn_v.weight", "self_attn.v_proj.weight", (kv, hidden), Kind.MATRIX
    yield "attn_output.weight", "self_attn.o_proj.weight", (hidden, q), Kind.MATRIX
    yield "attn_gate.weight", "self_attn.g_proj.weight", (layer.n_heads, hidden), Kind.MATRIX
    yield "attn_q_norm.weight", "self_attn.q_norm.weight", (arch.head_dim,), Kind.NORM
    yield "attn_k_norm.weight", "self_attn.k_norm.weight", (arch.head_dim,), Kind.NORM
    yield "ffn_norm.weight", "post_attention_layernorm.weight", (hidden,), Kind.NORM


def _dense(arch: Architecture) -> Iterator[_Row]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    yield "ffn_gate.weight", "mlp.gate_proj.weight", (inner, hidden), Kind.MATRIX
    yield "ffn_up.weight", "mlp.up_proj.weight", (inner, hidden), Kind.MATRIX
    yield "ffn_down.weight", "mlp.down_proj.weight", (hidden, inner), Kind.MATRIX


def _experts(arch: Architecture) -> Iterator[_Row]:
    hidden, inner, shared, n = arch.hidden_size, arch.moe_intermediate_size, arch.share_expert_dim, arch.n_experts
    yield "ffn_gate_inp.weight", "moe.gate.weight", (n, hidden), Kind.FLOAT32
    yield "exp_probs_b.bias", "moe.router_bias", (n,), Kind.FLOAT32
    yield "ffn_gate_exps.weight", "moe.gate_proj.weight", (n, inner, hidden), Kind.MATRIX
    yield "ffn_up_exps.weight", "moe.up_proj.weight", (n, inner, hidden), Kind.MATRIX
    yield "ffn_down_exps.weight", "moe.down_proj.weight", (n, hidden, inner), Kind.MATRIX
    yield "ffn_gate_shexp.weight", "share_expert.gate_proj.weight", (shared, hidden), Kind.MATRIX
    yield "ffn_up_shexp.weight", "share_expert.up_proj.weight", (shared, hidden), Kind.MATRIX
    yield "ffn_down_shexp.weight", "share_expert.down_proj.weight", (hidden, shared), Kind.MATRIX


def _mtp_head(arch: Architecture) -> Iterator[_Row]:
    hidden = arch.hidden_size
    yield "nextn.eh_proj.weight", "eh_proj.weight", (hidden, 2 * hidden), Kind.MATRIX
    yield "nextn.enorm.weight", "enorm.weight", (hidden,), Kind.NORM
    yield "nextn.hnorm.weight", "hnorm.weight", (hidden,), Kind.NORM
    yield "nextn.shared_head_norm.weight", "transformer.shared_head.norm.weight", (hidden,), Kind.NORM
    yield (
        "nextn.shared_head_head.weight",
        "transformer.shared_head.output.weight",
        (arch.vocab_size, hidden),
        Kind.MATRIX,
    )
