"""Tuning: what is kept was never slower than the plain plan, whatever the clock says."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planned_gguf
from checkpoints import REAL
from step35.planning.machine import known_machines
from step35.planning.model_header import read_header
from step35.planning.placement import Constraints, place, report_on
from step35.planning.plan_file import from_text, to_text
from step35.planning.tune import Sample, Workload, fastest, neighbours, report, tune, tuned
from tiny_model import tiny_gguf

REQUEST = Workload(512, 64)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return read_header(planned_gguf.write(tmp_path_factory.mktemp("tune") / "real.gguf", REAL, "MOE_IQ4_XS"))


@pytest.fixture(scope="module")
def split(real):
    return place(real, known_machines()["rtx4090-24+128"], Constraints(n_ctx=32768)).placement


@pytest.fixture(scope="module")
def changes(real, split):
    return neighbours(real, known_machines()["rtx4090-24+128"], split)


def test_a_split_box_has_neighbours_of_every_kind_that_fit(real, split, changes):
    machine = known_machines()["rtx4090-24+128"]
    assert {change.kind for change in changes} == {"threads", "batch", "experts", "threshold", "heads"}
    assert len(changes) <= 14
    for change in changes:
        placement = change.apply(split)
        assert placement != split
        assert report_on(real, machine, placement).fits


def test_a_box_without_a_gpu_tries_threads_batch_and_drafts(real):
    machine = known_machines()["cpu-192"]
    plain = place(real, machine, Constraints(n_ctx=32768)).placement
    assert {change.kind for change in neighbours(real, machine, plain)} == {"threads", "batch", "heads"}


@given(st.integers(0, 1 << 32), st.floats(0, 0.5), st.integers(1, 3))
def test_what_is_kept_was_never_slower_than_the_plain_plan(changes, split, seed, noise, n_rounds):
    rng = random.Random(seed)

    def measure(placement):
        if rng.random() < 0.1 and placement != split:
            return None
        return Sample(500 * rng.uniform(1 - noise, 1 + noise), 20 * rng.uniform(1 - noise, 1 + noise))

    trials = tune(split, changes, measure, REQUEST, n_rounds)
    best = fastest(trials, REQUEST)
    assert all(
        sample.seconds(REQUEST) <= plain.seconds(REQUEST)
        for sample, plain in zip(best.samples, best.plain, strict=True)
    )
    assert sum(line.endswith("<- kept") for line in report(trials, best, REQUEST)) == 1


def test_real_gains_are_found_and_put_together(changes, split):
    def measure(placement):
        decode = 20.0 + 3 * (placement.run.n_heads == 1) + 2 * (placement.n_threads == 8)
        return Sample(500.0, decode)

    best = fastest(tune(split, changes, measure, REQUEST), REQUEST)
    assert (best.placement.run.n_heads, best.placement.n_threads) == (1, 8)
    assert best.ratio(REQUEST) < 1


def test_a_gain_in_one_round_only_is_noise(changes, split):
    sped_up = iter([True] * len(changes) + [False] * 99)
    trials = tune(split, changes, lambda p: Sample(500, 20.0 + (p != split and next(sped_up))), REQUEST)
    assert fastest(trials, REQUEST) is trials[0]


def test_the_plain_plan_is_measured_in_every_round_before_its_neighbours(changes, split):
    seen = []
    tune(split, changes, lambda placement: seen.append(placement) or Sample(1, 1), REQUEST, 3)
    n = len(changes) + 1
    assert [i for i, placement in enumerate(seen) if placement == split] == [0, n, 2 * n]


def test_a_tuned_plan_says_how_it_came_about(changes, split):
    """Symptom: the plan runs 8 threads, and its reasons speak of 16."""
    trials = tune(split, changes, lambda p: Sample(500.0, 20.0 + (p.n_threads == 8)), REQUEST)
    best = fastest(trials, REQUEST)
    again = tuned(replace(best, placement=tuned(best, ["x"])), ["y"])
    assert again.reasons == (*split.reasons, "tuned by measuring: 8 threads")
    assert again.measured == ("y",)
    assert tuned(trials[0], []).reasons == split.reasons


def test_measurements_live_in_the_plan_file(real, split):
    placement = replace(split, measured=("plain plan: prefill 1.0, decode 2.0 tok/s <- kept",))
    assert from_text(to_text(placement, "m.gguf"), "plan.yaml", real) == placement


def test_tune_writes_a_plan_that_runs(tmp_path):
    model, out = tiny_gguf(), tmp_path / "tuned.yaml"
    plan = tmp_path / "plain.yaml"
    # one neighbour, to be quick: no heads to leave out, no other batch, two threads
    header = read_header(model)
    machine = replace(known_machines()["cpu-192"], n_cores=1)
    placement = place(header, machine, Constraints(n_ctx=100, n_batch=64, with_heads=False)).placement
    plan.write_text(to_text(replace(placement, n_threads=2), model.name))
    command = ["tune", model, "--plan", plan, "--out", out, "--prompt", 32, "-n", 8, "--rounds", 1, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "step35.cli", *map(str, command)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["trials"][0].startswith("plain plan: prefill ")
    assert len(answer["trials"]) >= 2
    written = from_text(out.read_text(), str(out), header)
    assert list(written.measured) == answer["trials"]
    assert Path(answer["plan"]) == out
