"""Choosing a token: the distribution is exact, the noise is a function of seed and position."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35.errors import SettingsError
from step35.sampling.sampler import (
    DRAFT_MIN_P,
    Sampling,
    adjust,
    choose,
    choose_with_margin,
    gumbel,
    log_probabilities,
    truncate,
)

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.slow
def test_200_000_draws_follow_the_target_distribution():
    """Chi-square with 15 degrees of freedom; 44.3 is the 1e-4 quantile."""
    logits = np.random.default_rng(0).normal(0, 1.5, 16).astype(np.float32)
    sampling = Sampling(temperature=1.0, seed=7, top_p=1.0)
    counts = np.bincount([choose(logits, sampling, i) for i in range(200_000)], minlength=16)
    wanted = 200_000 * softmax(logits.astype(np.float64))
    assert ((counts - wanted) ** 2 / wanted).sum() < 44.3


def test_draws_follow_the_distribution_over_seeds_too():
    """40.8 is the 1e-4 quantile for 13 degrees of freedom; a vocabulary cut by top_k."""
    logits = np.random.default_rng(1).normal(0, 1, 64).astype(np.float32)
    kept = np.sort(np.argsort(-logits)[:14])
    draws = [choose(logits, Sampling(0.7, 14, 1.0, seed=seed), 3) for seed in range(20_000)]
    counts = np.bincount(draws, minlength=64)
    assert counts.sum() == counts[kept].sum()
    wanted = 20_000 * softmax(logits[kept].astype(np.float64) / 0.7)
    assert ((counts[kept] - wanted) ** 2 / wanted).sum() < 40.8


def test_neighbouring_positions_and_tokens_have_independent_noise():
    ids = np.arange(1000)
    noise = np.array([gumbel(3, position, ids) for position in range(200)])
    shifted = [(noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:]), (noise[:-1, :-1], noise[1:, 1:])]
    for a, b in shifted:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02


@relaxed
@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20), ids=st.lists(st.integers(0, 2**17), min_size=1))
def test_a_tokens_noise_doesnt_depend_on_the_other_candidates(seed, position, ids):
    together = gumbel(seed, position, np.array(ids))
    alone = [gumbel(seed, position, np.array([token]))[0] for token in ids]
    assert np.array_equal(together, alone)
    assert np.isfinite(together).all()


def test_a_draft_with_the_same_noise_is_accepted_more_often_than_a_greedy_one():
    rng = np.random.default_rng(2)
    sampling = Sampling(temperature=1.0, seed=1, top_p=1.0)
    same, greedy = 0, 0
    for position in range(2000):
        target = rng.normal(0, 2, 64).astype(np.float32)
        draft = target + rng.normal(0, 0.3, 64).astype(np.float32)
        token = choose(target, sampling, position)
        same += choose_with_margin(draft, sampling, position)[0] == token
        greedy += int(draft.argmax()) == token
    assert same > 1.5 * greedy


logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@relaxed
@given(logits=logit_lists, top_k=st.integers(0, 50), top_p=st.floats(0, 1), min_p=st.floats(0, 1))
def test_truncation_equals_its_definition(logits, top_k, top_p, min_p):
    values = np.array(logits, np.float32)
    kept = truncate(values, Sampling(1.0, top_k, top_p, min_p))
    assert set(kept) == _slow_truncate(values, top_k, top_p, min_p) or _is_tie(values, kept)


def _slow_truncate(values: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(values)), key=lambda i: -values[i])
    order = order[:top_k] if top_k else order
    if top_p < 1:
        p = softmax(values[order].astype(np.float64))
        n = int(np.searchsorted(np.cumsum(p), top_p * p.sum())) + 1
        order = order[:n]
    best = max(values[i] for i in order)
    return {i for i in order if min_p == 0 or values[i] >= best + np.log(min_p)}


def _is_tie(values: np.ndarray, kept: np.ndarray) -> bool:
    """Equal logits, or a sum within float noise of top_p, at the edge: either cut is right."""
    edge = values[kept].min()
    others = np.delete(values, kept)
    return len(others) == 0 or others.max() <= edge + 1e-5


def test_the_best_token_always_survives():
    logits = np.array([1.0, 5.0, 3.0], np.float32)
    assert truncate(logits, Sampling(1.0, 1, 0.0, 1.0)).tolist() == [1]
    assert choose(logits, Sampling(0.0), 0) == 1


def test_penalties_and_bias_change_what_they_name():
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    sampling = Sampling(repeat_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 7.0})
    adjusted = adjust(logits, sampling, [0, 1, 1])
    assert adjusted.tolist() == [2 / 2 - 0.5 - 0.25, -2 * 2 - 1.0 - 0.25, 1.0, 7.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]


def test_penalties_reach_back_penalty_last_n_tokens():
    logits = np.ones(4, np.float32)
    sampling = Sampling(presence_penalty=1.0, penalty_last_n=2)
    assert adjust(logits, sampling, [0, 1, 2]).tolist() == [1, 0, 0, 1]


def test_log_probabilities_sum_to_one():
    values = log_probabilities(np.array([1000.0, 999.0, -1000.0], np.float32))
    assert np.exp(values).sum() == pytest.approx(1.0)


@settings(relaxed, max_examples=20)
@given(logits=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20, unique=True), temperature=st.floats(0.2, 2))
def test_a_drafts_margin_is_the_lead_of_its_score(logits, temperature):
    """A second token less likely than DRAFT_MIN_P of the best is left out, and the lead has no end."""
    values = np.array(logits, np.float32)
    token, margin = choose_with_margin(values, Sampling(0.0), 0)
    ordered = np.sort(values)
    is_rival = ordered[-2] >= ordered[-1] + np.log(DRAFT_MIN_P)
    lead = float(ordered[-1] - ordered[-2]) if is_rival else math.inf
    assert (token, margin) == (int(values.argmax()), pytest.approx(lead, abs=1e-5))
    assert choose_with_margin(values, Sampling(temperature, top_p=1.0), 5)[1] >= 0


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}, {"seed": -1}, {"repeat_penalty": 0}]
)
def test_an_impossible_value_is_refused_with_its_range(bad):
    (name,) = bad
    with pytest.raises(SettingsError, match=f"bad sampling value: {name} expected .* got"):
        Sampling(**bad)


@settings(relaxed, max_examples=50)
@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20), spread=st.floats(0.01, 12))
def test_over_a_large_vocabulary_the_winner_is_the_one_of_all_scores(seed, position, spread):
    """The shortcut that leaves out tokens that can't win leaves out none that can."""
    logits = np.random.default_rng(seed % 1000).normal(0, spread, 20_000).astype(np.float32)
    scores = logits + gumbel(seed, position, np.arange(len(logits)))
    assert choose(logits, Sampling(1.0, seed=seed, top_p=1.0), position) == scores.argmax()


