"""The tensor types of llama-quantize's presets, rule by rule.

Mirrors llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp (commit 0c1e57098) for the step35
architecture; the tests compare it with llama_model_quantize's own dry run, tensor by tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType as F

from convert_step35.gguf.ggml_types import block_size
from convert_step35.source.mapping import Kind, MappedTensor


@dataclass(frozen=True, slots=True)
class Preset:
    """One of llama-quantize's file types and the type most of its matrices get."""

    name: str
    ftype: F
    default: T


def _preset(name: str, ftype: F, default: T) -> tuple[str, Preset]:
    return name, Preset(name, ftype, default)


PRESETS: dict[str, Preset] = dict(
    [
        _preset("F32", F.ALL_F32, T.F32),
        _preset("BF16", F.MOSTLY_BF16, T.BF16),
        _preset("F16", F.MOSTLY_F16, T.F16),
        _preset("Q8_0", F.MOSTLY_Q8_0, T.Q8_0),
        _preset("Q6_K", F.MOSTLY_Q6_K, T.Q6_K),
        _preset("Q5_K_M", F.MOSTLY_Q5_K_M, T.Q5_K),
        _preset("Q5_K_S", F.MOSTLY_Q5_K_S, T.Q5_K),
        _preset("Q5_1", F.MOSTLY_Q5_1, T.Q5_1),
        _preset("Q5_0", F.MOSTLY_Q5_0, T.Q5_0),
        _preset("Q4_K_M", F.MOSTLY_Q4_K_M, T.Q4_K),
        _preset("Q4_K_S", F.MOSTLY_Q4_K_S, T.Q4_K),
        _preset("IQ4_NL", F.MOSTLY_IQ4_NL, T.IQ4_NL),
        _preset("IQ4_XS", F.MOSTLY_IQ4_XS, T.IQ4_XS),
        _preset("MXFP4_MOE", F.MOSTLY_MXFP4_MOE, T.MXFP4),
        _preset("Q4_1", F.MOSTLY_Q4_1, T.Q4_1),
        _preset("Q4_0", F.MOSTLY_Q4_0, T.Q4_0),
        _preset("Q3_K_L", F.MOSTLY_Q3_K_L, T.Q3_K),
        _preset("Q3_K_M", F.MOSTLY_Q3_K_M, T.Q3_K),
        _preset("Q3_K_S", F.MOSTLY_Q3_K_S, T.Q3_K),
        _preset("IQ3_M", F.MOSTLY_IQ3_M, T.IQ3_S),
        _preset("IQ3_S", F.MOSTLY_IQ3_S, T.IQ3_S),
        _preset("IQ3_XS", F.MOSTLY_IQ3_XS, T.IQ3_S),
        _preset("IQ3_XXS", F.MOSTLY_IQ3_XXS, T.IQ3_XXS),
        _preset("Q2_K", F.MOSTLY_Q2_K, T.Q2_K),
        _preset("Q2_K_S", F.MOSTLY_Q2_K_S, T.Q2_K),
        _preset("IQ2_M", F.MOSTLY_IQ2_M, T.IQ2_S),
        _preset("IQ2_S", F.MOSTLY_IQ2_S, T.IQ2_XS),
        _preset("IQ2_XS", F.MOSTLY_IQ2_XS, T.IQ2_XS),
        _preset("IQ2_XXS", F.MOSTLY_IQ2_XXS, T.IQ2_XXS),
        _preset("IQ1_M", F.MOSTLY_IQ1_M, T.IQ1_M),
        _preset("IQ1_S", F.MOSTLY_IQ1_S, T.IQ1_S),
        _preset("TQ1_0", F.MOSTLY_TQ1_0, T.TQ1_0),
        _preset("TQ2_0", F.MOSTLY_TQ2_0, T.TQ2_0),
    ]
)

_LOW_IQ = {F.MOSTLY_IQ2_XXS, F.MOSTLY_IQ2_XS, F.MOSTLY_IQ1_S, F.MOSTLY_IQ2_S, F.MOSTLY_IQ2_M, F.MOSTLY_IQ1_M}
_IQ2_WIDE = {F.MOSTLY_IQ2_S, F.MOSTLY_IQ2_M}
_IQ1 = {F.MOSTLY_IQ1_S, F.MOSTLY_IQ1_M}
_FLOAT = {T.F32, T.F16, T.BF16}

