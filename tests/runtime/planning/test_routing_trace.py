"""The routing trace: what is counted is what the router chose, and the estimate of a verification uses it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from real_engine import open_engine
from step35.cli.trace import record
from step35.errors import SettingsError
from step35.options import EngineOptions
from step35.planning.machine import known_machines
from step35.planning.model_header import read_header
from step35.planning.placement import Constraints, place
from step35.planning.routing_trace import distinct_of, report, summarize, to_data
from step35.planning.speed import touched
from tiny_model import tiny_gguf

N_EXPERT, N_USED = 16, 3
TEXT = "def area(self):\n    return self.width * self.height\n" * 4


def choices(n_tokens: int) -> st.SearchStrategy[np.ndarray]:
    """Each row holds different experts, as a router's."""
    order = st.permutations(range(N_EXPERT)).map(lambda experts: experts[:N_USED])
    return st.lists(order, min_size=n_tokens, max_size=n_tokens).map(lambda rows: np.array(rows, np.int32))


@given(st.integers(1, 12).flatmap(choices))
def test_the_laws_of_a_summary(rows):
    routing = summarize([{3: rows, 4: rows[::-1]}], N_EXPERT)
    assert sum(routing.counts[3]) == sum(routing.counts[4]) == rows.size
    assert routing.distinct[0] == N_USED
    assert list(routing.distinct) == sorted(routing.distinct)
    assert routing.distinct[-1] <= min(N_EXPERT, N_USED * len(routing.distinct))
    assert 0 <= routing.overlap <= 1
    rates = list(routing.hits.values())
    assert rates == sorted(rates) and all(0 <= rate < 1 for rate in rates)
    assert 0 < routing.skew(3) <= 1
    assert len(report(routing)) == 4


@given(arrays.arrays(np.int32, (20, N_USED), elements=st.integers(0, N_EXPERT - 1)))
def test_a_cache_of_all_experts_misses_each_once(rows):
    cold = len(np.unique(rows))
    routing = summarize([{0: rows}], N_EXPERT)
    assert max(routing.hits.values()) <= 1 - cold / rows.size + 1e-9


def test_neighbours_that_choose_alike_share_everything():
    routing = summarize([{0: np.tile(np.arange(N_USED), (9, 1))}], N_EXPERT)
    assert routing.overlap == 1
    assert routing.distinct == (N_USED,) * 8


def test_neighbours_across_prompts_are_none():
    alike, other = np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32)
    assert summarize([{0: alike}, {0: other}], 4).distinct == (1.0,)


def test_nothing_traced_is_refused():
    with pytest.raises(SettingsError, match="nothing to trace"):
        summarize([], N_EXPERT)


# a real run


def test_a_traced_run_counts_every_token_in_every_moe_layer_and_changes_nothing():
    header = read_header(tiny_gguf())
    with open_engine(EngineOptions(tiny_gguf(), draft="off", n_ctx=256, n_batch=32, n_threads=1)) as engine:
        tokens = engine.tokenize(TEXT)[:100]
        once, twice = record(engine, [tokens, tokens])
    assert sorted(once) == [i for i, layer in enumerate(header.shape.trunk) if layer.is_moe]
    for layer, rows in once.items():
        assert rows.shape == (len(tokens), header.shape.n_expert_used)
        assert (np.sort(rows)[:, 1:] != np.sort(rows)[:, :-1]).all()  # a token never takes an expert twice
        assert rows.min() >= 0 and rows.max() < header.shape.n_expert
        assert (twice[layer] == rows).all()


def test_the_command_writes_a_trace_that_a_plan_reads(tmp_path):
    prompt, out = tmp_path / "prompt.txt", tmp_path / "trace.json"
    prompt.write_text(TEXT)
    traced = step35("trace", tiny_gguf(), "-f", prompt, "-n", 64, "-t", 1, "--out", out)
    assert traced.returncode == 0, traced.stderr
    assert "LRU hit rate by experts cached a layer" in traced.stdout
    command = ("plan", tiny_gguf(), "--machine", "cpu-192", "--ctx", 1024, "--json")
    with_trace, without = (json.loads(step35(*command, *extra).stdout) for extra in (("--routing", out), ()))
    assert with_trace["estimates"][0]["decode_tps"] == without["estimates"][0]["decode_tps"]
    assert with_trace["estimates"][0]["drafted_tps"] != without["estimates"][0]["drafted_tps"]


def step35(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "step35.cli", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


# the estimate


def test_more_overlap_makes_a_verification_cheaper_and_plain_decode_no_different():
    header = read_header(tiny_gguf())
    machine, shape = known_machines()["cpu-192"], read_header(tiny_gguf()).shape
    k = float(shape.n_expert_used)
    alike = place(header, machine, Constraints(n_ctx=1024, distinct=(k,) * 8))
    apart = place(header, machine, Constraints(n_ctx=1024))
    assert alike.speeds[0].decode == apart.speeds[0].decode
    assert alike.speeds[0].drafted > apart.speeds[0].drafted
    assert touched(shape, 4, (k,) * 8) == k < touched(shape, 4)
    assert touched(shape, 512, (k,) * 8) == touched(shape, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": "a cake"}, "not a routing trace: t.json expected about='step35 routing trace'"),
        ({"n_expert": 8}, r"another model's trace: t.json expected n_expert, n_expert_used \(16, 3\), got \(8, 3\)"),
        ({"distinct": [3, "4"]}, "bad routing trace: t.json distinct expected numbers up to 16"),
        ({"distinct": [99]}, "bad routing trace: t.json distinct expected numbers up to 16"),
    ],
)
def test_a_trace_that_is_none_is_refused(change, message):
    rows = np.tile(np.arange(N_USED), (9, 1))
    data = to_data(summarize([{0: rows}], N_EXPERT), "m.gguf")
    assert distinct_of(json.loads(json.dumps(data)), "t.json", N_EXPERT, N_USED) == (3.0,) * 8
    with pytest.raises(SettingsError, match=message):
        distinct_of(data | change, "t.json", N_EXPERT, N_USED)
