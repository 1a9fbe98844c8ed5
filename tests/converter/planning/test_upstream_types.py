"""Every preset gives every tensor the type that upstream's quantizer gives it.

The oracle is `llama_model_quantize` in a dry run over a sparse GGUF of the same shapes.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import upstream
from checkpoints import REAL, TINY, Shape, config, write_checkpoint
from convert_step35.planning.presets import PRESETS, ModelFacts, preset_types
from convert_step35.source.architecture import read_architecture
from convert_step35.source.mapping import map_tensors
from sparse import gguf_shapes, write_sparse_gguf

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
    return kept | {
        k: t.name.lower() for k, t in preset_types(PRESETS[preset], tensors, facts, lambda name: None).items()
    }


@pytest.mark.parametrize("has_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_types_are_upstreams(preset, has_imatrix, shape, sparse_gguf):
    theirs = upstream.planned_types(sparse_gguf, preset, imatrix=ANY_IMATRIX if has_imatrix else None)
    assert our_types(shape, preset, has_imatrix) == {name: kind.lower() for name, kind in theirs.items()}


# the whole command, over the headers of the real 399 GB


@pytest.fixture(scope="module")
def real_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("real") / "Step-3.5-Flash", REAL, sparse=True, n_shards=44)


def planned(checkpoint: Path, preset: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "convert_step35", "plan", str(checkpoint), "--type", preset, "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sparse_checkpoint_is_the_published_one(real_checkpoint):
    """804 tensors and 398,768,626,944 bytes in 44 shards, as the release's own card counts them."""
    index = json.loads((real_checkpoint / "model.safetensors.index.json").read_text())
    assert (len(index["weight_map"]), index["metadata"]["total_size"]) == (804, 398_768_626_944)
    shards = list(real_checkpoint.glob("*.safetensors"))
    assert len(shards) == 44
    assert sum(shard.stat().st_blocks * 512 for shard in shards) < 1_000_000


@pytest.mark.parametrize(
    "mode, shape, trunk, n_tensors",
    [("keep", REAL, True, 805), ("drop", SHAPES["real-trunk"], True, 754), ("only", REAL, False, 55)],
)
def test_plan_of_the_real_model_is_upstreams(mode, shape, trunk, n_tensors, real_checkpoint, tmp_path):
    made = planned(real_checkpoint, "Q4_K_M", "--mtp", mode)
    sparse = write_sparse_gguf(tmp_path / "sparse.gguf", shape, trunk=trunk)
    theirs = {name: kind.upper() for name, kind in upstream.planned_types(sparse, "Q4_K_M").items()}
    assert {t["name"]: t["type"] for t in made["tensors"]} == theirs
    assert {t["name"]: tuple(t["shape"]) for t in made["tensors"]} == gguf_shapes(shape, trunk=trunk)
    assert len(theirs) == n_tensors


@pytest.mark.parametrize("preset, gib", [("Q8_0", 197.43), ("Q4_K_S", 105.29), ("IQ4_XS", 99.66)])
def test_plan_adds_up_to_the_known_sizes(preset, gib, real_checkpoint):
    made = planned(real_checkpoint, preset)
    assert made["totals"]["weights"] == 199_384_301_376 + 64  # the generated rope_freqs has 64
    assert made["totals"]["bytes"] == sum(f["n_bytes"] for f in made["files"])
    assert round(sum(t["n_bytes"] for t in made["tensors"]) / 2**30, 2) == gib
