"""Planning without being asked: the engine gets a plan for the box at hand, and the user's own settings win."""

import os
from pathlib import Path

import pytest

import planned_gguf
from checkpoints import REAL, TINY
from step35.errors import DoesNotFit, ModelError
from step35.native.device_kinds import DISCRETE, Device
from step35.planning import hardware
from step35.planning.autoplan import DEFAULT_CTX, EnginePlan, auto_plan
from step35.planning.hardware import Memory, Sources
from step35.planning.machine import GIB
from step35.planning.model_header import read_header, read_headers

CARD = Device("NVIDIA GeForce RTX 4090", DISCRETE, 24 * GIB, 23 * GIB, None)


class Box:
    """A box made up for planning; tells how often its bandwidth was measured."""

    def __init__(self, *devices: Device, available: int = 120) -> None:
        self.n_measured = 0
        memory = Memory(128 * GIB, available * GIB)
        self.sources = Sources({}.get, lambda: list(devices), self._measure, 8, "Linux", lambda: memory)

    def _measure(self, n_threads: int) -> float:
        self.n_measured += 1
        return 75e9


def planned(model: Path, sources: Sources, **settings) -> EnginePlan:
    return auto_plan(read_headers(model), sources, **settings)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return planned_gguf.write(tmp_path_factory.mktemp("auto") / "real.gguf", REAL, "MOE_IQ4_XS")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return planned_gguf.write(tmp_path_factory.mktemp("auto") / "tiny.gguf", TINY, "Q4_K_M")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.parametrize("devices", [(), (CARD,)], ids=["no GPU", "a GPU"])
def test_a_small_model_is_planned_without_measuring_and_without_a_word(tiny, devices):
    box = Box(*devices)
    plan = planned(tiny, box.sources)
    assert (box.n_measured, plan.note) == (0, None)
    assert plan.options.n_ctx == min(DEFAULT_CTX, read_header(tiny).shape.n_ctx_train)
    assert not plan.options.overrides


@pytest.mark.slow
def test_a_split_is_planned_with_the_measured_bandwidth_and_said(real):
    box = Box(CARD)
    plan = planned(real, box.sources)
    assert box.n_measured == 1
    assert plan.options.overrides
    assert plan.note is not None and plan.note.startswith("planned split: ")
    assert "of the routed experts on the GPU, the rest in RAM" in plan.note
    assert int(os.environ["GGML_OP_OFFLOAD_MIN_BATCH"]) > 32


def test_what_was_asked_for_wins(real):
    given = {"n_ctx": 8192, "n_batch": 256, "n_threads": 3, "kv_type": "q8_0", "load_mode": "mmap", "n_sessions": 2}
    options = planned(real, Box(CARD).sources, **given).options
    assert {name: getattr(options, name) for name in given} == given
    assert options.overrides


def test_layers_placed_by_hand_are_left_alone(real):
    options = planned(real, Box(CARD).sources, n_gpu_layers=7, n_batch=None).options
    assert (options.n_gpu_layers, options.overrides, options.n_batch) == (7, (), 512)


@pytest.mark.slow
def test_a_context_nobody_asked_for_is_shortened_and_one_asked_for_is_refused(real):
    plan = planned(real, Box(available=108).sources, draft="off")
    assert plan.options.n_ctx < DEFAULT_CTX
    assert plan.note is not None
    assert f"context {plan.options.n_ctx} instead of {DEFAULT_CTX}, the longest that fits" in plan.note
    with pytest.raises(DoesNotFit, match=r"doesn't fit: RAM expected .* needs .*; try ctx \d+"):
        planned(real, Box(available=108).sources, draft="off", n_ctx=200_000)


@pytest.mark.slow
def test_a_box_that_is_too_small_says_what_would_fit(real):
    with pytest.raises(DoesNotFit, match="try recipe MOE_"):
        planned(real, Box(available=100).sources)


def test_drafting_off_plans_without_heads(real):
    assert planned(real, Box().sources, draft="off").options.draft == "off"


def test_a_script_gets_a_plan_and_its_own_settings_win(tiny, monkeypatch):
    from step35 import llama

    monkeypatch.setattr(llama, "before_loading", lambda: Box(CARD).sources)
    given = {"n_threads": 3, "use_mmap": True, "type_k": 8, "type_v": 8, "verbose": False}
    options = llama._auto_plan(read_headers(tiny), "auto", llama._settings(given), given).options
    assert (options.n_threads, options.load_mode, options.kv_type) == (3, "auto", "q8_0")
    assert options.n_ctx == DEFAULT_CTX
    by_hand = {"n_gpu_layers": 2, "n_ctx": 0}
    options = llama._auto_plan(read_headers(tiny), "off", llama._settings(by_hand), by_hand).options
    assert (options.n_gpu_layers, options.n_ctx) == (2, 262144)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="no model file: .*none.gguf doesn't exist or isn't a file"):
        planned(tmp_path / "none.gguf", Box().sources)


def test_an_unknown_memory_is_not_planned_for(tiny):
    sources = Sources(lambda path: None, list, lambda n: 1e9, 4, "Plan9")
    assert planned(tiny, sources, n_ctx=1024).options.n_ctx == 1024


def test_gpus_are_listed_by_a_child(monkeypatch):
    """Symptom: ggml had read its environment before the plan's threshold of op offload was set."""
    from step35.native import devices

    asked = []
    monkeypatch.setattr(devices, "may_have_gpus", lambda: True)
    monkeypatch.setattr(devices, "devices", lambda: asked.append(1) or [])
    assert hardware.before_loading().devices() == []
    assert not asked
    assert hardware.before_loading().read("/nonexistent") is None


def test_an_integrated_gpu_beside_a_card_is_not_used():
    """llama.cpp takes integrated GPUs only where there is no other."""
    igpu = Device("AMD Radeon 610M", "integrated", 8 * GIB, 8 * GIB, None)
    machine = hardware.probe(Box(igpu, CARD).sources)
    assert [gpu.name for gpu in machine.gpus] == [CARD.name]
    assert not machine.is_unified
