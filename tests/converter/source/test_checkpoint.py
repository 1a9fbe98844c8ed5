"""Which checkpoints are accepted, and what an error says of the others."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints import TINY, Shape, write_checkpoint
from convert_step35.errors import CheckpointError
from convert_step35.planning.chunks import chunks
from convert_step35.quantization.libggml import load_ggml
from convert_step35.reading.rows import RowReader
from convert_step35.source.checkpoint import open_checkpoint
from convert_step35.source.mapping import MappedTensor, map_tensors

NO_MTP = replace(TINY, num_nextn_predict_layers=0)


def values(folder: Path, name: str) -> np.ndarray:
    """A GGUF tensor's float32 values as the converter reads them from a checkpoint."""
    checkpoint = open_checkpoint(folder)
    tensor = next(t for t in map_tensors(checkpoint.arch, trunk=True, mtp=True) if t.name == name)
    with RowReader(checkpoint, load_ggml()) as reader:
        return np.concatenate([_rows(reader, tensor, chunk) for chunk in chunks(tensor)]).reshape(tensor.shape)


def _rows(reader: RowReader, tensor: MappedTensor, chunk) -> np.ndarray:
    return reader.read(tensor, chunk, np.empty(2**18, np.float32), np.empty(2**20, np.uint8)).copy()


@pytest.mark.parametrize("n_shards", [1, 2, 3])
def test_one_file_and_shards_hold_the_same_tensors(tmp_path: Path, n_shards: int) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", n_shards=n_shards))
    assert len(checkpoint.sources) == 141 and checkpoint.has_mtp and len(checkpoint.shards) == n_shards


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_f16_and_f32_checkpoints_read_like_bf16(tmp_path: Path, dtype: str) -> None:
    bf16 = values(write_checkpoint(tmp_path / "bf16"), "blk.4.ffn_up_exps.weight")
    other = values(write_checkpoint(tmp_path / dtype, dtype=dtype), "blk.4.ffn_up_exps.weight")
    np.testing.assert_allclose(other, bf16, rtol=2**-8, atol=1e-7)


def test_norms_gain_one_in_float32(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", dtype="F32")
    checkpoint = open_checkpoint(folder)
    stored = checkpoint.sources["model.norm.weight"].weight
    raw = np.fromfile(stored.path, np.float32, offset=stored.offset, count=256)
    np.testing.assert_array_equal(values(folder, "output_norm.weight"), raw + np.float32(1))


@pytest.mark.slow
def test_fp8_experts_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    """Expected values come from torch's float8 and a plain repeat of the 128 x 128 blocks."""
    torch = pytest.importorskip("torch")
    folder = write_checkpoint(tmp_path / "c", replace(TINY, moe_intermediate_size=320), fp8_experts=True)
    for name in ("gate_proj", "down_proj"):
        source = open_checkpoint(folder).sources[f"model.layers.3.moe.{name}.weight"]
        raw = np.fromfile(source.weight.path, np.uint8, offset=source.weight.offset, count=source.weight.n_bytes)
        weight = torch.from_numpy(raw).view(torch.float8_e4m3fn).float().numpy().reshape(source.weight.shape)
        assert source.scale is not None
        stored = source.scale.stored
        scale = np.fromfile(stored.path, np.float32, offset=stored.offset, count=stored.n_bytes // 4)
        blocks = scale.reshape(stored.shape).repeat(128, axis=1).repeat(128, axis=2)
        rows, columns = weight.shape[1:]
        got = values(folder, f"blk.3.ffn_{name.removesuffix('_proj')}_exps.weight")
        np.testing.assert_array_equal(got, weight * blocks[:, :rows, :columns])


@pytest.mark.slow
def test_fp8_without_scales_names_the_missing_one(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "c", fp8_experts=True, without=("model.layers.4.moe.up_proj.weight_scale_inv",), n_shards=1
    )
    rename_tensor(folder, "model.layers.4.moe.up_proj.weight_scale_inv", "model.layers.4.moe.up_proj.k_scale")
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.moe\.up_proj\.weight_scale_inv"):
        open_checkpoint(folder)


def rename_tensor(folder: Path, name: str, new: str) -> None:
    """Rename a tensor inside the single shard's header, keeping the header's length."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header[new] = header.pop(name)
    encoded = json.dumps(header, separators=(",", ":")).encode().ljust(n)
    assert len(encoded) == n
    path.write_bytes(data[:8] + encoded + data[8 + n :])


def test_step37_gives_its_text_part_and_counts_the_vision_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", step37=True))
    assert checkpoint.n_skipped_vision > 0 and len(checkpoint.sources) == 141 and checkpoint.arch.has_vision


def test_lists_cut_to_the_trunk_leave_mtp_layers_sliding(tmp_path: Path) -> None:
    arch = open_checkpoint(write_checkpoint(tmp_path / "c", truncated_lists=True)).arch
    assert [(layer.is_sliding, layer.n_heads) for layer in arch.layers if layer.is_mtp] == [(True, 8)] * 3


def test_declared_mtp_layers_without_weights_are_a_trunk(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", mtp_weights=False))
    assert not checkpoint.has_mtp and len(checkpoint.sources) == 90


def test_no_declared_mtp_layers_are_a_trunk(tmp_path: Path) -> None:
    assert not open_checkpoint(write_checkpoint(tmp_path / "c", NO_MTP)).has_mtp


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"without": ("model.norm.weight",)}, r"missing tensor: .*model\.norm\.weight expected \[256\], got nothing"),
        (
            {"without": ("model.layers.7.hnorm.weight",)},
            r"missing tensor: .*model\.layers\.7\.hnorm\.weight expected \[256\]",
        ),
        (
            {"changed": {"model.layers.3.moe.router_bias": (9,)}},
            r"misshaped tensor: .*router_bias expected \[8\], got \[9\]",
        ),
        (
            {"changed": {"model.layers.2.self_attn.sinks": (8,)}},
            r"unexpected tensor: .*model\.layers\.2\.self_attn\.sinks",
        ),
        ({"changed": {"model.layers.9.enorm.weight": (256,)}}, r"unexpected tensor: .*model\.layers\.9\.enorm"),
    ],
)
def test_a_wrong_tensor_is_named_with_wanted_and_got(tmp_path: Path, kwargs: dict, message: str) -> None:
    folder = write_checkpoint(tmp_path / "c", **kwargs)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_mtp_only_needs_just_the_shards_that_hold_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", Shape(), n_shards=4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    keep = {
        s
        for name, s in index.items()
        if name in needed or name.startswith(("model.layers.6.", "model.layers.7.", "model.layers.8."))
    }
    others = set(index.values()) - keep
    assert others, "the fixture must have a shard without MTP tensors"
    for shard in others:
        (folder / shard).unlink()
    assert len(open_checkpoint(folder, mtp_only=True).sources) == 3 + 3 * 17
    with pytest.raises(CheckpointError, match="missing shard"):
        open_checkpoint(folder)


def test_an_index_that_lies_about_a_shard_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    one, other = sorted(set(index["weight_map"].values()))
    name = next(n for n, shard in index["weight_map"].items() if shard == one)
    index["weight_map"][name] = other
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index and shards disagree"):
        open_checkpoint(folder)
