"""The converter's one pass makes the bytes of upstream's two steps: its converter, then its quantizer.

Upstream's side is convert_hf_to_gguf.py and llama_model_quantize of the pinned llama-cpp-python.
Files are read by the independent gguf.GGUFReader. Order in the file is not compared.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor

import upstream
from checkpoints import BUNDLED, TINY, random_weights, write_checkpoint
from command import convert_step35

PRESETS = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q3_K_M", "MXFP4_MOE",
)  # fmt: skip
IMATRIX_PRESETS = ("Q4_K_M", "IQ4_XS", "IQ3_XXS", "IQ2_XXS", "Q2_K_S")

# Differences of our choosing, as docs/gguf.md lists them: keys of ours, and keys with our values.
# The bundled checkpoint ends a generation at <｜▁pad▁｜> too, which llama.cpp does not know by its text.
OUR_KEYS = frozenset(f"convert_step35.{name}" for name in ("version", "recipe", "source", "source.sha256")) | {
    "tokenizer.ggml.eom_token_id"
}
OUR_VALUES = frozenset({"general.name"})

Convert = Callable[..., Path]


@pytest.fixture(scope="session")
def upstream_gguf(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Returns upstream's conversion of a checkpoint, made once for the same arguments."""
    made: dict[tuple, Path] = {}

    def convert(checkpoint: Path, outtype: str, *flags: str) -> Path:
        key = (checkpoint, outtype, *flags)
        if key not in made:
            out = tmp_path_factory.mktemp("upstream") / f"{outtype}.gguf"
            made[key] = upstream.convert(checkpoint, out, outtype, *flags)
        return made[key]

    return convert


