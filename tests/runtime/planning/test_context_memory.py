"""The memory arithmetic gives what llama.cpp's dry run gives, on the real model's shapes and on small ones."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planned_gguf
from checkpoints import REAL, TINY, Shape
from convert_step35.planning.plan import MtpMode
from dry_run import DryModel, sizes_of
from fake_native import FakeModel, Script, loader
from step35.engine.engine import Engine
from step35.errors import ModelError
from step35.native.rows import Rows
from step35.options import EngineOptions
from step35.planning.context_memory import (
    Run,
    checkpoint_bytes,
    head_context,
    loaded_tensors,
    padded,
    trunk_context,
    weight_bytes,
)
from step35.planning.memory_usage import Purpose
from step35.planning.model_header import Group, read_header, read_model
from tiny_model import tiny_gguf

SLICE = replace(REAL, num_hidden_layers=5, vocab_size=4096, moe_num_experts=16)
ODD = Shape(
    num_hidden_layers=9, hidden_size=320, intermediate_size=960, moe_intermediate_size=352, moe_top_k=3, vocab_size=2100
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Returns a maker of sparse GGUFs: the converter's own headers over holes."""
    folder = tmp_path_factory.mktemp("planned")

    def make(shape: Shape, recipe: str) -> Path:
        path = folder / f"{hash((shape, recipe))}.gguf"
        return path if path.exists() else planned_gguf.write(path, shape, recipe)

    return make


def options(run: Run) -> EngineOptions:
    return EngineOptions(
        Path("model.gguf"),
        n_ctx=run.n_ctx,
        n_batch=run.n_batch,
        n_sessions=run.n_sessions,
        kv_type=run.kv_type,
        flash_attention=run.has_flash_attention,
    )


def contexts(run: Run):
    """Returns the options of the contexts that an engine opens with these settings: the trunk's, then the heads'."""
    opened = []

    class Recorder(FakeModel):
        n_ctx_train = 1 << 20

        def _open(self, options, head):
            opened.append(options)
            return super()._open(options, head)

    with Engine(options(run), loading=loader(Script(), Recorder)):
        pass
    return opened


@pytest.mark.parametrize("recipe", ["MOE_IQ4_XS", "Q4_K_M"])
@pytest.mark.parametrize("shape", [REAL, SLICE, TINY, ODD], ids=["real", "real-width slice", "tiny", "odd"])
def test_every_byte_is_the_dry_runs(gguf, shape, recipe):
    """Weights, KV cells and compute buffers of the trunk and of a head, with and without quantized KV."""
    path = gguf(shape, recipe)
    header = read_header(path)
    runs = [
        Run(n_ctx=n, n_batch=b, kv_type=kv)
        for n, b, kv in [(4096, 512, "f16"), (131072, 2048, "q8_0"), (40000, 96, "f16")]
    ]
    runs += [Run(n_ctx=8192, n_batch=256, n_sessions=s) for s in (2, 3)]
    runs += [Run(n_ctx=2048, n_batch=128, has_flash_attention=False), Run(n_ctx=64, n_batch=32)]
    with DryModel(path, load_heads=True) as model:
        for run in runs:
            trunk, *heads = contexts(run)
            _check(model.context(trunk), weight_bytes(header.tensors), trunk_context(header.shape, run))
            assert len(heads) == header.shape.n_heads
            _check(model.context(heads[0], head=0), weight_bytes(header.tensors), head_context(header.shape, run))


def _check(dry, n_weight_bytes, ours):
    assert (dry.model, dry.context, dry.compute) == (n_weight_bytes, ours.kv, ours.compute)


def real_sizes(engine: Engine) -> list:
    """What the contexts of an open engine take: the trunk's, then the heads'."""
    return [sizes_of(context.handle) for context in (engine.trunk, *engine.drafter.heads.contexts)]


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_M"])
def test_a_real_load_takes_what_was_counted(type_name):
    """With nothing dry about it: weights, cells and buffers of an open engine, its repacked weights included."""
    header = read_header(tiny_gguf(type_name))
    run = Run(n_ctx=2048, n_batch=256, n_heads=3)
    with Engine(EngineOptions(header.path, n_ctx=2048, n_batch=256, load_mode="none")) as engine:
        real = real_sizes(engine)
    trunk, head = trunk_context(header.shape, run), head_context(header.shape, run)
    assert [sizes.context for sizes in real] == [trunk.kv, head.kv, head.kv, head.kv]
    assert [sizes.compute for sizes in real] == [trunk.compute, head.compute, head.compute, head.compute]
    assert real[0].model == weight_bytes(header.tensors)


