"""The training text as rows of weighted tokens: the standard library's source, generated chats, drills in copying."""

import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from reference.chats import generate_chats
from reference.tokenizer import IM_END, IM_START, PAD, token_id

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__"}
MAX_FILE_BYTES = 200_000  # longer ones are tables of data
HELD_OUT_EVERY = 25
PROMPT_WEIGHT = 0.1  # in chats, of what is not the assistant's; its turns have 1
DRILL_EVERY = 4  # every so many rows of code, one is a drill instead
SPAN_LENGTHS, MAX_SPANS = (2, 8), 24


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens [n, row_length], each row beginning with BOS, and how much each counts in the loss, [n, row_length]."""

    tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def standard_library() -> list[str]:
    """The sources of the running interpreter's library (PSF licence), in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    wanted = (root / path for path in paths if not SKIPPED.intersection(path.parts))
    texts = (
        path.read_text(encoding="utf-8", errors="replace") for path in wanted if path.stat().st_size <= MAX_FILE_BYTES
    )
    return [text for text in texts if text.strip() and "\0" not in text]


def split_sources(sources: list[str]) -> tuple[list[str], list[str]]:
    """Files to train on, and every 25th file, held out."""
    return [s for i, s in enumerate(sources) if i % HELD_OUT_EVERY], sources[::HELD_OUT_EVERY]


def source_rows(tokenizer: Tokenizer, sources: Iterable[str], row_length: int) -> Rows:
    """Each file in pieces behind a BOS; what is left of one file is filled up with the next."""
    pieces = (piece for text in sources for piece in _pieces(tokenizer.encode(text).ids, row_length))
    return _packed(((piece, [1.0] * len(piece)) for piece in pieces), row_length)


def _pieces(ids: list[int], row_length: int) -> Iterator[list[int]]:
    bos, body = ids[0], ids[1:]
    for start in range(0, len(body), row_length - 1):
        yield [bos, *body[start : start + row_length - 1]]


def chat_rows(tokenizer: Tokenizer, n_chats: int, seed: int, row_length: int) -> Rows:
    """Whole chats, packed; only a chat that crosses a row's end is cut."""
    opening, end = tokenizer.encode(f"{IM_START}assistant\n").ids[1:], token_id(tokenizer, IM_END)
    chats = (tokenizer.encode(chat).ids for chat in generate_chats(n_chats, seed))
    return _packed(((ids, _chat_weights(ids, opening, end)) for ids in chats), row_length)


def _chat_weights(ids: list[int], opening: list[int], end: int) -> list[float]:
    """Full weight for what the assistant writes, with the end of its turn."""
    weights, writing = [], False
    for i, token in enumerate(ids):
        weights.append(1.0 if writing else PROMPT_WEIGHT)
        starts = ids[max(0, i + 1 - len(opening)) : i + 1] == opening
        writing = starts or (writing and token != end)
    return weights


def drill_rows(tokenizer: Tokenizer, n_rows: int, seed: int, row_length: int) -> Rows:
    """A few spans of random tokens in random order; what counts is how each goes on when it comes again."""
    rng = Random(seed)
    vocabulary = range(token_id(tokenizer, PAD) + 1, token_id(tokenizer, IM_START))
    return _packed((_drill(rng, vocabulary, row_length) for _ in range(n_rows)), row_length)


def _drill(rng: Random, vocabulary: range, length: int) -> tuple[list[int], list[float]]:
    spans = [rng.choices(vocabulary, k=rng.randint(*SPAN_LENGTHS)) for _ in range(rng.randint(1, MAX_SPANS))]
    tokens, weights, seen = [0], [0.0], set()
    while len(tokens) < length:
        i = rng.randrange(len(spans))
        tokens += spans[i]
        weights += [0.0] + [float(i in seen)] * (len(spans[i]) - 1)
        seen.add(i)
    return tokens, weights


def _packed(documents: Iterable[tuple[list[int], list[float]]], row_length: int) -> Rows:
    """Every row begins with a document's beginning; the document that crosses the row's end loses its tail."""
    rows, row_weights, row, weights = [], [], [], []
    for tokens, its_weights in documents:
        row, weights = row + tokens, weights + its_weights
        if len(row) >= row_length:
            rows.append(row[:row_length])
            row_weights.append(weights[:row_length])
            row, weights = [], []
    return Rows(np.array(rows, dtype=np.int64), np.array(row_weights, dtype=np.float32))


def batches(sources: Rows, chats: Rows, drills: Rows | None, seed: int) -> Iterator[Rows]:
    """Endless batches of two rows in either order: one of chats, one of code or, if there are any, a drill."""
    rng = Random(seed)
    code, talk, drill = (_shuffled_forever(rows, rng) for rows in (sources, chats, drills or sources))
    for step in count():
        pair = [next(talk), next(code if step % DRILL_EVERY else drill)]
        tokens, weights = zip(*rng.sample(pair, 2), strict=True)
        yield Rows(np.stack(tokens), np.stack(weights))


def _shuffled_forever(rows: Rows, rng: Random) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        for i in rng.sample(range(len(rows)), len(rows)):
            yield rows.tokens[i], rows.weights[i]
