"""The ring of hidden states: what was put comes back, as long as it is kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.drafting.hidden_ring import HiddenRows


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
