"""Cuts texts that would crash llama.cpp's tokenizer: its regular expressions recurse once a character. Pure.

A run of letters, white space or signs of a few ten thousand overflows a thread's stack (20 000 pass in
8 MiB, 30 000 crash). Nothing that people write has such a run; base64 without line breaks does.
"""

from itertools import pairwise

import numpy as np

LONGEST_RUN = 8192
_SPACES = (9, 10, 11, 12, 13, 32)


def _kinds() -> np.ndarray:
    """Returns the kind of each byte: 0 white space, 1 letters, digits and what is beyond ASCII, 2 signs."""
    kinds = np.full(256, 2, np.int8)
    kinds[128:] = 1
    kinds[[byte for byte in range(128) if chr(byte).isalnum()]] = 1
    kinds[list(_SPACES)] = 0
    return kinds


_KINDS = _kinds()


def cut_long_runs(text: bytes, longest: int = LONGEST_RUN) -> list[bytes]:
    """Returns the UTF-8 text in pieces, cut only inside runs of one kind longer than `longest` bytes."""
    if len(text) <= longest:
        return [text]
    kinds = _KINDS[np.frombuffer(text, np.uint8)]
    ends = [*(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(text)]
    starts = np.array([0, *ends[:-1]])
    cuts = [0]
    for start in starts[np.array(ends) - starts > longest].tolist():
        end = ends[int(np.searchsorted(ends, start, side="right"))]
        cuts += [_at_character(text, at) for at in range(start + longest, end, longest)]
    return [text[a:b] for a, b in pairwise([*cuts, len(text)])]


def _at_character(text: bytes, at: int) -> int:
    """Returns the start of the character that a position is in."""
    return next((i for i in range(at, max(at - 4, 0), -1) if text[i] & 0xC0 != 0x80), at)
