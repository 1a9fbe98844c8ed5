"""What prompt lookup finds in a timeline."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from step35.drafting.prompt_lookup import KEY_LENGTH, NgramIndex


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
