"""A placement applied: what llama.cpp is told, and where the tensors then are."""

import ctypes
import logging
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planned_gguf
from checkpoints import REAL, TINY
from step35.errors import DoesNotFit, SettingsError
from step35.llama import Llama
from step35.native import library
from step35.native.device_kinds import DISCRETE
from step35.native.model import Model
from step35.options import EngineOptions, ModelOptions
from step35.planning.admission import MemoryDemand, drop_from_page_cache, memory_demand
from step35.planning.context_memory import Run
from step35.planning.llama_options import engine_options, environment, layout_of, overrides, run_of
from step35.planning.machine import GIB, Gpu, Machine, known_machines
from step35.planning.memory_usage import HOST, Layout
from step35.planning.model_header import Group, LayerShape, read_header, read_headers, read_model
from step35.planning.placement import Constraints, place
from step35.planning.plan_file import to_text
from tiny_model import tiny_gguf


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("real") / "real.gguf", REAL, "MOE_IQ4_XS"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TINY, "Q4_K_M"))


def box(ram: int, *gpu_bytes: int) -> Machine:
    gpus = tuple(Gpu("a GPU", DISCRETE, n, n, 1e12, 25e9, 1e14, 0) for n in gpu_bytes)
    return Machine("a box", "", 8, 1, ram, ram, 0, 75e9, gpus, "none")


def need(options: EngineOptions, machine: Machine) -> MemoryDemand:
    return memory_demand(options, read_headers(options.model, options.mtp), machine)


# what llama.cpp is told


@pytest.mark.parametrize("name", ["rtx4090-24+128", "rtx3090x2+128", "h100-80"])
def test_the_patterns_match_exactly_the_tensors_planned_for_the_host(real, name):
    placement = place(real, known_machines()[name], Constraints(n_ctx=32768)).placement
    patterns = [pattern for pattern, _ in overrides(placement.layout)]
    on_host = {t.name for t in real.tensors if placement.layout.device_of(t) == HOST and t.group is not Group.EMBEDDING}
    assert on_host
    assert {t.name for t in real.tensors if any(re.search(p, t.name) for p in patterns)} == on_host


def test_nothing_is_overridden_where_one_device_holds_everything(real):
    for name in ("h200-141", "cpu-192", "mac-studio-128"):
        assert overrides(place(real, known_machines()[name], Constraints(n_ctx=32768)).placement.layout) == ()


def spread(options: ModelOptions, n_blocks: int, n_gpus: int) -> list[str]:
    """Returns where llama.cpp puts a file's layers and output (src/llama-model.cpp, load_tensors), in its floats."""
    n_on_gpu = n_blocks + 1 if options.n_gpu_layers < 0 else min(options.n_gpu_layers, n_blocks + 1)
    first = max(n_blocks + 1 - options.n_gpu_layers, 0) if options.n_gpu_layers >= 0 else 0
    shares = np.zeros(n_gpus, np.float32)
    shares[: len(options.tensor_split)] = options.tensor_split
    bounds = np.cumsum(shares if shares.any() else np.ones(n_gpus, np.float32), dtype=np.float32)
    bounds /= bounds[-1]
    positions = [np.float32(i) / np.float32(n_on_gpu) for i in range(n_blocks + 1 - first)]
    at = [np.searchsorted(bounds, position, "right") for position in positions]
    return [HOST] * first + [f"GPU{i}" for i in at]


@settings(deadline=None)
@given(st.integers(0, 20), st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(lambda n: sum(n) > 1), st.data())
def test_layers_and_output_lie_where_planned(tiny, n_on_host, counts, data):
    """Several GPUs or one of several, GPUs that get nothing, layers on the host before the others."""
    places = [HOST] * n_on_host + [f"GPU{i}" for i, n in enumerate(counts) for _ in range(n)]
    layout = Layout(tuple(places[:-1]), ((),) * (len(places) - 1), places[-1])
    header = replace(tiny, n_blocks=len(places) - 1)
    placement = replace(place(tiny, box(64 * GIB), Constraints(n_ctx=512)).placement, layout=layout)
    options = engine_options(placement, header).load(tiny.path, with_heads=True)
    assert spread(options, header.n_blocks, len(counts) + data.draw(st.integers(0, 2))) == places


@st.composite
def planned(draw: st.DrawFn) -> tuple[Layout, int, int, bool]:
    """A layout as plans have them, the layers of the trunk and those its file declares, and whether heads lie beside.

    Layers and output are in the order of the devices, experts with their layer or on the host, and the heads of a side
    file with the output.
    """
    n_on_host, counts = draw(st.integers(0, 9)), draw(st.lists(st.integers(0, 9), max_size=4))
    places = [HOST] * n_on_host + [f"GPU{i}" for i, n in enumerate(counts) for _ in range(n)]
    places = places if len(places) > 1 else [HOST, *places, "GPU1"]
    is_side, n_trunk = draw(st.booleans()), len(places) - 1
    layers = [*places[:-1], *([places[-1]] * draw(st.integers(1, 3)) if is_side else [])]
    if not is_side and n_trunk > 3 and draw(st.booleans()):
        n_trunk -= draw(st.integers(1, 3))
    n_declared = draw(st.integers(0, 3)) if is_side or n_trunk == len(layers) else len(layers) - n_trunk
    experts = [draw(st.just(()) | st.tuples(*[st.sampled_from([layer, HOST])] * 3)) for layer in layers]
    return Layout(tuple(layers), tuple(experts), places[-1]), n_trunk, n_trunk + n_declared, is_side