# A row that a type's block does not divide takes the type on the right (256 to 32 weights a block).
_FALLBACK = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    **dict.fromkeys((T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}


def fit_to_row(kind: T, row_size: int) -> T:
    """The type itself, or llama.cpp's fallback for a row that its block does not divide; F16 at last."""
    if row_size % block_size(kind) == 0:
        return kind
    fallback = _FALLBACK.get(kind, kind)
    return fallback if row_size % block_size(fallback) == 0 else T.F16


def requires_imatrix(name: str, kind: T, ftype: F) -> bool:
    """llama-quantize's own rule, stricter than ggml's: these types are garbage without an imatrix."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    if kind is T.Q2_K:
        return ftype is F.MOSTLY_Q2_K_S
    return kind in (T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask of the model: `n_gqa` is layer 0's query heads per KV head, `n_layers` counts MTP."""

    n_layers: int
    n_gqa: int
    n_experts: int
    has_imatrix: bool


@dataclass(slots=True)
class _State:
    """The counters that upstream's rules keep while walking the tensors in layer order."""

    preset: Preset
    facts: ModelFacts
    n_attn_v: int
    i_attn_v: int = 0
    i_ffn_down: int = 0
    manual: Callable[[str], T | None] = field(default=lambda name: None)

    @property
    def eighth(self) -> int:
        return self.facts.n_layers // 8


def preset_types(
    preset: Preset, tensors: Sequence[MappedTensor], facts: ModelFacts, manual: Callable[[str], T | None]
) -> dict[str, T]:
    """The type of each MATRIX tensor; `manual` names a type that the user forced, which skips the rules.

    Like upstream, a forced type does not advance the counters; unlike upstream, it counts under F32, F16 and BF16 too.
    """
    state = _State(preset, facts, n_attn_v=sum(t.name.endswith("attn_v.weight") for t in tensors), manual=manual)
    matrices = [t for t in tensors if t.kind is Kind.MATRIX]
    return {t.name: _type(state, t) for t in sorted(matrices, key=_upstream_order)}


def _upstream_order(tensor: MappedTensor) -> tuple[int, str]:
    """llama.cpp keeps its weights by layer, then by name."""
    return (-1 if tensor.layer is None else tensor.layer, tensor.name)


def _type(state: _State, tensor: MappedTensor) -> T:
    forced = state.manual(tensor.name)
    if forced is not None:
        return fit_to_row(forced, tensor.row_size)
    default = state.preset.default
    return default if default in _FLOAT else fit_to_row(_rule(state, tensor), tensor.row_size)


def _rule(state: _State, tensor: MappedTensor) -> T:
    name, ftype = tensor.name, state.preset.ftype
    if name == "output.weight":
        return _output(state, tensor)
    if ftype is F.MOSTLY_MXFP4_MOE:
        return T.MXFP4 if len(tensor.shape) == 3 else T.Q8_0
    if name == "token_embd.weight":
        return _token_embd(state)
    if ftype in _LOW_IQ:
        return _low_iq(state, name)
    if "attn_v.weight" in name:
        return _attn_v(state)
    if "attn_k.weight" in name:
        return _attn_k(state)
    if "attn_q.weight" in name:
        return {F.MOSTLY_IQ3_XS: T.IQ3_XXS, F.MOSTLY_IQ3_XXS: T.IQ2_S}.get(ftype, state.preset.default)
    if "ffn_down" in name:
        return _ffn_down(state, name)
    if "attn_output.weight" in name:
        return _attn_output(state)
    if "ffn_gate" in name or "ffn_up" in name:
        return _ffn_gate_up(state, name)
    return state.preset.default


def _output(state: _State, tensor: MappedTensor) -> T:
    default = state.preset.default
    if state.preset.ftype is F.MOSTLY_MXFP4_MOE or tensor.row_size % block_size(default) != 0:
        return T.Q8_0
    if state.preset.ftype in _LOW_IQ or state.preset.ftype is F.MOSTLY_IQ3_XXS:
        return T.Q5_K
    return T.Q8_0 if default is T.Q8_0 else T.Q6_K


def _token_embd(state: _State) -> T:
    ftype = state.preset.ftype
    if ftype in (F.MOSTLY_IQ2_XXS, F.MOSTLY_IQ2_XS) or ftype in _IQ1:
        return T.Q2_K
    if ftype in _IQ2_WIDE or ftype is F.MOSTLY_IQ3_XXS:
        return T.IQ3_S
    if ftype in (F.MOSTLY_TQ1_0, F.MOSTLY_TQ2_0):
        return T.Q4_K
    return state.preset.default


def _low_iq(state: _State, name: str) -> T:
    """The IQ1 and IQ2 presets have one rule for all tensors. `n_experts == 8` is upstream's Mixtral case."""
    ftype, default, n_experts = state.preset.ftype, state.preset.default, state.facts.n_experts
    if "attn_v.weight" in name:
        state.i_attn_v += 1
        if state.facts.n_gqa >= 4 or n_experts >= 4:
            return T.Q4_K
        return T.IQ3_S if ftype in _IQ2_WIDE else T.Q2_K
    if "attn_k.weight" in name and n_experts == 8:
        return T.Q4_K
    if "ffn_down" in name:
        state.i_ffn_down += 1
        if state.i_ffn_down - 1 < state.eighth:
            return T.IQ3_S if ftype in _IQ2_WIDE else T.Q2_K
    elif "attn_output.weight" in name:
        if n_experts == 8:
            return T.Q5_K
        if ftype in _IQ1:
            return T.IQ2_XXS
        if ftype in _IQ2_WIDE:
            return T.IQ3_S
    return default


def _attn_v(state: _State) -> T:
    kind = _attn_v_by_preset(state)
    state.i_attn_v += 1
    return T.Q8_0 if state.facts.n_experts == 8 else kind


def _attn_v_by_preset(state: _State) -> T:
    ftype, default, facts = state.preset.ftype, state.preset.default, state.facts
    wide_gqa, i = facts.n_gqa >= 4, state.i_attn_v
    match ftype:
        case F.MOSTLY_Q2_K:
            return T.Q4_K if wide_gqa else T.Q3_K
        case F.MOSTLY_Q2_K_S | F.MOSTLY_IQ3_XS | F.MOSTLY_IQ3_S:
            return T.Q4_K if wide_gqa else default
        case F.MOSTLY_IQ3_XXS:
            return T.Q4_K if wide_gqa else T.IQ3_XXS if facts.has_imatrix else T.IQ3_S
        case F.MOSTLY_IQ3_M:
            return T.Q4_K
        case F.MOSTLY_Q3_K_M:
            return T.Q5_K if i < 2 else T.Q4_K
        case F.MOSTLY_Q3_K_L:
            return T.Q5_K
        case F.MOSTLY_IQ4_NL | F.MOSTLY_IQ4_XS:
            return T.Q5_K if wide_gqa else default
        case F.MOSTLY_Q4_K_M | F.MOSTLY_Q5_K_M:
            return T.Q6_K if _use_more_bits(i, state.n_attn_v) else default
        case F.MOSTLY_Q4_K_S:
            return T.Q5_K if i < 4 else default
    return default


def _attn_k(state: _State) -> T:
    if state.facts.n_experts == 8:
        return T.Q8_0
    return {F.MOSTLY_IQ3_XS: T.IQ3_XXS, F.MOSTLY_IQ3_XXS: T.IQ2_S}.get(state.preset.ftype, state.preset.default)


def _ffn_down(state: _State, name: str) -> T:
    ftype, default, facts = state.preset.ftype, state.preset.default, state.facts
    i, early = _layer_of(name), _layer_of(name) < state.eighth
    more_bits = _use_more_bits(i, facts.n_layers)
    match ftype:
        case F.MOSTLY_Q2_K:
            return T.Q3_K
        case F.MOSTLY_Q2_K_S:
            return T.Q4_K if early else default
        case F.MOSTLY_IQ3_XXS if not facts.has_imatrix:
            return T.Q4_K if early else T.Q3_K
        case F.MOSTLY_Q3_K_M:
            return T.Q5_K if i < facts.n_layers // 16 else T.Q4_K
        case F.MOSTLY_IQ3_M:
            return T.Q4_K if early or (facts.n_experts == 8 and more_bits) else default
        case F.MOSTLY_Q3_K_L:
            return T.Q5_K
        case F.MOSTLY_Q4_K_M | F.MOSTLY_Q5_K_M:
            return T.Q6_K if more_bits else default
        case F.MOSTLY_IQ4_NL | F.MOSTLY_IQ4_XS:
            return T.Q5_K if early and not facts.has_imatrix else default
        case F.MOSTLY_Q4_K_S:
            return T.Q5_K if early else default
        case F.MOSTLY_Q4_0 | F.MOSTLY_Q5_0 if facts.has_imatrix and early:
            return T.Q4_1 if ftype is F.MOSTLY_Q4_0 else T.Q5_1
    return default


_Q5_K_ATTN_OUTPUT = {
    F.MOSTLY_Q2_K, F.MOSTLY_IQ3_XS, F.MOSTLY_IQ3_XXS, F.MOSTLY_Q3_K_S, F.MOSTLY_Q3_K_M, F.MOSTLY_IQ4_NL,
    F.MOSTLY_Q4_K_S, F.MOSTLY_Q4_K_M, F.MOSTLY_IQ3_S, F.MOSTLY_IQ3_M, F.MOSTLY_IQ4_XS,
}  # fmt: skip
_ATTN_OUTPUT = {
    F.MOSTLY_Q2_K: T.Q3_K,
    F.MOSTLY_IQ3_XXS: T.IQ3_S,
    F.MOSTLY_Q3_K_M: T.Q4_K,
    F.MOSTLY_Q3_K_L: T.Q5_K,
    F.MOSTLY_IQ3_M: T.Q4_K,
}


def _attn_output(state: _State) -> T:
    ftype, default = state.preset.ftype, state.preset.default
    if state.facts.n_experts == 8:
        return T.Q5_K if ftype in _Q5_K_ATTN_OUTPUT else default
    return _ATTN_OUTPUT.get(ftype, default)


def _ffn_gate_up(state: _State, name: str) -> T:
    n = state.facts.n_layers
    if state.preset.ftype is F.MOSTLY_IQ3_XS and n // 8 <= _layer_of(name) < 7 * n // 8:
        return T.IQ3_XXS
    return state.preset.default


def _use_more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _layer_of(name: str) -> int:
    """The layer of a name such as blk.12.ffn_down_exps.weight."""
    return int(name.removeprefix("blk.").partition(".")[0])
