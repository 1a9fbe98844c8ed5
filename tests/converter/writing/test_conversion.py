"""What a run writes: the same bytes whatever the threads and whenever it was killed, and nothing when it can't."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoints import TINY, write_checkpoint
from convert_step35.cli.workspace import fingerprint, open_workspace
from convert_step35.errors import CheckpointError, OutputError
from convert_step35.models import load_models
from convert_step35.planning.chunks import CHUNK_WEIGHTS, chunks, n_chunks
from convert_step35.planning.plan import ConversionOptions, MtpMode
from convert_step35.quantization.libggml import load_ggml
from convert_step35.quantization.quantizers import load_quantizers
from convert_step35.source.mapping import Kind, MappedTensor
from convert_step35.writing import conversion
from convert_step35.writing.conversion import Tools, convert
from convert_step35.writing.journal import Journal, drop_journal, journal_path

MODELS = load_models()
SMALL = replace(TINY, num_hidden_layers=5, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small", SMALL)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run with one thread."""
    out = tmp_path_factory.mktemp("expected") / "out.gguf"
    run(checkpoint, out, n_threads=1)
    return digest(out)


def run(
    folder: Path, out: Path, *, type_name: str = "Q4_K_S", n_threads: int = 2, on_progress: Callable = lambda *_: None
) -> list:
    workspace = open_workspace(folder, MODELS, mtp=MtpMode.KEEP)
    plan = workspace.plan(ConversionOptions(out, type_name), MODELS)
    prints = fingerprint(workspace, plan, load_ggml())
    tools = Tools(workspace.checkpoint, load_quantizers(), None, n_threads, on_progress)
    return convert(plan, journal_path(out), prints, tools, lambda results: None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Interrupt:
    """Stops a run after some chunks, as Ctrl-C does; counts the chunks it saw."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def __call__(self, *_: object) -> None:
        self.seen += 1
        if self.seen > self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_output_does_not_depend_on_the_number_of_threads(checkpoint: Path, expected: str, tmp_path: Path) -> None:
    for n_threads in (2, 5):
        run(checkpoint, tmp_path / f"{n_threads}.gguf", n_threads=n_threads)
        assert digest(tmp_path / f"{n_threads}.gguf") == expected


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 17, 60])
def test_an_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Path, expected: str, tmp_path: Path, after: int
) -> None:
    out, counter = tmp_path / "out.gguf", Interrupt(10**9)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, out, n_threads=1, on_progress=Interrupt(after))
    assert not out.exists()
    results = run(checkpoint, out, on_progress=counter)
    assert digest(out) == expected
    assert counter.seen == sum(n_chunks(result.tensor.mapped) for result in results) - after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]


@pytest.mark.slow
def test_a_torn_journal_and_unsynced_data_end_with_the_same_bytes(
    checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    """Symptom of a bad resume: chunks that were not journalled keep what the crash left in the file."""
    rng = random.Random(35)
    for n_lost in (1, 35, 36, 400, 10**6):
        out = tmp_path / f"{n_lost}.gguf"
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, out, on_progress=Interrupt(40))
        journal = journal_path(out).read_bytes()
        journal_path(out).write_bytes(journal[: max(0, len(journal) - n_lost)])
        partial = out.with_name(out.name + ".partial")
        data = bytearray(partial.read_bytes())
        for _ in range(50):
            data[rng.randrange(len(data))] ^= 0xFF
        partial.write_bytes(data)
        run(checkpoint, out)
        assert digest(out) == expected


@pytest.mark.slow
def test_kill_9_at_any_moment_then_the_same_command_ends_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "convert_step35",
        "run",
        str(checkpoint),
        str(tmp_path / "out.gguf"),
        "--type",
        "IQ4_XS",
        "--threads",
        "1",
    ]
    n_kills = 0
    for wait_s in (0.3, 0.8, 1.3, 1.8, 2.4, 3.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        try:
            assert process.wait(wait_s) == 0, process.stderr.read()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            n_kills += 1
            if not journal_path(tmp_path / "out.gguf").exists() and (tmp_path / "out.gguf").exists():
                break  # it had ended, and only its exit was cut short
        finally:
            process.stderr.close()
    else:
        subprocess.run(command, check=True, capture_output=True)
    assert n_kills > 0
    run(checkpoint, tmp_path / "whole.gguf", type_name="IQ4_XS")
    assert digest(tmp_path / "out.gguf") == digest(tmp_path / "whole.gguf")
    assert not journal_path(tmp_path / "out.gguf").exists()


def test_killed_between_publishing_and_the_journals_end_the_run_just_finishes(
    checkpoint: Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Journal) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "remove", killed)
        run(checkpoint, tmp_path / "out.gguf")
    counter = Interrupt(10**9)
    run(checkpoint, tmp_path / "out.gguf", on_progress=counter)
    assert counter.seen == 0 and digest(tmp_path / "out.gguf") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]


def test_a_changed_recipe_does_not_resume_and_says_what_changed(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out.gguf", on_progress=Interrupt(5))
    with pytest.raises(OutputError, match=r"can't resume .*recipe was Q4_K_S, is Q8_0.*--restart"):
        run(checkpoint, tmp_path / "out.gguf", type_name="Q8_0")


def test_a_touched_input_does_not_resume(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", SMALL)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out.gguf", on_progress=Interrupt(5))
    os.utime(folder / "model-00001.safetensors", ns=(0, 0))
    with pytest.raises(OutputError, match="can't resume .*modification times"):
        run(folder, tmp_path / "out.gguf")


def test_two_runs_for_one_output_exclude_each_other(checkpoint: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "out.gguf.journal", {"recipe": "x"}):
        with pytest.raises(OutputError, match="already running"):
            run(checkpoint, tmp_path / "out.gguf")
        with pytest.raises(OutputError, match="already running"):
            drop_journal(tmp_path / "out.gguf.journal")


@pytest.mark.slow
def test_a_full_disk_is_refused_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: both fail when the space is reserved."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    command = [
        sys.executable,
        "-m",
        "convert_step35",
        "run",
        str(checkpoint),
        str(tmp_path / "out.gguf"),
        "--type",
        "Q8_0",
    ]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "disk full" in done.stderr and time.monotonic() - start < 60
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_checkpoint_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", SMALL, dtype="F32", n_shards=1)
    stored = (
        open_workspace(folder, MODELS, mtp=MtpMode.KEEP).checkpoint.sources["model.layers.3.moe.up_proj.weight"].weight
    )
    with stored.path.open("r+b") as file:
        file.seek(stored.offset + 4 * 70000)
        file.write(np.float32(np.nan).tobytes())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"non-finite weight: model\.layers\.3\.moe\.up_proj\.weight"):
        run(folder, tmp_path / "out" / "out.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_returns_other_bytes_is_caught_when_a_run_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out.gguf", on_progress=Interrupt(40))
    read = conversion.Output.read

    def flipped(self, index: int, data: np.ndarray, offset: int) -> None:
        read(self, index, data, offset)
        data[0] ^= 1

    monkeypatch.setattr(conversion.Output, "read", flipped)
    with pytest.raises(OutputError, match="the disk returns other bytes"):
        run(checkpoint, tmp_path / "out.gguf")


@pytest.mark.slow
def test_the_reported_errors_are_those_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """Recomputed in float64 from a float32 conversion and gguf-py's own dequantization."""
    f32, q4 = tmp_path / "f32.gguf", tmp_path / "q4.gguf"
    run(checkpoint, f32, type_name="F32")
    results = {result.tensor.mapped.name: result for result in run(checkpoint, q4, type_name="Q4_K_S")}
    exact = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(f32).tensors}
    for tensor in gguf.GGUFReader(q4).tensors:
        restored = (
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(exact[tensor.name].shape)
        )
        error, values = restored - exact[tensor.name], exact[tensor.name]
        got = results[tensor.name].errors
        nmse = (error**2).sum() / (values**2).sum()
        assert got.nmse == pytest.approx(nmse, rel=1e-4, abs=1e-12)
        assert got.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-5, abs=1e-12)
        assert results[tensor.name].sha256 == hashlib.sha256(tensor.data.tobytes()).hexdigest()
        if values.ndim == 3:
            per_expert = (error**2).sum(axis=(1, 2)) / (values**2).sum(axis=(1, 2))
            assert got.worst_expert == int(per_expert.argmax())
            assert got.worst_expert_nmse == pytest.approx(per_expert.max(), rel=1e-4)


