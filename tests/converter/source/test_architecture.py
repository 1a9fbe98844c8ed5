"""config.json is refused with the key, what was wanted and what was found, or becomes a valid Architecture."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from gguf import LlamaFileType
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import TINY, config, fp8_settings, step37_config
from convert_step35.errors import CheckpointError
from convert_step35.gguf.header import encode_header
from convert_step35.gguf.metadata import Provenance, build_metadata
from convert_step35.source.architecture import Architecture, Llama3Rope, read_architecture
from convert_step35.source.mapping import map_tensors
from convert_step35.source.rope_freqs import rope_freqs
from convert_step35.source.tokenizer import Tokenizer

SCALES = {"quantization_config": fp8_settings()}


def valid(**changes: Any) -> dict[str, Any]:
    """A fresh config.json with some keys changed; None deletes one, `a.b` reaches into an object, `a.2` into a list."""
    data = copy.deepcopy(
        config(TINY, eos=[1, 7]) | (SCALES if any(key.startswith("quantization") for key in changes) else {})
    )
    for path, value in changes.items():
        put(data, path.split("."), value)
    return data


def put(data: Any, path: list[str], value: Any) -> None:
    for key in path[:-1]:
        data = data[int(key)] if isinstance(data, list) else data[key]
    last: Any = int(path[-1]) if isinstance(data, list) else path[-1]
    if value is None:
        del data[last]
    else:
        data[last] = value


REFUSED = [
    ("architectures", ["LlamaForCausalLM"], "expected one of ['Step3p5ForCausalLM', 'Step3p7ForConditionalGeneration'], got ['LlamaForCausalLM']"),
    ("architectures", None, "expected one of ['Step3p5ForCausalLM', 'Step3p7ForConditionalGeneration'], got None"),
    ("architectures", "Step3p5ForCausalLM", "expected one of ['Step3p5ForCausalLM', 'Step3p7ForConditionalGeneration'], got 'Step"),
    ("hidden_size", None, "is missing, expected a whole number"),
    ("hidden_size", "256", "expected a whole number, got '256'"),
    ("hidden_size", 256.0, "expected a whole number, got 256.0"),
    ("hidden_size", True, "expected a whole number, got True"),
    ("hidden_size", 0, "expected 1 to 2147483647, got 0"),
    ("vocab_size", -1, "expected 1 to 1000000, got -1"),
    ("num_hidden_layers", 513, "expected 1 to 512, got 513"),
    ("num_hidden_layers", 7, "layer_types expected 10 entries (or 7, the trunk's), got 9"),
    ("num_nextn_predict_layers", 17, "expected 0 to 16, got 17"),
    ("num_nextn_predict_layers", 2, "layer_types expected 8 entries (or 6, the trunk's), got 9"),
    ("num_attention_heads", 3, "expected a multiple of num_attention_groups, 2, got 3"),
    ("layer_types.2", "linear_attention", "layer_types[2] expected full_attention or sliding_attention, got 'linear_attention'"),
    ("layer_types.2", ["full_attention"], "layer_types[2] expected full_attention or sliding_attention, got ['full_attention']"),
    ("layer_types.2", "full_attention", "rope_theta expected one value for all full-attention layers, got [10000.0, 5000000.0]"),
    ("layer_types", ["sliding_attention"] * 9, "rope_theta expected one value for all full-attention layers, got []"),
    ("attention_other_setting", None, "is missing, expected an object"),
    ("attention_other_setting.attention_type", "full_attention", "expected sliding_attention, got 'full_attention'"),
    ("attention_other_setting.head_dim", 32, "expected 64, got 32"),
    ("attention_other_setting.num_attention_heads", None, "is missing, expected a whole number"),
    ("attention_other_setting.num_attention_heads", 9, "expected a multiple of num_attention_groups, 2, got 9"),
    ("moe_layers_enum", "3,5", "expected a run that ends with layer 5, got '3,5'"),
    ("moe_layers_enum", "3,4", "expected a run that ends with layer 5, got '3,4'"),
    ("moe_layers_enum", "", "expected layer numbers with commas, got ''"),
    ("moe_layers_enum", "3,4,\N{ARABIC-INDIC DIGIT FIVE}", r"expected layer numbers with commas, got '3,4,\u0665'"),
    ("moe_layers_enum", [3, 4, 5], "expected a string, got [3, 4, 5]"),
    ("moe_top_k", 9, "expected 1 to 8, got 9"),
    ("moe_router_scaling_factor", "3", "expected a number, got '3'"),
    ("moe_router_scaling_factor", -3.0, "expected a positive number, got -3.0"),
    ("rms_norm_eps", 1e300, "expected a positive number, got 1e+300"),
    ("norm_expert_weight", 1, "expected true or false, got 1"),
    ("swiglu_limits.5", -7, "swiglu_limits[5] expected a number of 0 or more, got -7"),
    ("swiglu_limits_shared.5", "16", "swiglu_limits_shared[5] expected a number of 0 or more, got '16'"),
    ("swiglu_limits", [7], "expected 9 entries (or 6, the trunk's), got 1"),
    ("rope_theta", 10000.0, "expected a list, got 10000.0"),
    ("rope_theta.8", 0, "rope_theta expected 9 positive numbers (or 6, the trunk's), got [5000000.0"),
    ("rope_theta.1", 20000.0, "rope_theta expected one value for all sliding layers, got [10000.0, 20000.0]"),
    ("partial_rotary_factors.0", 1.0, "partial_rotary_factors[0] expected 0.5 on a full-attention layer, got 1.0"),
    ("partial_rotary_factors.6", 0.5, "partial_rotary_factors[6] expected 1.0 on a sliding layer, got 0.5"),
    ("rope_scaling", [], "expected an object, got []"),
    ("rope_scaling.rope_type", "yarn", "expected llama3, got 'yarn'"),
    ("rope_scaling.factor", 0, "expected a positive number, got 0.0"),
    ("rope_scaling.low_freq_factor", 32.0, "expected less than high_freq_factor, 32.0, got 32.0"),
    ("rope_scaling.original_max_position_embeddings", None, "is missing, expected a whole number"),
    ("use_head_wise_attn_gate", False, "expected True, got False; llama.cpp's step35 graph has no such variant"),
    ("use_head_wise_attn_gate", 1, "expected True, got 1"),
    ("sink", True, "expected False, got True"),
    ("att_impl_type", "MLA", "expected 'GQA', got 'MLA'"),
    ("moe_router_activation", "softmax", "expected 'sigmoid', got 'softmax'"),
    ("moe_every_n_layer", 2, "expected 1, got 2"),
    ("tie_word_embeddings", True, "expected False, got True"),
    ("use_rope_layers", [1], "expected [], got [1]"),
    ("eos_token_id", 2048, "expected at most 16 ids under 2048, got 2048"),
    ("eos_token_id", [1, "7"], "expected at most 16 ids under 2048, got [1, '7']"),
    ("quantization_config.quant_method", "modelopt", "expected fp8, got 'modelopt'; convert the bf16 or the FP8 checkpoint instead"),
    ("quantization_config", "fp8", "expected an object, got 'fp8'"),
    ("quantization_config.weight_block_size", [128], "expected two block sizes such as [128, 128], got [128]"),
    ("quantization_config.weight_block_size", None, "expected two block sizes such as [128, 128], got None"),
    ("text_config", [], "expected an object, got []"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_a_refusal_names_the_key_wanted_and_got(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_architecture(valid(**{key: value}))
    text = str(caught.value)
    # A message that names another key, or an entry of a list, starts with it.
    assert text.startswith((f"config.json: {key} {message}", f"config.json: {message}"))
    assert text.isascii() and text.isprintable() and len(text) < 300


def test_the_bundled_shape_is_read_key_by_key() -> None:
    arch = read_architecture(valid(quantization_config=fp8_settings()))
    assert (arch.n_trunk, arch.n_mtp, arch.n_leading_dense) == (6, 3, 3)
    assert [layer.is_sliding for layer in arch.layers] == [False, True, True, True, False, True, True, True, True]
    assert [layer.n_heads for layer in arch.layers] == [4, 8, 8, 8, 4, 8, 8, 8, 8]
    assert [layer.is_moe for layer in arch.layers] == [False] * 3 + [True] * 3 + [False] * 3
    assert [(layer.clamp_routed, layer.clamp_shared) for layer in arch.layers] == [(0, 0)] * 4 + [(7, 16)] * 2 + [
        (0, 0)
    ] * 3
    assert (arch.rope_theta_full, arch.rope_theta_sliding, arch.rotary_factor_full) == (5e6, 1e4, 0.5)
    assert arch.rope_scaling == Llama3Rope(2.0, 1.0, 32.0, 131072)
    assert (arch.eos_token_ids, arch.fp8_block, arch.rms_norm_eps) == ((1, 7), (128, 128), 1e-5)


@pytest.mark.parametrize(
    "key", ["swiglu_limits", "swiglu_limits_shared", "rope_scaling", "num_nextn_predict_layers", "use_moe"]
)
def test_a_key_that_may_be_absent_may_also_be_null(key: str) -> None:
    data = config(replace(TINY, num_nextn_predict_layers=0), eos=[1])
    assert read_architecture({**data, key: None}) == read_architecture({k: v for k, v in data.items() if k != key})


def test_lists_cut_to_the_trunk_make_the_mtp_layers_sliding_with_the_sliding_head_count() -> None:
    """Padding them as full attention, as upstream does, gives MTP layers 64 heads and the wrong rotation."""
    assert read_architecture(config(TINY, eos=[1], list_length=6)) == read_architecture(config(TINY, eos=[1]))


def test_the_text_part_of_step37_is_the_same_model_with_vision() -> None:
    arch = read_architecture(step37_config(valid(quantization_config=fp8_settings())))
    assert arch.has_vision
    assert replace(arch, has_vision=False) == read_architecture(valid(quantization_config=fp8_settings()))


def test_the_text_part_overrides_the_outer_keys() -> None:
    outer = step37_config(valid()) | {"hidden_size": 999, "bos_token_id": 5}
    assert read_architecture(outer).hidden_size == TINY.hidden_size


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-3, 300), st.floats(0, 9), st.text(max_size=3)), max_size=9),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def paths(data: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The way to every value of a JSON document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for key, value in items for p in [(*prefix, key), *paths(value, (*prefix, key))]]


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config of either model with up to three values replaced, cut or removed."""
    data = json.loads(json.dumps(step37_config(valid(**SCALES)) if draw(st.booleans()) else valid(**SCALES)))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(paths(data)))
        parent = data
        for key in path:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = draw(JUNK)
        else:
            del parent[last]
    return data


