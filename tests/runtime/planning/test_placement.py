"""Placements: the laws of every plan, on machines and constraints of any size."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import planned_gguf
from checkpoints import REAL, TINY
from step35.errors import SettingsError
from step35.native.device_kinds import DISCRETE, INTEGRATED, REMOTE
from step35.planning import placement as placement_module
from step35.planning.advice import advice, with_recipe
from step35.planning.context_memory import Run, loaded_tensors
from step35.planning.machine import Gpu, Machine, known_machines, models_path
from step35.planning.memory_usage import HOST, Purpose, pools, taken
from step35.planning.model_header import Group, read_header
from step35.planning.placement import Constraints, longest_context, place, report_on
from step35.planning.plan_file import from_text, to_text
from step35.planning.speed import ACCEPTANCE, Deployment, speed, step_seconds, touched
from step35.yaml_file import read_yaml

MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TINY, "Q4_K_M"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("real") / "real.gguf", REAL, "MOE_IQ4_XS"))


def gpu(n_bytes: int, kind: str = DISCRETE) -> Gpu:
    return Gpu("a GPU", kind, n_bytes, n_bytes, 1e12, 25e9, 1e14, reserve_bytes=0)


def box(ram: int, *gpus: Gpu) -> Machine:
    return Machine("a box", "", 8, 1, ram, ram, 0, 75e9, gpus, "none")


RAM = st.integers(0, 200 * MIB)
GPU_BYTES = st.just(0) | st.integers(1 * MIB, 60 * MIB)
KINDS = st.sampled_from([DISCRETE, INTEGRATED])
MACHINES = st.one_of(
    RAM.map(box),
    st.builds(lambda ram, sizes: box(ram, *map(gpu, sizes)), RAM, st.lists(GPU_BYTES, min_size=1, max_size=3)),
    st.builds(lambda ram, n: box(ram, gpu(n, INTEGRATED)), RAM, GPU_BYTES),
    st.builds(
        lambda ram, far, near, kind: box(ram, gpu(far, REMOTE), gpu(near, kind)), RAM, GPU_BYTES, GPU_BYTES, KINDS
    ),
)
CONSTRAINTS = st.builds(
    Constraints,
    n_ctx=st.integers(512, 65536),
    gpu_budget=st.none() | st.integers(1, 1 * MIB),
    n_batch=st.none() | st.sampled_from([64, 512, 2048]),
    kv_type=st.none() | st.sampled_from(["f16", "q8_0", "q4_0"]),
    n_sessions=st.integers(1, 4),
    with_heads=st.booleans(),
)
ASKED = st.tuples(MACHINES, CONSTRAINTS).map(
    lambda pair: (pair[0], pair[1] if any(g.total_bytes for g in pair[0].gpus) else replace(pair[1], gpu_budget=None))
)
LAWS = settings(deadline=None, max_examples=60)


def on_gpus(report) -> int:
    """Returns the weight bytes that lie on GPUs."""
    weights = (Purpose.WEIGHTS, Purpose.EXPERTS, Purpose.HEADS)
    return sum(sizes.get(p, 0) for device, sizes in report.usage.items() if device != HOST for p in weights)


@LAWS
@given(ASKED)
def test_what_fits_is_within_every_budget(tiny, asked):
    machine, constraints = asked
    report = place(tiny, machine, constraints)
    over = [pool for pool in report.pools if taken(report.usage, pool) > pool.budget]
    assert report.fits == (not over)


@LAWS
@given(ASKED)
def test_every_tensor_is_placed_once_and_counted(tiny, asked):
    machine, constraints = asked
    report = place(tiny, machine, constraints)
    devices = {HOST, *(f"GPU{i}" for i in range(len(machine.gpus)))}
    assert all(report.placement.layout.device_of(tensor) in devices for tensor in tiny.tensors)
    weights = (Purpose.WEIGHTS, Purpose.EXPERTS, Purpose.HEADS)
    counted = sum(sizes.get(p, 0) for sizes in report.usage.values() for p in weights)
    assert counted == sum(-(-t.n_bytes // 32) * 32 for t in loaded_tensors(tiny, constraints.with_heads))


@LAWS
@given(RAM, st.lists(GPU_BYTES, min_size=1, max_size=3), st.integers(1, 40 * MIB), CONSTRAINTS)
def test_more_gpu_memory_never_places_fewer_weights_on_the_gpus(tiny, ram, sizes, more, constraints):
    """For one set of run settings; with several GPUs, when each of them grows alike."""
    constraints = replace(constraints, policy="split", gpu_budget=None, n_batch=512, kv_type="f16")
    small = place(tiny, box(ram, *map(gpu, sizes)), constraints)
    large = place(tiny, box(ram, *(gpu(size + size * more // MIB) for size in sizes)), constraints)
    assume(len(sizes) == 1 or small.placement.layout.layers == large.placement.layout.layers)
    assert on_gpus(small) <= on_gpus(large)


@LAWS
@given(ASKED, st.integers(0, 100 * MIB))
def test_more_ram_never_breaks_a_plan(tiny, asked, more):
    machine, constraints = asked
    if place(tiny, machine, constraints).fits:
        larger = replace(
            machine, total_bytes=machine.total_bytes + more, available_bytes=machine.available_bytes + more
        )
        assert place(tiny, larger, constraints).fits


@pytest.mark.slow
@LAWS
@given(ASKED, st.integers(1, 65536))
def test_a_longer_context_never_needs_less(tiny, asked, more):
    """On every pool, for one placement."""
    machine, constraints = asked
    report = place(tiny, machine, replace(constraints, n_ctx=max(constraints.n_ctx, 4096)))
    placement = report.placement
    longer = report_on(tiny, machine, replace(placement, run=replace(placement.run, n_ctx=placement.run.n_ctx + more)))
    for pool in report.pools:
        assert taken(report.usage, pool) <= taken(longer.usage, pool)


@LAWS
@given(ASKED)
def test_a_plan_file_round_trips(tiny, asked):
    machine, constraints = asked
    placement = place(tiny, machine, constraints).placement
    assert from_text(to_text(placement, "tiny.gguf"), "plan.yaml", tiny, machine) == placement


@settings(deadline=None, max_examples=15)
@given(MACHINES)
def test_the_longest_context_fits_and_a_longer_one_does_not(tiny, machine):
    constraints = Constraints(kv_type="f16", n_batch=512)
    n_ctx = longest_context(tiny, machine, constraints)
    if n_ctx:
        assert place(tiny, machine, replace(constraints, n_ctx=n_ctx)).fits
    if n_ctx < tiny.shape.n_ctx_train:
        assert not place(tiny, machine, replace(constraints, n_ctx=n_ctx + 1024)).fits


def test_a_split_keeps_everything_but_experts_on_the_gpu(real):
    report = place(real, known_machines()["rtx4090-24+128"], Constraints(n_ctx=131072))
    on_host = {t.group for t in real.tensors if report.placement.layout.device_of(t) == HOST}
    assert report.fits
    assert on_host == {Group.EMBEDDING, Group.EXPERTS}
    assert report.pools[0].budget - taken(report.usage, report.pools[0]) < max(t.n_bytes for t in real.tensors)


def test_two_gpus_share_the_layers_in_one_cut(real):
    layers = place(real, known_machines()["rtx3090x2+128"], Constraints(n_ctx=32768)).placement.layout.layers
    assert list(layers) == sorted(layers)
    assert abs(layers.count("GPU0") - layers.count("GPU1")) <= 2


@pytest.mark.slow
def test_what_does_not_fit_gets_a_context_and_a_recipe_that_do(real):
    machine, constraints = known_machines()["dgx-spark"], Constraints(n_ctx=262144)
    assert not place(real, machine, constraints).fits
    context, recipe = advice(real, machine, constraints)
    assert place(real, machine, Constraints(n_ctx=int(context.removeprefix("ctx ")))).fits
    entry = read_yaml(models_path()).section("recipes").section(recipe.removeprefix("recipe "))
    assert place(with_recipe(real, entry), machine, constraints).fits


def test_a_recipes_size_is_the_converters(real, tmp_path):
    entry = read_yaml(models_path()).section("recipes").section("MOE_Q4_K_Q5_K")
    converted = read_header(planned_gguf.write(tmp_path / "other.gguf", REAL, "MOE_Q4_K_Q5_K"))
    assert with_recipe(real, entry).tensors == converted.tensors


def test_without_a_context_the_longest_is_planned_and_said(real):
    report = place(real, known_machines()["dgx-spark"], Constraints())
    assert report.fits
    assert 131072 <= report.placement.run.n_ctx < 262144
    assert any("the longest that fits" in reason for reason in report.placement.reasons)


def test_planning_is_pure():
    """No module of a plan opens a file, asks a clock, a device or llama.cpp; `advice` alone reads models.yaml."""
    core = ("context_memory", "graph_allocator", "compute_graphs", "memory_usage", "speed", "placement")
    for name in (*core, "reported_buffers", "memory_pressure", "routing_trace", "tune"):
        tree = ast.parse((Path(placement_module.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        assert not imported & {
            "os",
            "time",
            "subprocess",
            "pathlib",
            "step35.native.library",
            "step35.planning.hardware",
            "step35.yaml_file",
        }


# estimates


def test_drafting_is_never_estimated_slower_than_plain_decoding(real):
    for machine in known_machines().values():
        report = place(real, machine, Constraints(n_ctx=32768))
        assert all(s.drafted >= s.decode for s in report.speeds)


def test_one_token_touches_just_the_chosen_experts(real):
    assert touched(real.shape, 1) == pytest.approx(8)
    assert touched(real.shape, 4) == pytest.approx(30.7, abs=0.1)


def test_a_token_reads_the_active_weights_and_its_context(real):
    layout = place(real, box(200 * GIB), Constraints(n_ctx=32768)).placement.layout
    slow = replace(box(200 * GIB), bandwidth=1.0, decode_share=1.0)
    seconds = [step_seconds(Deployment(real, slow, Run(), layout), n_past, 1) for n_past in (0, 1000)]
    active = sum(
        t.n_bytes * (8 / 288 if t.group is Group.EXPERTS else 1)
        for t in real.tensors
        if t.group not in (Group.EMBEDDING, Group.HEADS)
    )
    assert seconds[0] == pytest.approx(active)
    assert seconds[1] - seconds[0] == pytest.approx(1000 * 12 * 4096 + 512 * 33 * 4096)


def test_the_draft_depth_is_at_most_the_heads(real):
    report = place(real, known_machines()["h200-141"], Constraints(n_ctx=32768))
    assert (
        speed(Deployment(real, known_machines()["h200-141"], Run(n_heads=1), report.placement.layout), 2048).depth <= 1
    )
    assert len(ACCEPTANCE) == real.shape.n_heads


# constraints that can't be met


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"policy": "fast"}, "bad policy: expected one of auto, unified, split, gpu, cpu, rpc, got 'fast'"),
        ({"n_ctx": 300000}, "context too long: expected at most 262144 .*, got 300000"),
        (
            {"gpu_budget": 30 * GIB},
            r"GPU budget too large: expected at most 24.00 GiB \(rtx4090-24\+128\), got 30.00 GiB",
        ),
        (
            {"policy": "unified", "n_ctx": 4096},
            "policy doesn't suit: .* expected one of gpu, split, cpu, got 'unified'",
        ),
    ],
)
def test_a_constraint_that_cannot_be_met_is_one_line(tiny, constraints, message):
    with pytest.raises(SettingsError, match=message):
        place(tiny, known_machines()["rtx4090-24+128"], Constraints(**constraints))


# bad plan files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("kv_type: f16", "kv_type: f61", 9, "kv_type expected one of f32, f16, bf16, q8_0, q4_0, got 'f61'"),
        ("batch: ", "bach: ", 8, "bach expected the key batch, got an unknown one"),
        ("GPU0: [0-23]", "GPU0: [0-22]", 16, "expected the layers of layers 0-47, each once, got nothing for layer 23"),
        ("GPU0: [0-23]", "GPU0: [0-24]", 18, "layers.GPU1 expected every layer once, got layer 24 twice"),
        ("GPU0: [0-23]", "GPU0: [0-x]", 17, "layers.GPU0 expected layers such as 3-17"),
        ("output: GPU1", "output: GPU2", 19, "output expected one of GPU0, GPU1, CPU, got 'GPU2'"),
        ("gpu_budget: none", "gpu_budget: 22", 6, "gpu_budget expected a size such as 22GiB, or none, got 22"),
        ("gpu_budget: none", "gpu_budget: 25GiB", 6, "gpu_budget expected at most 24.00 GiB"),
        ("header_sha256: ", "header_sha256: 0", 3, "header_sha256 expected"),
        ("context: 32768", "context: 40000000", 7, "context expected 8 to 262144 tokens, got 40000000"),
        ("sessions: 1", "sessions: 1\nsessions: 2", 11, "sessions expected once, got it twice"),
        ("heads: 3", "heads: yes", 12, r"heads expected 0 to 3 \(the file's\), got True"),
        ("sessions: 1", "sessions: 65", 10, "sessions expected 1 to 64, and no more than the batch, got 65"),
        ("output: GPU1", "output: GPU0", 19, "CPU first, then GPU0, GPU1 and so on, got output on GPU0 after GPU1"),
        (
            "GPU0: [0-23]\n  GPU1: [24-47]",
            "GPU0: [0-9, 20-23]\n  GPU1: [10-19, 24-47]",
            17,
            "layers expected CPU first, then GPU0, GPU1 and so on, got layer 20 on GPU0 after GPU1",
        ),
        ("  CPU: [", "  CPU: [8, ", 23, "experts.CPU expected every layer once, got layer 8 twice"),
    ],
)
def test_a_mistake_in_a_plan_file_is_named_by_its_line(real, old, new, line, message):
    machine = known_machines()["rtx3090x2+128"]
    content = to_text(place(real, machine, Constraints(n_ctx=32768)).placement, "real.gguf")
    assert old in content
    with pytest.raises(SettingsError, match=message) as error:
        from_text(content.replace(old, new, 1), "plan.yaml", real, machine)
    assert "\n" not in str(error.value)
    if "nothing for" not in message:
        assert f"plan.yaml line {line}:" in str(error.value)


def test_experts_on_another_gpu_than_their_layer_are_refused(real):
    """Symptom: the plan says GPU1, llama.cpp puts them beside their layer's attention on GPU0."""
    machine = known_machines()["rtx3090x2+128"]
    content = to_text(place(real, machine, Constraints(n_ctx=32768)).placement, "real.gguf")
    layers, experts = content.split("\nexperts:")
    swapped = experts.replace("GPU0", "GPU2").replace("GPU1", "GPU0").replace("GPU2", "GPU1")
    with pytest.raises(SettingsError, match=r"line 21: experts expected layer 3 on GPU0, .*, or on CPU, got GPU1"):
        from_text(f"{layers}\nexperts:{swapped}", "plan.yaml", real, machine)


def test_an_edited_plan_is_taken_as_it_stands(real):
    machine = known_machines()["rtx4090-24+128"]
    content = to_text(place(real, machine, Constraints(n_ctx=32768)).placement, "real.gguf")
    edited = from_text(content.replace("threads: 16", "threads: 6"), "plan.yaml", real, machine)
    assert edited.n_threads == 6


def test_pools_of_an_integrated_gpu_are_its_own_limit_and_the_ram(real):
    machine = known_machines()["mac-studio-128"]
    assert [pool.devices for pool in pools(machine)] == [("GPU0",), (HOST, "GPU0")]
