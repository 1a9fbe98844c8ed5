"""The pure parts: what a sync keeps, what prompt lookup finds, the ring of hidden states, stop strings."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35.drafting.hidden_ring import HiddenRows
from step35.drafting.prompt_lookup import KEY_LENGTH, NgramIndex
from step35.engine.detokenize import TextStream, stream_text
from step35.engine.prefix import Cached, SyncPlan, common_prefix, plan_sync

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

tokens = st.lists(st.integers(0, 3), max_size=40)


@relaxed
@given(
    cached=tokens, prompt=tokens.filter(len), window_start=st.integers(0, 40), window=st.integers(1, 16), data=st.data()
)
def test_a_plan_never_keeps_a_timeline_whose_window_is_lost(cached, prompt, window_start, window, data):
    window_start = min(window_start, len(cached))
    checkpoints = data.draw(st.sets(st.integers(1, max(len(cached), 1))))
    plan = plan_sync(Cached(cached, window_start, checkpoints), prompt, window)
    assert cached[: plan.n_keep] == prompt[: plan.n_keep]
    assert plan.n_keep < len(prompt)
    if plan.restore:
        assert plan.n_keep in checkpoints
    elif 0 < plan.n_keep < len(cached):
        assert window_start <= max(0, plan.n_keep - window + 1)


@relaxed
@given(cached=tokens, prompt=tokens.filter(len))
def test_with_nothing_lost_the_whole_common_prefix_is_kept(cached, prompt):
    plan = plan_sync(Cached(cached, 0, ()), prompt, 8)
    assert plan.n_keep == min(common_prefix(cached, prompt), len(prompt) - 1)


def test_the_nearest_checkpoint_before_the_fork_is_put_back():
    cached = Cached(list(range(100)), 80, {10, 30, 60})
    assert plan_sync(cached, [*range(50), 999, 999], 8) == SyncPlan(30, True, 50)
    assert plan_sync(cached, [*range(5), 999], 8) == SyncPlan(0, False, 5)
    assert plan_sync(cached, [*range(90), 999], 8) == SyncPlan(90, False, 90)


@relaxed
@given(timeline=st.lists(st.integers(0, 2), min_size=1, max_size=60), n_max=st.integers(1, 8))
def test_lookup_returns_what_followed_an_equal_ending(timeline, n_max):
    index = NgramIndex()
    match = None
    for n in range(1, len(timeline) + 1):
        match = index.find(timeline[:n], n_max)
    if match is None:
        key = timeline[-KEY_LENGTH:]
        assert len(key) < KEY_LENGTH or not any(
            timeline[i : i + KEY_LENGTH] == key for i in range(len(timeline) - KEY_LENGTH)
        )
        return
    assert 1 <= len(match.tokens) <= n_max
    ending = timeline[len(timeline) - match.length :]
    assert any(
        timeline[i : i + match.length] == ending and timeline[i + match.length :][: len(match.tokens)] == match.tokens
        for i in range(len(timeline) - match.length)
    )


@relaxed
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=12))
def test_lookup_survives_rewinds(moves):
    """Rewinds leave stale places in the index; what is found is in the timeline all the same."""
    rng = np.random.default_rng(0)
    timeline, index = [1, 2, 1, 2, 1, 2], NgramIndex()
    for grows, n in moves:
        timeline = timeline + rng.integers(0, 2, n).tolist() if grows else timeline[: max(3, len(timeline) - n)]
        match = index.find(timeline, 5)
        if match:
            ending = timeline[len(timeline) - match.length :] + match.tokens
            assert any(timeline[i : i + len(ending)] == ending for i in range(len(timeline)))


@relaxed
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=15))
def test_hidden_rows_come_back_as_they_were_put(puts):
    ring, known, end = HiddenRows(8, 2), {}, 0
    for first, n in puts:
        rows = np.random.default_rng(first * 31 + n).normal(size=(n, 2)).astype(np.float32)
        if not ring.start <= first <= ring.end:
            known = {}
        ring.put(first, rows)
        end = first + n
        known = {p: row for p, row in known.items() if p < first} | dict(zip(range(first, end), rows, strict=True))
        assert ring.end == end
        assert end - ring.start <= 8
        for p in range(ring.start, end):
            assert np.array_equal(ring.get(p, p + 1)[0], known[p])
    ring.truncate(5)
    assert ring.end <= 5
    with pytest.raises(IndexError):
        ring.get(ring.end, ring.end + 1)


@relaxed
@given(
    text=st.text(alphabet="abé漢😀", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text, stop, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    pieces = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    stream = TextStream(lambda i: pieces[i], stop)
    shown = "".join(stream.add(i) for i in range(len(pieces))) + stream.finish()
    ends = [text.find(s) for s in stop if s in text]
    assert stream.stopped == bool(ends)
    assert shown == (text[: _first_completed(text, stop)] if ends else text)


def _first_completed(text: str, stop: list[str]) -> int:
    """Where the stop string lies that is complete first; of those, the one that begins first."""
    for end in range(len(text) + 1):
        found = [end - len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return min(found)
    raise AssertionError("no stop string")


def test_a_character_cut_short_becomes_a_replacement():
    pieces = ["é".encode()[:1]]
    assert "".join(stream_text([0], lambda i: pieces[i])) == "\ufffd"