def our_gguf(checkpoint: Path, out: Path, preset: str, *flags: str) -> Path:
    """Runs `convert-step35 run` and returns its output."""
    command = [sys.executable, "-m", "convert_step35", "run", str(checkpoint), str(out), "--type", preset, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


# comparison


def differences(ours: Path, theirs: Path, *, added: frozenset[str] = OUR_KEYS) -> list[str]:
    """Lists every difference in tensors and metadata; `added` keys must be in our file alone."""
    mine, other = GGUFReader(ours), GGUFReader(theirs)
    return [*_metadata_differences(mine, other, added), *_tensor_differences(mine.tensors, other.tensors)]


def _metadata(reader: GGUFReader) -> dict[str, tuple]:
    """Returns type and value of every key, less the reader's own `GGUF.*` counts."""
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return {k: (tuple(t.name for t in f.types), f.contents()) for k, f in fields.items()}


def _metadata_differences(
    ours: GGUFReader, theirs: GGUFReader, added: frozenset[str], ignored: Set[str] = frozenset()
) -> Iterator[str]:
    mine, other = _metadata(ours), _metadata(theirs)
    for key in sorted(added):
        if key not in mine or key in other:
            yield f"{key}: expected in our file alone"
    for key in sorted((mine.keys() | other.keys()) - added - ignored):
        if not _agree(key, mine.get(key), other.get(key)):
            yield f"{key}: upstream {str(other.get(key))[:200]}, ours {str(mine.get(key))[:200]}"


def _agree(key: str, ours: tuple | None, theirs: tuple | None) -> bool:
    if key in OUR_VALUES and ours and theirs:
        return ours[0] == theirs[0]
    return ours == theirs


def _tensor_differences(ours: Iterable[ReaderTensor], theirs: Iterable[ReaderTensor]) -> Iterator[str]:
    mine = {t.name: t for t in ours}
    other = {t.name: t for t in theirs}
    for name in sorted(mine.keys() ^ other.keys()):
        yield f"{name}: only {'ours' if name in mine else 'upstream'}"
    for name in sorted(mine.keys() & other.keys()):
        a, b = mine[name], other[name]
        if (a.tensor_type, *a.shape) != (b.tensor_type, *b.shape):
            yield f"{name}: upstream {b.tensor_type.name} {b.shape}, ours {a.tensor_type.name} {a.shape}"
        elif n := np.count_nonzero(a.data.view(np.uint8) != b.data.view(np.uint8)):
            yield f"{name}: {n} of {b.n_bytes} bytes differ ({b.tensor_type.name})"


# the bundled checkpoint


def test_chosen_differences_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text(encoding="utf-8")
    section = text.split("## Differences from upstream's files")[1].split("\n## ")[0]
    first_cells = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    names = {key: key.rpartition(".")[2] for key in OUR_KEYS | OUR_VALUES}  # a cell may cut a repeated prefix
    assert [key for key, name in names.items() if f"{name}`" not in first_cells] == []


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
def test_unquantized_file_is_upstreams(outtype, upstream_gguf, tmp_path):
    ours = our_gguf(BUNDLED, tmp_path / "ours.gguf", outtype.upper())
    assert differences(ours, upstream_gguf(BUNDLED, outtype)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_quantized_file_is_upstreams(preset, upstream_gguf, tmp_path):
    theirs = upstream.quantize(upstream_gguf(BUNDLED, "bf16"), tmp_path / "theirs.gguf", preset)
    assert differences(our_gguf(BUNDLED, tmp_path / "ours.gguf", preset), theirs) == []


@pytest.mark.parametrize("preset", ["BF16", "Q4_K_M"])
@pytest.mark.parametrize("mode, flag", [("drop", "--no-mtp"), ("only", "--mtp")])
def test_file_without_or_with_only_mtp_is_upstreams(mode, flag, preset, upstream_gguf, tmp_path):
    theirs = upstream_gguf(BUNDLED, "bf16", flag)
    if preset != "BF16":
        theirs = upstream.quantize(theirs, tmp_path / "theirs.gguf", preset)
    ours = our_gguf(BUNDLED, tmp_path / "ours.gguf", preset, "--mtp", mode)
    assert differences(ours, theirs) == []


def test_separate_files_are_upstreams(upstream_gguf, tmp_path):
    ours = our_gguf(BUNDLED, tmp_path / "ours.gguf", "Q4_K_M", "--mtp", "separate")
    for file, flag in ((ours, "--no-mtp"), (ours.with_name("mtp-ours.gguf"), "--mtp")):
        theirs = upstream.quantize(upstream_gguf(BUNDLED, "bf16", flag), tmp_path / "theirs.gguf", "Q4_K_M")
        assert differences(file, theirs) == []


def test_overridden_types_are_upstreams(upstream_gguf, tmp_path):
    """The first match wins, and the counters of the rules stand still for what is forced."""
    types = {
        "ffn_(up|gate)_exps": "IQ4_XS",
        r"blk\.[12]\.attn_v": "Q3_K",
        "attn_v": "Q8_0",
        "ffn_down_shexp": "Q4_K",
        "token_embd": "Q6_K",
    }
    forced = {pattern: GGMLQuantizationType[kind].value for pattern, kind in types.items()}
    theirs = upstream.quantize(upstream_gguf(BUNDLED, "bf16"), tmp_path / "theirs.gguf", "Q4_K_M", tensor_types=forced)
    flags = [flag for pattern, kind in types.items() for flag in ("--tensor-type", f"{pattern}={kind}")]
    assert differences(our_gguf(BUNDLED, tmp_path / "ours.gguf", "Q4_K_M", *flags), theirs) == []


def test_shards_hold_what_upstreams_hold(upstream_gguf, tmp_path):
    """Where a shard ends is each tool's own choice; keys and tensors of all shards together are the same."""
    whole = upstream.quantize(upstream_gguf(BUNDLED, "bf16"), tmp_path / "whole.gguf", "Q4_K_M")
    upstream.convert(BUNDLED, tmp_path / "split.gguf", "bf16", "--split-max-size", "12M")
    first = min(tmp_path.glob("split-00001-of-*.gguf"))
    upstream.quantize(first, tmp_path / "theirs", "Q4_K_M", keep_split=True)
    their_shards = sorted(tmp_path.glob("theirs-0*.gguf"))
    assert (
        convert_step35("run", BUNDLED, tmp_path / "ours.gguf", "--type", "Q4_K_M", "--split-max-size", "4MB").exit_code
        == 0
    )
    our_shards = sorted(tmp_path.glob("ours-0*.gguf"))
    assert len(our_shards) > 1 < len(their_shards)
    mine, theirs = ([GGUFReader(path) for path in paths] for paths in (our_shards, their_shards))
    split = {"split.no", "split.count", "split.tensors.count"}
    for i, shard in enumerate(mine):
        assert {key: types for key, (types, _) in _metadata(shard).items() if key in split} == {
            key: types for key, (types, _) in _metadata(theirs[0]).items() if key in split
        }
        assert [_metadata(shard)[key][1] for key in sorted(split)] == [len(mine), i, len(GGUFReader(whole).tensors)]
    assert [*_metadata_differences(mine[0], theirs[0], OUR_KEYS, split)] == []
    ours, others = ([tensor for shard in shards for tensor in shard.tensors] for shards in (mine, theirs))
    assert [*_tensor_differences(ours, others)] == [*_tensor_differences(ours, GGUFReader(whole).tensors)] == []


# importance matrices


@pytest.fixture(scope="session")
def imatrix(upstream_gguf, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Returns a random GGUF imatrix of every matrix, and the weights llama-quantize makes of it.

    The last expert of every stack was never hit: its weights are 1. The embedding has no entry.
    """
    file = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    writer = GGUFWriter(file, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    weights = {}
    for tensor in GGUFReader(upstream_gguf(BUNDLED, "bf16")).tensors:
        if tensor.tensor_type == GGMLQuantizationType.BF16 and tensor.name != "token_embd.weight":
            sums, counts = _random_statistics(tensor.name, tensor.shape)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", counts)
            weights[tensor.name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, weights


def _random_statistics(name: str, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(list(name.encode()))
    n_experts = int(shape[2]) if len(shape) == 3 else 1
    counts = rng.integers(1, 500, (n_experts, 1)).astype(np.float32)
    if n_experts > 1:
        counts[-1] = 0
    return rng.lognormal(0, 1, (n_experts, int(shape[0]))).astype(np.float32) * counts, counts


@pytest.mark.parametrize("preset", IMATRIX_PRESETS)
def test_file_quantized_with_an_imatrix_is_upstreams(preset, imatrix, upstream_gguf, tmp_path):
    file, weights = imatrix
    # What the llama-quantize tool adds around `llama_model_quantize`, started in the imatrix's folder.
    told = {"file": file.name, "dataset": "random", "entries_count": len(weights), "chunks_count": 1}
    keys = {f"quantize.imatrix.{name}": value for name, value in told.items()}
    source = upstream_gguf(BUNDLED, "bf16")
    theirs = upstream.quantize(source, tmp_path / "theirs.gguf", preset, imatrix=weights, keys=keys)
    ours = our_gguf(BUNDLED, tmp_path / "ours.gguf", preset, "--imatrix", str(file))
    assert differences(ours, theirs) == []


# other forms of the checkpoint, with random weights

PADDED = replace(TINY, moe_intermediate_size=320, hidden_size=448)  # FP8 blocks of 128 do not fill these


@pytest.mark.parametrize(
    "form, outtype, preset",
    [
        ({"dtype": "F32"}, "f32", "Q4_K_M"),
        ({"fp8_experts": True}, "f32", "Q4_K_M"),
        ({"fp8_experts": True, "shape": PADDED}, "f32", "F32"),
        ({"step37": True, "n_shards": 1}, "bf16", "Q4_K_M"),
        ({"step37": True, "fp8_experts": True}, "f32", "Q8_0"),
        ({"shape": replace(TINY, num_nextn_predict_layers=0)}, "bf16", "Q4_K_M"),
    ],
    ids=["f32", "fp8", "fp8-padded", "step37-one-file", "step37-fp8", "no-mtp"],
)
def test_other_checkpoint_forms_are_upstreams(form, outtype, preset, upstream_gguf, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "random", **form)
    theirs = upstream_gguf(checkpoint, outtype)
    if preset.lower() != outtype:
        theirs = upstream.quantize(theirs, tmp_path / "theirs.gguf", preset)
    assert differences(our_gguf(checkpoint, tmp_path / "ours.gguf", preset), theirs) == []


def test_f16_checkpoint_is_upstreams_but_for_its_norms(upstream_gguf, tmp_path):
    """Upstream adds the 1 of an F16 norm in F16; we add it in F32, as for every other dtype."""
    checkpoint = write_checkpoint(tmp_path / "random", dtype="F16")
    ours = our_gguf(checkpoint, tmp_path / "ours.gguf", "F16")
    found = differences(ours, upstream_gguf(checkpoint, "f16"))
    assert [line for line in found if "norm.weight: " not in line] == []
    norm = next(t.data for t in GGUFReader(ours).tensors if t.name == "output_norm.weight")
    (stored,) = random_weights("model.norm.weight", (TINY.hidden_size,), seed=0)
    assert np.array_equal(norm, stored.astype(np.float16).astype(np.float32) + 1)


def test_lists_cut_to_the_trunk_convert_as_the_full_ones(upstream_gguf, tmp_path):
    """Upstream pads such lists with full attention, and gives the MTP layers 64 heads for 96."""
    whole = write_checkpoint(tmp_path / "whole" / "random")
    cut = write_checkpoint(tmp_path / "cut" / "random", truncated_lists=True)
    ours = our_gguf(cut, tmp_path / "ours.gguf", "BF16")
    assert differences(ours, upstream_gguf(whole, "bf16")) == []


def test_declared_mtp_without_weights_converts_as_the_trunk_alone(upstream_gguf, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "random", mtp_weights=False)
    ours = our_gguf(checkpoint, tmp_path / "ours.gguf", "BF16")
    assert differences(ours, upstream_gguf(checkpoint, "bf16", "--no-mtp")) == []
