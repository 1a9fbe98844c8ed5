"""Tokens to text, a piece at a time, up to a stop string. Pure."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence


class TextStream:
    """Text that is safe to show: whole characters only, and nothing that may begin a stop string.

    After `stopped` is set the text has ended before that stop string, and further tokens add nothing.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._piece = piece
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._withheld = ""

    def add(self, token: int) -> str:
        """Returns the text that a token makes safe to show."""
        return self._release(self._decoder.decode(self._piece(token)))

    def finish(self) -> str:
        """Returns what was withheld; a character cut short becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._withheld
        self._withheld = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._withheld + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._withheld = True, ""
            return text[: min(found)[1]]  # the one complete first: as if the text came by characters
        n_withheld = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - n_withheld :]
        return text[: len(text) - n_withheld]


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
