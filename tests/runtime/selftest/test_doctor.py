"""The doctor finds what is wrong and says what to do; a box and an engine of the test's making stand in."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import planned_gguf
from checkpoints import REAL
from made_up_reference import reference_logits
from step35.errors import DoesNotFit, NativeError
from step35.options import EngineOptions
from step35.planning.hardware import Memory, Sources, probe
from step35.planning.machine import GIB, Machine
from step35.planning.model_header import Headers, read_header, read_headers
from step35.selftest import synthetic_model
from step35.selftest.doctor import (
    CANARY,
    Finding,
    arithmetic,
    devices,
    disk,
    examine,
    examine_model,
    holes,
    memory,
    self_test,
)
from step35.selftest.trial import LISTING, Crashed, Trial, made_up_logits
from tiny_model import tiny_gguf

FIRST_WEIGHTS = [-0.32410097122192383, -0.08300900459289551, 0.8700135946273804]


def a_box(files=None, *, available=60, backends=(), nodes=None):
    """A box without GPUs; `nodes` are its device files, and whether this user may open them."""
    memory = Memory(64 * GIB, available * GIB)
    return Sources(
        (files or {}).get,
        list,
        lambda n_threads: 50e9,
        8,
        "Linux",
        lambda: memory,
        gpu_backends=lambda: backends,
        may_open=(nodes or {}).get,
    )


class FakeEngine:
    """Gives a token after a prompt; counts how it was decoded. It is its own trunk."""

    def __init__(self, n_vocab, answer):
        self.prompt = []
        self.n_vocab, self.answer = n_vocab, answer

    @property
    def trunk(self) -> "FakeEngine":
        return self

    def truncate(self, seq, n_keep):
        self.prompt.clear()

    def decode(self, rows):
        self.prompt.append(list(rows[0].tokens))

    def logits(self):
        logits = np.zeros((1, self.n_vocab), np.float32)
        logits[0, self.answer(self.prompt)] = 1
        return logits

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("real") / "real.gguf", REAL, "MOE_IQ3_S_IQ4_XS"))


def test_a_healthy_installation_and_model_have_no_remedies():
    findings = list(examine(a_box(), tiny_gguf("Q4_K_M"), _engine))
    box = ["llama-cpp-python", "backend", "memory", "GPU", "load mode", "arithmetic"]
    assert [f.what for f in findings] == [*box, "MTP heads", "disk", "data", "size", "self-test"]
    assert all(f.is_well for f in findings), findings


def _engine(options, headers):
    from step35.engine.engine import Engine

    return Engine(options, headers)


def test_the_canary_is_the_published_one(real):
    def engine(answer):
        return lambda *_: FakeEngine(real.shape.n_vocab, answer)

    options = EngineOptions(real.path)
    asked = []
    good = self_test(Headers(real), options, engine(lambda prompt: asked.append(prompt[0]) or CANARY[1]))
    assert good.is_well
    assert asked == [CANARY[0]]
    bad = self_test(Headers(real), options, engine(lambda prompt: 7))
    assert "gives 7, published 11111" in bad.found
    assert not bad.is_well


def test_a_model_that_decodes_differently_in_two_steps_is_found():
    headers = read_headers(tiny_gguf())
    finding = self_test(headers, EngineOptions(tiny_gguf()), lambda *_: FakeEngine(headers.model.shape.n_vocab, len))
    assert "another token" in finding.remedy


def test_the_known_logits_are_the_torch_references():
    """The golden comes from an implementation that shares nothing with llama.cpp; bench/known_logits.py writes it."""
    known, logits = synthetic_model.known_logits(), reference_logits()
    assert known.best == logits.argmax()
    assert known.spread == pytest.approx(logits.std(), rel=1e-3)
    assert all(logits[token] == pytest.approx(value, abs=2e-4) for token, value in known.logits.items())
    assert len(known.logits) >= 12


def test_llama_cpp_that_computes_something_else_is_found():
    """As a driver does that breaks one kernel: the token is right, the logits are not."""
    known = synthetic_model.known_logits()
    engine = FakeEngine(synthetic_model.N_VOCAB, lambda prompt: known.best)
    finding = arithmetic(lambda: Trial(made_up_logits(lambda *_: engine)))
    assert not finding.is_well
    assert f"gives token {known.best} (known {known.best}), logits off by at most" in finding.found
    assert "another driver" in finding.remedy


def test_an_engine_that_cannot_be_loaded_is_a_finding():
    def full():
        raise DoesNotFit("doesn't fit: RAM expected less")

    assert arithmetic(full) == Finding("arithmetic", "doesn't fit: RAM expected less", arithmetic(full).remedy)
    assert not arithmetic(full).is_well


def test_a_driver_that_crashes_is_a_finding():
    """Symptom: the doctor itself died of it, without a word."""

    def crash():
        raise Crashed("llama.cpp crashed with signal 11 (SIGSEGV) on AMD Radeon 8060S")

    finding = arithmetic(crash)
    assert finding.found.endswith("signal 11 (SIGSEGV) on AMD Radeon 8060S")
    assert finding.remedy.startswith("try another driver")


def test_a_driver_that_crashes_when_it_is_listed_ends_the_examination():
    def crash():
        raise Crashed(f"llama.cpp crashed with signal 6 (SIGABRT) {LISTING}")

    def never():
        raise AssertionError("listed in the doctor's own process")

    findings = list(examine(replace(a_box(), devices=never), tiny_gguf(), _engine, crash))
    assert [f.what for f in findings] == ["llama-cpp-python", "backend", "arithmetic"]


def test_the_gpu_that_computed_is_named():
    known = synthetic_model.known_logits()
    logits = np.full(synthetic_model.N_VOCAB, -1e3, np.float32)
    logits[list(known.logits)] = list(known.logits.values())
    assert arithmetic(lambda: Trial(logits, ("vulkan",), ("AMD Radeon 8060S",))).found.endswith(", on AMD Radeon 8060S")
    assert arithmetic(lambda: Trial(logits)).found.endswith("off by at most 0.0%")


def test_the_made_up_weights_are_the_same_everywhere():
    values = synthetic_model.tensors()
    assert values["token_embd.weight"][0, :3].tolist() == pytest.approx(FIRST_WEIGHTS, abs=1e-7)
    assert sum(v.size for v in values.values()) < 2_000_000


def test_a_model_that_is_too_large_is_not_loaded(real):
    machine = Machine("small", "", 2, 1, 8 * GIB, 8 * GIB, 0, 1e10, (), "none")

    def never(*_):
        raise AssertionError("loaded")

    last = list(examine_model(real.path, machine, never))[-1]
    assert last.what == "size"
    assert "step35 plan" in last.remedy


def test_a_damaged_file_is_found(tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf().read_bytes()[:100_000])
    finding = list(examine_model(cut, probe(a_box()), _engine))
    assert [f.what for f in finding] == ["file"]
    assert "download it again" in finding[0].remedy


def test_a_gpu_that_llama_cpp_was_not_built_for_is_found():
    box = a_box({"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX 580.1\nGCC"})
    finding = devices(box, probe(box))
    assert "NVRM version" in finding.found
    assert "step35 backend build --cuda" in finding.remedy


DRIVER = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX 580.1\nGCC"}
NODE = "/dev/dri/renderD128"


@pytest.mark.parametrize(
    ("backends", "files", "nodes", "found", "remedy"),
    [
        (
            ["vulkan"],
            {},
            {NODE: False},
            f"may not read and write {NODE}",
            "usermod -aG render,video $USER, then log in",
        ),
        (["hip"], {}, {NODE: True, "/dev/kfd": False}, "may not read and write /dev/kfd", "usermod -aG render"),
        (["vulkan"], {}, {NODE: True}, f"{NODE} is there, but no driver", "mesa-vulkan-drivers"),
        (["hip"], {}, {NODE: True}, "no driver", "install ROCm"),
        (["cuda"], {}, {NODE: True}, "no driver", "backend build --vulkan"),
        (["cuda"], DRIVER, {}, "NVRM version: NVIDIA UNIX 580.1), but no /dev/nvidia0", "--gpus all"),
        (["cuda"], DRIVER, {"/dev/nvidia0": True}, "no device that llama.cpp can use", "update the driver"),
        (["vulkan"], DRIVER, {"/dev/nvidia0": True}, "no device that llama.cpp can use", "backend build --cuda"),
        (["cuda"], {}, {}, "no driver and no device file", "backend use stock"),
        (["metal"], {}, {}, "Metal lists no device", "backend use stock"),
    ],
)
def test_a_build_for_gpus_that_finds_none_is_found(backends, files, nodes, found, remedy):
    """Symptom: somebody outside the render group runs on the CPU and is told that all is well."""
    box = a_box(files, backends=backends, nodes=nodes)
    finding = devices(box, probe(box))
    assert finding.found.startswith(f"none, though llama.cpp is built for {backends[0]}: ")
    assert found in finding.found
    assert remedy in finding.remedy


def test_a_build_for_the_cpu_needs_no_gpu():
    box = a_box(nodes={NODE: False})
    assert devices(box, probe(box)) == Finding("GPU", "none")


def test_a_full_memory_is_found():
    assert memory(a_box(), probe(a_box())).is_well
    assert not memory(a_box(available=1), probe(a_box(available=1))).is_well


def test_a_slow_disk_is_found(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(10**6))
    ticks = iter([0.0, 1.0])
    finding = disk(path, 100 * GIB, clock=lambda: next(ticks))
    assert finding.found.startswith("1 MB/s")
    assert "faster disk" in finding.remedy


def test_a_missing_symbol_ends_the_examination(monkeypatch):
    def missing():
        raise NativeError("libllama lacks llama_x")

    monkeypatch.setattr("step35.selftest.doctor.installation", missing)
    findings = list(examine(a_box(), None, _engine))
    assert [f.what for f in findings] == ["llama-cpp-python"]


@pytest.mark.parametrize(
    "failure",
    [
        "OSError('libcudart.so.12: cannot open shared object file')",
        "RuntimeError('Failed to load shared library libllama.so')",
        "AttributeError('undefined symbol: llama_x')",
        "ImportError('No module named llama_cpp')",
    ],
)
@pytest.mark.parametrize("command", [["doctor"], ["generate", "x.gguf", "-p", "x"]], ids=lambda command: command[0])
def test_a_llama_cpp_that_cannot_be_imported_is_one_line(tmp_path, command, failure):
    """Symptom: the doctor itself ends with a traceback on the very box that needs it."""
    (tmp_path / "llama_cpp.py").write_text(f"raise {failure}")
    boot = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from step35.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", boot, *command], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stdout if command == ["doctor"] else done.stderr
    assert f"can't load llama-cpp-python: {failure.split(chr(39))[1]}; install what is missing" in said.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_a_file_with_holes_is_found(tmp_path):
    """Symptom: a download that made room first and then broke off has the right size, and gives garbage."""
    data = bytearray(tiny_gguf().read_bytes())
    (tmp_path / "whole.gguf").write_bytes(data)
    data[-1_000_000:-200_000] = bytes(800_000)
    (tmp_path / "holes.gguf").write_bytes(data)
    assert holes([tmp_path / "whole.gguf"]).is_well
    assert "download the file again" in holes([tmp_path / "holes.gguf"]).remedy


def test_a_side_file_alone_is_told_from_a_model():
    found = list(examine_model(tiny_gguf(mtp="only"), probe(a_box()), _engine))
    assert [f.what for f in found] == ["file"]
    assert "holds only MTP heads" in found[0].found


def test_a_model_that_does_not_load_is_a_finding():
    def broken(*_):
        raise NativeError("can't open a context")

    last = list(examine_model(tiny_gguf(), probe(a_box()), broken))[-1]
    assert (last.what, last.found) == ("self-test", "can't open a context")
    assert "convert-step35 inspect" in last.remedy


def test_a_model_for_which_the_gpu_is_too_full_is_no_damaged_file():
    def full(*_):
        raise DoesNotFit("can't load x.gguf: unable to allocate Vulkan0 buffer; the GPU's memory is full")

    last = list(examine_model(tiny_gguf(), probe(a_box()), full))[-1]
    assert last.what == "size"
    assert "step35 plan" in last.remedy


def test_the_command_exits_1_on_a_bad_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    done = subprocess.run(
        [sys.executable, "-m", "step35.cli", "doctor", str(tmp_path / "x.gguf"), "--json"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    assert data["ok"] is False
    assert data["findings"][-1]["what"] == "file"