@relaxed
@given(logits=st.lists(st.floats(-3, 3, width=32), min_size=300, max_size=400), top_p=st.floats(0.3, 1))
def test_a_wide_nucleus_equals_its_definition(logits, top_p):
    values = np.array(logits, np.float32)
    kept = truncate(values, Sampling(1.0, 0, top_p))
    assert set(kept) == _slow_truncate(values, 0, top_p, 0.0) or _is_tie(values, kept)


@pytest.mark.slow
@settings(relaxed, max_examples=50)
@given(seed=st.integers(0, 1000), top_k=st.integers(0, 300), top_p=st.floats(0.1, 1), spread=st.floats(0.1, 8))
def test_truncation_of_a_large_vocabulary_equals_its_definition(seed, top_k, top_p, spread):
    values = np.random.default_rng(seed).normal(0, spread, 30_000).astype(np.float32)
    kept = truncate(values, Sampling(1.0, top_k, top_p))
    assert set(kept) == _slow_truncate(values, top_k, top_p, 0.0) or _is_tie(values, kept)


@pytest.mark.parametrize("n_vocab", [64, 4096])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6, 1e-3])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 40}, {"min_p": 0.05}])
def test_a_temperature_next_to_nothing_is_greedy(n_vocab, temperature, truncation):
    """Symptom: infinite scores, of which none was likely, and the server ended."""
    logits = np.random.default_rng(0).normal(0, 9, n_vocab).astype(np.float32)
    logits[7] = logits.max() + 1
    sampling = Sampling(temperature, **truncation)
    assert choose(logits, sampling, 3) == 7
    token, margin = choose_with_margin(logits, sampling, 3)
    assert token == 7 and margin > 0


@pytest.mark.parametrize("bias", [float("inf"), float("nan"), 1e308])
def test_a_bias_that_makes_a_logit_infinite_is_refused(bias):
    with pytest.raises(SettingsError, match="bad sampling value: logit_bias expected -inf to 1000000.0, got"):
        Sampling(logit_bias={3: bias})


@pytest.mark.parametrize("temperature", [1e-6, 0.6, 100.0])
def test_the_largest_bias_forces_and_minus_infinity_forbids(temperature):
    logits = np.random.default_rng(0).normal(0, 3, 4096).astype(np.float32)
    for top_p in (0.95, 1.0):
        forced = Sampling(temperature, top_p=top_p, logit_bias={3: 1e6, 5: -np.inf})
        assert choose(adjust(logits, forced, []), forced, 0) == 3
    banned = Sampling(temperature, logit_bias=dict.fromkeys(range(1, 4096), -np.inf))
    assert choose(adjust(logits, banned, []), banned, 0) == 0


def test_logits_that_are_not_numbers_end_in_a_token_and_no_traceback():
    logits = np.full(4096, np.nan, np.float32)
    assert 0 <= choose(logits, Sampling(1.0, top_p=1.0), 0) < 4096