@settings(max_examples=400, deadline=None)
@given(mutations())
def test_a_mutated_config_is_a_clean_error_or_an_architecture_that_can_be_written(data: dict[str, Any]) -> None:
    try:
        arch = read_architecture(data)
    except CheckpointError as exc:
        assert str(exc).startswith("config.json: ") and str(exc).isascii() and "\n" not in str(exc)
        return
    check_usable(arch)


def check_usable(arch: Architecture) -> None:
    """What everything after the config relies on."""
    assert arch.trunk and arch.trunk[-1].is_moe and arch.n_leading_dense < arch.n_trunk
    assert all(layer.n_heads % layer.n_kv_heads == 0 for layer in arch.layers)
    assert all(layer.is_sliding or not layer.is_mtp for layer in arch.layers[arch.n_trunk :])
    assert header(arch).startswith(b"GGUF")
    if arch.rope_scaling is not None and arch.head_dim <= 4096:
        freqs = rope_freqs(arch)
        assert freqs.shape == (arch.head_dim // 2,) and (freqs > 0).all()


def header(arch: Architecture) -> bytes:
    """A header with this architecture's metadata and no vocabulary: every number fits its type."""
    tensors = map_tensors(arch, trunk=True, mtp=True)
    tokenizer = Tokenizer((), (), (), {}, {}, (), None)
    provenance = Provenance("title", None, "source", "sha256", "recipe", "version")
    return encode_header(
        build_metadata(
            arch, tokenizer, tensors, with_mtp=True, ftype=LlamaFileType.GUESSED, generation={}, provenance=provenance
        ),
        [],
    )
