"""Every preset gives every tensor the type that upstream's quantizer gives it.

The oracle is `llama_model_quantize` in a dry run over a sparse GGUF of the same shapes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import upstream
from checkpoints import REAL, TINY, Shape, config
from convert_step35.architecture import read_architecture
from convert_step35.mapping import map_tensors
from convert_step35.presets import PRESETS, ModelFacts, preset_types
from sparse import write_sparse_gguf

SHAPES = {
    "real": REAL,
    "real-trunk": replace(REAL, num_nextn_predict_layers=0),
    "tiny-8-experts": TINY,  # upstream has rules of its own for 8 experts and for narrow GQA
    "odd-rows": replace(TINY, hidden_size=448, moe_intermediate_size=320, moe_num_experts=12),
}
ANY_IMATRIX = {"some.weight": np.ones(1)}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def sparse_gguf(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_gguf(tmp_path_factory.mktemp("sparse") / "model.gguf", shape)


def our_types(shape: Shape, preset: str, has_imatrix: bool) -> dict[str, str]:
    arch = read_architecture(config(shape, eos=[1]))
    tensors = map_tensors(arch, trunk=True, mtp=True)
    n_gqa = shape.num_attention_heads // shape.num_attention_groups
    facts = ModelFacts(shape.n_layers, n_gqa, shape.moe_num_experts, has_imatrix)
    kept = {t.name: "f32" for t in tensors}
    return kept | {k: t.name.lower() for k, t in preset_types(PRESETS[preset], tensors, facts, lambda name: None).items()}


@pytest.mark.parametrize("has_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_types_are_upstreams(preset, has_imatrix, shape, sparse_gguf):
    theirs = upstream.planned_types(sparse_gguf, preset, imatrix=ANY_IMATRIX if has_imatrix else None)
    assert our_types(shape, preset, has_imatrix) == {name: kind.lower() for name, kind in theirs.items()}