@settings(deadline=None, max_examples=300)
@given(planned(), st.integers(0, 2))
def test_options_say_all_that_a_plan_says(tiny, plan, n_more_gpus):
    """From a layout and its run to options and back: several GPUs, a part of the layers, heads here or in a side file."""
    layout, n_trunk, n_blocks, is_side = plan
    kinds = tuple(LayerShape(4, 2, False, bool(devices), False, False) for devices in layout.experts)
    shape = replace(tiny.shape, n_trunk=n_trunk, n_heads=len(kinds) - n_trunk, layers=kinds)
    header = replace(tiny, shape=shape, n_blocks=n_blocks)
    machine = box(64 * GIB, *[GIB] * (max((int(gpu[3:]) + 1 for gpu in layout.gpus), default=0) + n_more_gpus))
    run = Run(n_ctx=4096, n_batch=256, n_sessions=3, n_heads=shape.n_heads, kv_type="q8_0", n_checkpoints=2)
    placement = replace(place(tiny, box(64 * GIB), Constraints(n_ctx=512)).placement, layout=layout, run=run)
    options = engine_options(placement, header, mtp=Path("heads.gguf") if is_side else None)
    assert layout_of(header, options, machine) == layout
    assert run_of(header, options) == run


@pytest.mark.parametrize("own_heads", [False, True], ids=["trunk alone", "heads in both files"])
@pytest.mark.parametrize("name", ["rtx3090x2+128", "rtx4090-24+128", "h200-141", "cpu-192"])
def test_a_trunk_with_a_side_file_is_cut_where_planned(side_files, name, own_heads):
    """Symptom: the trunk's file has three layers fewer than the plan, and a GPU gets some that it has no room for."""
    whole, trunk, heads = side_files
    model, machine = whole if own_heads else trunk, known_machines()[name]
    header = read_model(model, heads)
    report = place(header, machine, Constraints(n_ctx=32768))
    layout, options = report.placement.layout, engine_options(report.placement, header, mtp=heads)
    if machine.gpus:
        n_blocks = 48 if own_heads else 45
        got = spread(options.load(model, with_heads=False), n_blocks, len(machine.gpus))
        assert (got[:45], got[-1]) == (list(layout.layers[:45]), layout.output)
        assert spread(options.load(heads, with_heads=True), 48, len(machine.gpus))[45:48] == list(layout.layers[45:])
    assert need(options, machine).usage == report.usage


@pytest.fixture(scope="module")
def side_files(real, tmp_path_factory):
    from convert_step35.planning.plan import MtpMode

    folder = tmp_path_factory.mktemp("side")
    parts = [(MtpMode.DROP, "trunk"), (MtpMode.ONLY, "heads")]
    made = [planned_gguf.write(folder / f"{name}.gguf", REAL, "MOE_IQ4_XS", mtp=mode) for mode, name in parts]
    return real.path, *made


def test_the_engine_gets_what_was_planned(real):
    machine = known_machines()["rtx4090-24+128"]
    placement = place(real, machine, Constraints(n_ctx=131072)).placement
    options = engine_options(placement, real)
    assert (options.n_ctx, options.n_batch, options.kv_type, options.load_mode) == (131072, 4096, "f16", "none")
    assert options.load(Path("m.gguf"), with_heads=True).overrides == overrides(placement.layout)
    assert environment(placement) == {"GGML_OP_OFFLOAD_MIN_BATCH": str(placement.op_offload_from)}
    assert environment(replace(placement, op_offload_from=None)) == {}


# where the tensors then are


def buffers_of(model: Model) -> dict[str, str]:
    """Returns each loaded tensor's buffer type, read from llama.cpp's own table of tensors (libstdc++ layout)."""
    table = library.C._lib["_Z29llama_internal_get_tensor_mapB5cxx11PK11llama_model"]
    table.argtypes, table.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_void_p)
    type_of, name_of = library.C._lib.ggml_backend_buffer_get_type, library.C._lib.ggml_backend_buft_name
    type_of.argtypes, type_of.restype = [ctypes.c_void_p], ctypes.c_void_p
    name_of.argtypes, name_of.restype = [ctypes.c_void_p], ctypes.c_char_p
    vector = table(model._handle)
    begin, end, found = vector[0], vector[1], {}
    for entry in range(begin, end, 40):  # a string of 32 bytes, a pointer
        words = (ctypes.c_void_p * 5).from_address(entry)
        buffer = ctypes.c_void_p.from_address(words[4] + 8).value  # after the tensor's type
        found[ctypes.string_at(words[0], words[1]).decode()] = name_of(type_of(buffer)).decode()
    return found


