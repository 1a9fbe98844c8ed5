"""What llama.cpp took beside what was counted: a difference over 2 % is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.engine.engine import Engine
from step35.options import EngineOptions
from step35.planning.memory_usage import HOST, Purpose
from step35.planning.reported_buffers import Buffer, differences, read_buffers
from tiny_model import tiny_gguf

MIB = 2**20
LOG = """load_tensors:          CPU model buffer size =   100.00 MiB
load_tensors:        CUDA0 model buffer size =  2000.50 MiB
llama_context:   CUDA_Host  output buffer size =     0.49 MiB
llama_kv_cache:      CUDA0 KV buffer size =   300.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =    30.00 MiB
sched_reserve:      CUDA0 compute buffer size =    64.25 MiB
sched_reserve:  CUDA_Host compute buffer size =     8.00 MiB
sched_reserve: graph: nodes = 332, splits = 1""".splitlines()
PLANNED = {
    HOST: {Purpose.WEIGHTS: 100 * MIB, Purpose.COMPUTE: 8 * MIB, Purpose.OUTPUTS: 40 * MIB},
    "GPU0": {
        Purpose.WEIGHTS: 1000 * MIB,
        Purpose.EXPERTS: 1000 * MIB + MIB // 2,
        Purpose.KV: 300 * MIB,
        Purpose.RING: 30 * MIB,
        Purpose.COMPUTE: 64 * MIB + MIB // 4,
        Purpose.DRIVER: 1024 * MIB,
    },
}


def test_the_log_is_read():
    buffers = read_buffers(LOG)
    assert len(buffers) == 6
    assert buffers[1] == Buffer("CUDA0", "model", 2000 * MIB + MIB // 2)


def test_what_is_as_counted_is_not_worth_a_word():
    assert differences(PLANNED, read_buffers(LOG), ["CUDA0"]) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("CUDA0 KV buffer size =   300.00", "CUDA0 KV buffer size =   330.00", "KV cache on GPU0: counted 0.32 GiB"),
        ("CUDA0 compute buffer", "CPU compute buffer", "compute buffers on GPU0: counted 64.2 MiB, llama.cpp took 0.0"),
        ("CPU model", "CUDA0 model", "weights on CPU: counted 100.0 MiB, llama.cpp took 0.0 MiB"),
    ],
)
def test_what_went_elsewhere_or_grew_is_said(old, new, said):
    found = differences(PLANNED, read_buffers([line.replace(old, new) for line in LOG]), ["CUDA0"])
    assert any(sentence.startswith(said) for sentence in found)


def test_a_remote_devices_buffers_carry_its_address():
    """They were taken for the host's: every run over rpc said that all its weights lay on the wrong box."""
    lines = [line.replace("CUDA0", "RPC0[10.0.0.2:50052]") for line in LOG]
    assert differences(PLANNED, read_buffers(lines), ["RPC0[10.0.0.2:50052]", "RPC0[10.0.0.3:50052]"]) == []


def test_weights_in_a_mapped_file_are_not_compared():
    lines = [line.replace("  CPU model", "  CPU_Mapped model").replace("100.00", "9000.00") for line in LOG]
    assert differences(PLANNED, read_buffers(lines), ["CUDA0"]) == []


@given(st.integers(1, 1 << 40), st.floats(-0.5, 0.5))
def test_two_percent_is_the_limit(n_bytes, share):
    real = round(n_bytes * (1 + share))
    found = differences({HOST: {Purpose.KV: n_bytes}}, [Buffer("CPU", "KV", real)], [])
    if abs(real - n_bytes) > 0.02 * n_bytes + 2**14:
        assert len(found) == 1
    else:
        assert found == []


@pytest.mark.parametrize("load_mode", ["none", "mmap"])
def test_a_real_load_takes_what_was_counted(load_mode):
    options = EngineOptions(tiny_gguf("Q4_K_M"), n_ctx=4096, n_batch=256, kv_type="q8_0", load_mode=load_mode)
    with Engine(options) as engine:
        assert engine.notes == []
        assert engine.budget.limit is not None and engine.budget.limit > 0


def test_a_real_load_that_takes_more_is_reported(monkeypatch):
    """As if the header had said less: the KV cache is counted for half the context."""
    from dataclasses import replace

    from step35.planning import admission

    count = admission.memory_demand
    monkeypatch.setattr(admission, "memory_demand", lambda options, *of: count(replace(options, n_ctx=2048), *of))
    with Engine(EngineOptions(tiny_gguf("Q4_K_M"), n_ctx=4096, draft="off")) as engine:
        assert any(note.startswith("KV cache on CPU: counted ") for note in engine.notes)
