"""Tokens to text, a piece at a time."""

import codecs
from collections.abc import Callable, Iterable, Iterator


def stream_text(tokens: Iterable[int], piece: Callable[[int], bytes]) -> Iterator[str]:
    """Yields text as it becomes complete: a character split over tokens waits for its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        text = decoder.decode(piece(token))
        if text:
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
