"""Text from tokens: whole characters, and nothing after a stop string."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from step35.engine.detokenize import TextStream, stream_text


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