def test_chunks_cover_every_row_once_and_never_cross_an_expert() -> None:
    for shape in [(7,), (3, 256), (5000, 256), (3, 1280, 4096), (2, 700, 300), (2, 1, 600_000)]:
        tensor = MappedTensor("t", "t", shape, Kind.MATRIX)
        n_per_expert = shape[1] if len(shape) == 3 else shape[0] if len(shape) == 2 else 1
        row = 0
        for chunk in chunks(tensor):
            assert chunk.first_row == row and chunk.n_rows > 0
            assert chunk.first_row // n_per_expert == (row + chunk.n_rows - 1) // n_per_expert == chunk.expert
            assert chunk.n_rows == 1 or chunk.n_rows * shape[-1] <= CHUNK_WEIGHTS
            row += chunk.n_rows
        assert row * shape[-1] == np.prod(shape)


@pytest.mark.slow
def test_private_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """A gigabyte of expert stacks converts with 320 MB of data segment in all, interpreter and threads included."""
    shape = replace(
        TINY,
        num_hidden_layers=4,
        num_nextn_predict_layers=0,
        hidden_size=2048,
        moe_intermediate_size=1024,
        moe_num_experts=80,
    )
    folder = write_checkpoint(tmp_path / "c", shape, sparse=True)
    command = [
        sys.executable,
        "-m",
        "convert_step35",
        "run",
        str(folder),
        str(tmp_path / "out.gguf"),
        "--type",
        "Q8_0",
        "--json",
    ]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (320 * 10**6, 320 * 10**6))

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert max(entry["n_bytes"] for entry in report["tensors"]) > 170 * 10**6
