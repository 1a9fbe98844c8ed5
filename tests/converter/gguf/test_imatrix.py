"""An importance matrix reaches the quantizer, expert by expert, and a bad one is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoints import TINY, write_checkpoint
from convert_step35.cli.workspace import open_workspace
from convert_step35.errors import GgufError, PlanError
from convert_step35.gguf.imatrix import read_imatrix
from convert_step35.models import load_models
from convert_step35.planning.plan import MtpMode
from convert_step35.quantization.libggml import load_ggml

SMALL = replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=1)
NAME = "blk.3.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("imatrix") / "small", SMALL)


def write_imatrix(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Write llama-imatrix's GGUF form: name -> (sums [n, columns], counts [n])."""
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_array("imatrix.datasets", ["some text"])
    writer.add_uint32("imatrix.chunk_count", 7)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(name + ".in_sum2", sums.astype(np.float32))
        writer.add_tensor(name + ".counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums(n: int, columns: int = 256) -> np.ndarray:
    return np.random.default_rng(35).lognormal(size=(n, columns)).astype(np.float32)


def run(checkpoint: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert_step35", "run", str(checkpoint), str(out), "--json", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_each_expert_is_quantized_with_its_own_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Expected bytes: ggml called by hand on the whole expert; expert 5 was never hit and takes neutral weights."""
    counts = np.array([3, 1, 4, 1, 5, 0, 2, 6])
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {NAME: (sums(8), counts)})
    assert run(checkpoint, tmp_path / "f32.gguf", "--type", "F32").returncode == 0
    done = run(checkpoint, tmp_path / "out.gguf", "--type", "Q4_K", "--imatrix", str(imatrix))
    assert done.returncode == 0, done.stderr
    exact, packed = (_tensor(tmp_path / name, NAME) for name in ("f32.gguf", "out.gguf"))
    for expert, count in enumerate(counts):
        weights = sums(8)[expert] / np.float32(count) if count else np.ones(256, np.float32)
        want = np.empty(packed[expert].nbytes, np.uint8)
        load_ggml().quantize(gguf.GGMLQuantizationType.Q4_K, np.ascontiguousarray(exact[expert]), want, weights)
        np.testing.assert_array_equal(packed[expert].reshape(-1), want)
    plain = run(checkpoint, tmp_path / "plain.gguf", "--type", "Q4_K")
    assert plain.returncode == 0 and not np.array_equal(_tensor(tmp_path / "plain.gguf", NAME), packed)


def _tensor(path: Path, name: str) -> np.ndarray:
    return next(t.data for t in gguf.GGUFReader(path).tensors if t.name == name)


def test_the_file_says_which_imatrix_made_it(checkpoint: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "wiki.gguf", {NAME: (sums(8), np.ones(8))})
    done = run(checkpoint, tmp_path / "out.gguf", "--type", "Q4_K_S", "--imatrix", str(imatrix))
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    want = {"file": "wiki.gguf", "dataset": "some text", "entries_count": 1, "chunks_count": 7}
    assert {key: fields[f"quantize.imatrix.{key}"].contents() for key in want} == want
    assert any("no entry for" in note for note in json.loads(done.stdout)["notes"])


@pytest.mark.slow
def test_a_low_bit_type_is_made_where_the_imatrix_has_every_tensor(checkpoint: Path, tmp_path: Path) -> None:
    entries = {NAME: (sums(8), np.ones(8))}
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", entries)
    option = ("--type", "Q8_0", "--tensor-type", "ffn_down_exps=IQ2_XXS", "--imatrix", str(imatrix))
    assert run(checkpoint, tmp_path / "out.gguf", *option).returncode == 0
    refused = run(
        checkpoint,
        tmp_path / "no.gguf",
        "--type",
        "Q8_0",
        "--tensor-type",
        "ffn_up_exps=IQ2_XXS",
        "--imatrix",
        str(imatrix),
    )
    assert (
        refused.returncode == 1 and "imatrix needed" in refused.stderr and "blk.3.ffn_up_exps.weight" in refused.stderr
    )
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_no_statistics_can_have_are_refused(tmp_path: Path, bad: float) -> None:
    values = sums(8)
    values[3, 100] = bad
    with pytest.raises(PlanError, match=f"sums of {NAME} expected finite numbers"):
        read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", {NAME: (values, np.ones(8))}))


def test_an_imatrix_of_another_model_names_the_tensor(checkpoint: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {NAME: (sums(4), np.ones(4))})
    with pytest.raises(PlanError, match=rf"another model: .*{NAME} expected \(8, 256\) .*, got \(4, 256\)"):
        open_workspace(checkpoint, load_models(), mtp=MtpMode.KEEP, imatrix_path=imatrix)


def test_a_file_that_is_no_imatrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.dat").write_text("not a matrix")
    with pytest.raises(GgufError, match="text.dat"):
        read_imatrix(tmp_path / "text.dat")
    with pytest.raises(PlanError, match="not an imatrix"):
        read_imatrix(write_imatrix(tmp_path / "empty.gguf", {}))