def test_overrides_land_on_exactly_the_tensors_they_name(caplog):
    """llama.cpp says which tensors it moved, and every one of them then lies in host memory."""
    path = tiny_gguf("Q4_K_M")
    header = read_header(path)
    layout = place(header, box(64 * GIB, 20 * 2**20), Constraints(n_ctx=512, policy="split")).placement.layout
    half = replace(layout, experts=tuple((HOST, "GPU0", HOST) if devices else () for devices in layout.experts))
    with caplog.at_level(logging.DEBUG, logger="step35.llama_cpp"):
        model = Model(ModelOptions(path, True, 0, "none", overrides(half)))
    try:
        moved = {
            m[1]
            for r in caplog.records
            if (m := re.search(r"tensor (\S+) .*buffer type overridden to CPU", r.getMessage()))
        }
        assert moved == {t.name for t in header.tensors if "ffn_gate_exps" in t.name or "ffn_down_exps" in t.name}
        buffers = buffers_of(model)
        assert set(buffers) == {t.name for t in header.tensors}
        assert set(buffers.values()) <= {"CPU", "CPU_REPACK"}
    finally:
        model.close()


def test_an_unknown_buffer_type_is_refused():
    with pytest.raises(SettingsError, match="buffer type expected CPU, got 'TPU'"):
        Model(ModelOptions(tiny_gguf(), overrides=(("x", "TPU"),)))


def test_a_box_with_several_nodes_spreads_a_cpus_work(real, tmp_path):
    placement = place(real, known_machines()["cpu-192"], Constraints(n_ctx=32768)).placement
    options = engine_options(placement, real)
    assert (options.spreads_numa, options.load_mode) == (True, "mmap")
    assert options.load(Path("m.gguf"), with_heads=True).spreads_numa
    assert "numa: distribute" in to_text(placement, "m.gguf")
    assert not place(real, box(200 * GIB), Constraints(n_ctx=32768)).placement.spreads_numa


def test_numa_is_set_up_once_and_a_model_runs(capfd):
    for _ in range(2):
        Model(ModelOptions(tiny_gguf(), spreads_numa=True)).close()
    assert "already initialized" not in capfd.readouterr().err


def test_a_script_can_run_a_plan(tmp_path):
    model, plan = tiny_gguf(), tmp_path / "plan.yaml"
    header = read_header(model)
    plan.write_text(to_text(place(header, box(4 * GIB), Constraints(n_ctx=1024, kv_type="q8_0")).placement, model.name))
    with closing(Llama(str(model), plan=str(plan), verbose=False)) as llama:
        assert llama.n_ctx() == 1024
        assert llama.engine.options.kv_type == "q8_0"
        answer: Any = llama("def f(x):", max_tokens=4, temperature=0)
        assert answer["usage"]["completion_tokens"] == 4
    with pytest.raises(SettingsError, match="plan and n_ctx: the plan says it already"):
        Llama(str(model), plan=str(plan), n_ctx=4096)


# the guard


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_the_numbers(real):
    options = EngineOptions(real.path, n_ctx=32768)
    need(options, box(120 * GIB)).check()
    with pytest.raises(
        DoesNotFit, match=r"doesn't fit: RAM expected to need at most 100.00 GiB .*, needs 105\.\d\d GiB"
    ):
        need(options, box(100 * GIB)).check()
    with pytest.raises(DoesNotFit, match=r"doesn't fit: a GPU expected .* 24.00 GiB"):
        need(options, box(120 * GIB, 24 * GIB)).check()
    need(replace(options, n_gpu_layers=5), box(120 * GIB, 24 * GIB)).check()


@pytest.mark.parametrize("name", [*known_machines()])
def test_the_guard_sees_a_plans_options_as_the_plan_does(real, name):
    machine = known_machines()[name]
    report = place(real, machine, Constraints(n_ctx=32768))
    assert need(engine_options(report.placement, real), machine).usage == report.usage


def test_a_side_files_own_matrices_count(real, side_files):
    _, trunk, heads = side_files
    together = _taken(EngineOptions(trunk, heads))
    assert together - _taken(EngineOptions(real.path)) == pytest.approx(2 * 560955392, rel=1e-3)
    assert _taken(EngineOptions(trunk, heads, draft="off")) == _taken(EngineOptions(trunk))


def _taken(options: EngineOptions) -> int:
    return sum(sum(sizes.values()) for sizes in need(options, box(200 * GIB)).usage.values())


def test_dropping_the_page_cache_leaves_the_file_alone():
    path = tiny_gguf()
    before = path.read_bytes()
    drop_from_page_cache([path])
    assert path.read_bytes() == before
