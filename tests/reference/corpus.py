"""The training text: the Python standard library's source and generated chats, as rows of tokens that begin with BOS."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from reference.chats import generate_chats

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__"}
MAX_FILE_BYTES = 200_000  # longer ones are tables of data
HELD_OUT_EVERY = 25


def standard_library() -> list[str]:
    """The sources of the running interpreter's library (PSF licence), in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    wanted = (root / path for path in paths if not SKIPPED.intersection(path.parts))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in wanted if path.stat().st_size <= MAX_FILE_BYTES)
    return [text for text in texts if text.strip() and "\0" not in text]


def split_sources(sources: list[str]) -> tuple[list[str], list[str]]:
    """Files to train on, and every 25th file, held out."""
    return [s for i, s in enumerate(sources) if i % HELD_OUT_EVERY], sources[::HELD_OUT_EVERY]


def source_rows(tokenizer: Tokenizer, sources: Iterable[str], row_length: int) -> np.ndarray:
    """Rows [n, row_length]: each file in pieces behind a BOS; what is left of one file is filled up with the next."""
    pieces = (piece for text in sources for piece in _pieces(tokenizer.encode(text).ids, row_length))
    return _packed(pieces, row_length)


def _pieces(ids: list[int], row_length: int) -> Iterator[list[int]]:
    bos, body = ids[0], ids[1:]
    for start in range(0, len(body), row_length - 1):
        yield [bos, *body[start : start + row_length - 1]]


def chat_rows(tokenizer: Tokenizer, n_chats: int, seed: int, row_length: int) -> np.ndarray:
    """Rows [n, row_length] of whole chats, packed; only a chat that crosses a row's end is cut."""
    return _packed((tokenizer.encode(chat).ids for chat in generate_chats(n_chats, seed)), row_length)


def _packed(documents: Iterable[list[int]], row_length: int) -> np.ndarray:
    """Every row begins with a document's beginning; the document that crosses the row's end loses its tail."""
    rows, row = [], []
    for document in documents:
        row = row + document
        if len(row) >= row_length:
            rows.append(row[:row_length])
            row = []
    return np.array(rows, dtype=np.int64)


def batches(sources: np.ndarray, chats: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches [batch_size, row_length], half code and half chats, each reshuffled when used up."""
    rng = Random(seed)
    streams = [_shuffled_forever(sources, rng), _shuffled_forever(chats, rng)]
    while True:
        yield np.stack([next(streams[i % 2]) for i in range(batch_size)])


def _shuffled_forever(rows: np.ndarray, rng: Random) -> Iterator[np.ndarray]:
    while True:
        yield from rows[rng.sample(range(len(rows)), len(rows))]
