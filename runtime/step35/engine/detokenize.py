"""Tokens to text, a piece at a time, up to a stop string. Pure."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence


class StopStrings:
    """Text up to the first stop string: nothing that may begin one is shown. `found` is the one that ended the text."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.found: str | None = None
        self._stop = [text for text in stop if text]
        self._kept_back = ""

    def add(self, text: str) -> str:
        """Returns the text that is safe to show with this one; nothing after a stop string."""
        if self.found is not None:
            return ""
        if not self._stop:
            return text
        text = self._kept_back + text
        ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if ends:
            _, start, self.found = min(ends)  # the one complete first: as if the text came by characters
            self._kept_back = ""
            return text[:start]
        n_kept_back = max(_overlap(text, stop) for stop in self._stop)
        self._kept_back = text[len(text) - n_kept_back :]
        return text[: len(text) - n_kept_back]

    def finish(self) -> str:
        """Returns what was kept back: no stop string after all."""
        text, self._kept_back = self._kept_back, ""
        return text


class TextStream:
    """Text that is safe to show: whole characters only, and nothing that may begin a stop string.

    After `stopped` is set the text has ended before that stop string, and further tokens add nothing.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    def add(self, token: int) -> str:
        """Returns the text that a token makes safe to show."""
        return self._stops.add(self._decoder.decode(self._piece(token)))

    def finish(self) -> str:
        """Returns what was kept back; a character cut short becomes U+FFFD."""
        return self._stops.add(self._decoder.decode(b"", final=True)) + self._stops.finish()


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(tokens: Iterable[int], piece: Callable[[int], bytes]) -> Iterator[str]:
    """Yields text as it becomes complete: a character split over tokens waits for its last byte."""
    stream = TextStream(piece)
    for token in tokens:
        if text := stream.add(token):
            yield text
    if text := stream.finish():
        yield text