@pytest.mark.parametrize("trunk", ["drop", "keep"])
@pytest.mark.parametrize(("kv_type", "n_sessions"), [("f16", 1), ("q8_0", 6)])
def test_a_real_load_with_a_side_file_takes_what_was_counted(trunk, kv_type, n_sessions):
    """Symptom: the trunk's own heads, idle beside a side file's, were not counted: 2 GiB of the real model."""
    model, heads = tiny_gguf(mtp=trunk), tiny_gguf(mtp="only")
    run = Run(1024, 128, n_sessions, 3, kv_type)
    options = EngineOptions(
        model, heads, n_ctx=1024, n_batch=128, n_sessions=n_sessions, kv_type=kv_type, load_mode="none"
    )
    with Engine(options) as engine:
        trunk_sizes, *head_sizes = real_sizes(engine)
        assert engine.demand is not None
        counted = engine.demand.usage["CPU"]
        assert engine.notes == []
    header = read_model(model, heads)
    ours = trunk_context(header.shape, run), *[head_context(header.shape, run)] * 3
    assert [(s.context, s.compute) for s in (trunk_sizes, *head_sizes)] == [(c.kv, c.compute) for c in ours]
    weights = sum(counted.get(p, 0) for p in (Purpose.WEIGHTS, Purpose.EXPERTS, Purpose.HEADS))
    assert trunk_sizes.model + head_sizes[0].model == weights


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_checkpoint_takes_what_was_counted(kv_type):
    shape = read_header(tiny_gguf()).shape
    with Engine(EngineOptions(tiny_gguf(), draft="off", n_ctx=1024, n_batch=256, kv_type=kv_type)) as engine:
        for start in range(0, 768, 256):
            engine.trunk.decode([Rows(0, start, list(range(256)), outputs=1)])
        real = len(engine.trunk.save_state(0, window_only=True))
    assert real == pytest.approx(checkpoint_bytes(shape, Run(1024, 256, kv_type=kv_type)), rel=0.02)


def test_heads_that_are_not_wanted_are_loaded_in_part(gguf):
    """Symptom: a run without drafting takes 2 GiB more than the trunk's weights."""
    path = gguf(REAL, "MOE_IQ4_XS")
    header = read_header(path)
    with DryModel(path, load_heads=False) as model:
        dry = model.context(contexts(Run())[0])
    assert dry.model == weight_bytes(loaded_tensors(header, with_heads=False))
    assert dry.model > weight_bytes(t for t in header.tensors if t.group is not Group.HEADS) + 2e9


def test_the_real_models_cache_has_the_published_size(gguf):
    """12 GiB of KV at 262144 tokens, 330 MiB of ring at a batch of 2048, 66 MiB a checkpoint."""
    shape = read_header(gguf(REAL, "MOE_IQ4_XS")).shape
    layers = trunk_context(shape, Run(n_ctx=262144, n_batch=2048)).layers
    full = sum(n for n, layer in zip(layers, shape.layers, strict=True) if not layer.is_sliding)
    assert full == 12 * 2**30
    assert sum(layers) - full == 330 * 2**20
    assert checkpoint_bytes(shape, Run()) == 66 * 2**20


@pytest.fixture(scope="module")
def tiny_shape(gguf):
    return read_header(gguf(TINY, "Q4_K_M")).shape


SIZES = st.tuples(st.integers(2048, 1 << 18), st.sampled_from([8, 64, 512, 1024, 2048]), st.integers(1, 8))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 1 << 16))
def test_a_context_longer_than_a_batch_never_needs_less_when_it_grows(tiny_shape, sizes, more):
    shape = tiny_shape
    n_ctx, n_batch, n_sessions = sizes
    short, long = (Run(n, n_batch, n_sessions) for n in (n_ctx, n_ctx + more))
    for context in (trunk_context, head_context):
        a, b = context(shape, short), context(shape, long)
        assert a.kv <= b.kv
        assert a.compute <= b.compute
        assert a.outputs <= b.outputs


@given(st.integers(1, 1 << 20), st.integers(1, 512))
def test_padding_adds_less_than_one_unit(n, unit):
    assert 0 <= padded(n, unit) - n < unit
    assert padded(n, unit) % unit == 0


# the header


def test_a_header_cut_anywhere_is_refused_in_one_line(gguf, tmp_path):
    data = gguf(TINY, "Q4_K_M").read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in itertools.chain(range(400), range(400, len(data) - 1, len(data) // 97)):
        cut.write_bytes(data[:n])
        with pytest.raises(ModelError) as error:
            read_header(cut)
        assert str(cut) in str(error.value)
        assert "\n" not in str(error.value)


def test_shards_are_read_as_one(gguf, tmp_path):
    whole = read_header(gguf(TINY, "Q4_K_M"))
    parts = planned_gguf.write(tmp_path / "m.gguf", TINY, "Q4_K_M", split_max_bytes=2_000_000)
    header = read_header(parts)
    assert parts.name.startswith("m-00001-of-")
    assert set(header.tensors) == set(whole.tensors)
    assert header.shape == whole.shape
    assert header.digest != whole.digest


def test_a_side_file_of_another_model_is_refused(gguf, tmp_path):
    """Symptom: a traceback, where the plan looks for the place of a layer that the model hasn't."""
    side = planned_gguf.write(tmp_path / "side.gguf", SLICE, "Q4_K_M", mtp=MtpMode.ONLY)
    with pytest.raises(ModelError, match=r"the MTP file doesn't belong to the model: .* expected 6 layers .* got 5"):
        read_model(gguf(TINY, "Q4_K_M"), side)


def test_another_models_header_is_refused(tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "llama.gguf"
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="expected general.architecture=step35, got 'llama'"):
        read_header(path)
