"""A fake llama.cpp: token arithmetic instead of a model, and strict about what it is fed.

The trunk's next token depends on the last token and its position. Hidden states carry a digest of
everything they were computed from, so a head notices a row that was built from the wrong token, the
wrong hidden state or a rejected draft. The sliding window is a ring: a decode that would attend to a
lost cell fails. All of that is AssertionError: a bug of the driver, not an input error.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from step35.errors import Cancelled, SettingsError
from step35.native.draft_vocabulary import DraftVocabulary
from step35.native.file_facts import FileFacts
from step35.native.interface import GrammarInterface
from step35.native.rows import Rows
from step35.options import ContextOptions, ModelOptions

N_VOCAB = 64
N_EMBD = 4
EOG = N_VOCAB - 1
DIGEST_BITS = 20  # a digest must survive as a float32


@dataclass
class Script:
    """What a fake model does: its window, its heads, and where they are wrong."""

    n_swa: int = 8
    n_heads: int = 3
    ring_slack: int = 8  # as many rows as a verification takes back
    is_wrong: Callable[[int, int], bool] = lambda head, position: False
    ends_at: int | None = None
    flatness: float = 0.0
    returns_all_rows: bool = False
    """As with our own llama.cpp: a head's hidden states of all rows, with logits or without."""
    on_decode: Callable[["FakeContext"], None] = lambda context: None
    contexts: list["FakeContext"] = field(default_factory=list)


class FakeModel:
    """Stands in for native.Model."""

    n_vocab, n_embd, n_ctx_train = N_VOCAB, N_EMBD, 4096
    bos, eos, newline, add_bos, vocab_digest = 0, EOG, 2, False, "fake"
    turn_start: int | None = 1
    draft_vocabulary: DraftVocabulary | None = None
    chat_template = handle = None

    def __init__(self, script: Script, options: ModelOptions) -> None:
        self.script = script
        self.n_swa = script.n_swa
        self.n_heads = script.n_heads if options.load_heads else 0
        self.facts = FileFacts(options.path, 1, self.n_ctx_train, True, self.n_heads, self.n_heads)

    def open_trunk(
        self, options: ContextOptions, *, on_experts: Callable[[int, np.ndarray], None] | None = None
    ) -> "FakeContext":
        return self._open(options, None)

    def open_head(self, head: int, options: ContextOptions) -> "FakeContext":
        assert head < self.n_heads
        return self._open(options, head)

    def _open(self, options: ContextOptions, head: int | None) -> "FakeContext":
        context = FakeContext(self.script, options, head)
        self.script.contexts.append(context)
        return context

    def is_eog(self, token: int) -> bool:
        return token == EOG

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"%d " % token

    def tokenize(self, text: bytes, *, add_bos: bool, parse_special: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def text(self, token: int) -> str:
        return f"{token} "

    def open_grammar(self, gbnf: str) -> GrammarInterface:
        raise SettingsError("bad grammar: a fake model has none")

    def all_metadata(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass


def loader(script: Script) -> Callable[[ModelOptions], FakeModel]:
    """Returns what Engine takes as `load_model`."""
    return lambda options: FakeModel(script, options)


def next_token(token: int, position: int) -> int:
    """The trunk's favourite successor of a token at a position; never the end token."""
    return crc32(b"%d %d" % (token, position)) % EOG


def digest(*parts: object) -> int:
    return crc32(repr(parts).encode()) % (1 << DIGEST_BITS)


@dataclass
class Cell:
    token: int
    digest: int


class FakeContext:
    """Stands in for native.Context, for the trunk (head None) or a head."""

    handle = None

    def __init__(self, script: Script, options: ContextOptions, head: int | None) -> None:
        self.script, self.head = script, head
        self.n_batch, self.n_ctx = options.n_batch, options.n_ctx
        self.returns_all_rows = head is None or script.returns_all_rows
        self.n_outputs_max = options.n_outputs or options.n_batch
        self.n_rows = 0
        self.cells: dict[int, dict[int, Cell]] = {}
        self.decodes: list[list[Rows]] = []
        self._extracts, self._cancelled = False, False
        self._logits = self._hidden = np.zeros((0, 0), np.float32)

    def close(self) -> None:
        self.cells = {}

    def extract_hidden(self, on: bool) -> None:
        assert self.head is None
        self._extracts = on

    def cancel(self) -> None:
        self._cancelled = True

    def clear_cancel(self) -> None:
        self._cancelled = False

    # decoding

    def decode(self, rows: Sequence[Rows]) -> None:
        self.n_rows = sum(len(r.tokens) for r in rows)
        assert 0 < self.n_rows <= self.n_batch, f"{self.n_rows} rows in a batch of {self.n_batch}"
        n_outputs = sum(r.outputs for r in rows)
        assert n_outputs <= self.n_outputs_max
        self.script.on_decode(self)
        if self._cancelled:
            self._cancelled = False
            raise Cancelled("decode cancelled")
        self.decodes.append(list(rows))
        results = [self._row(r, i) for r in rows for i in range(len(r.tokens))]
        is_output = [i >= len(r.tokens) - r.outputs for r in rows for i in range(len(r.tokens))]
        outputs = [result for result, wanted in zip(results, is_output, strict=True) if wanted]
        self._logits = np.array([logits for logits, _ in outputs], np.float32).reshape(n_outputs, N_VOCAB)
        hidden_of = results if self.returns_all_rows else outputs
        self._hidden = np.array([hidden for _, hidden in hidden_of], np.float32).reshape(len(hidden_of), N_EMBD)

    def _row(self, r: Rows, i: int) -> tuple[np.ndarray, list[float]]:
        position, token = r.start + i, r.tokens[i]
        cells = self.cells.setdefault(r.seq, {})
        if cells:
            assert position == max(cells) + 1, f"position {position} after {max(cells)}"
        assert 0 <= token < N_VOCAB
        row = (
            self._trunk_row(cells, position, token)
            if self.head is None
            else self._head_row(self.head, r, i, position, token)
        )
        cells[position] = Cell(token, int(row[1][2]))
        for old in [p for p in cells if p <= position - self.script.n_swa - self.script.ring_slack]:
            del cells[old]
        return row

    def _trunk_row(self, cells: dict[int, Cell], position: int, token: int) -> tuple[np.ndarray, list[float]]:
        for p in range(max(0, position - self.script.n_swa + 1), position):
            assert p in cells, f"position {position} attends to the lost cell {p}"
        before = cells[position - 1].digest if position else 0
        mark = digest(before, token)
        best = EOG if position + 1 == self.script.ends_at else next_token(token, position)
        return _logits(best, digest(mark), self.script.flatness), [position, 0, mark, 1]

    def _head_row(self, head: int, r: Rows, i: int, position: int, token: int) -> tuple[np.ndarray, list[float]]:
        assert r.hidden is not None, f"head {head} row {position} came without hidden states"
        row, stage, mark, is_real = r.hidden[i]
        if not is_real:  # calibration feeds zeros
            return np.zeros(N_VOCAB, np.float32), [position, head + 1, 0, 0]
        assert (row, stage) == (position, head), f"head {head} row {position} got hidden {row} of {stage}"
        target = position + 2 + head
        best = next_token(token, target - 1)
        if self.script.is_wrong(head, target):
            best = (best + 1) % EOG
        mark = digest(int(mark), token)
        return _logits(best, digest(mark), self.script.flatness), [position, head + 1, mark, 1]

    def logits(self) -> np.ndarray:
        return self._logits

    def hidden(self) -> np.ndarray:
        assert self.head is not None or self._extracts, "hidden states were not asked for"
        return self._hidden

    # the KV cache

    def truncate(self, seq: int, n_keep: int) -> None:
        self.cells[seq] = {p: cell for p, cell in self.cells.get(seq, {}).items() if p < n_keep}

    def copy(self, source: int, target: int, n_keep: int) -> None:
        assert not self.cells.get(target), "copied over cells in use"
        self.cells[target] = {p: cell for p, cell in self.cells[source].items() if p < n_keep}

    def window_start(self, seq: int) -> int:
        return min(self.cells.get(seq, {}), default=0)

    def state_bytes(self, seq: int) -> int:
        return len(self.save_state(seq))

    def save_state(self, seq: int, *, window_only: bool = False) -> bytes:
        cells = self.cells[seq]
        return json.dumps([[p, c.token, c.digest] for p, c in cells.items()]).encode()

    def load_state(self, seq: int, state: bytes, *, window_only: bool = False) -> None:
        self.cells[seq] = {p: Cell(token, mark) for p, token, mark in json.loads(state)}


def _logits(best: int, key: int, flatness: float) -> np.ndarray:
    """Logits with one favourite; `flatness` mixes in noise that depends on the whole context."""
    logits = np.random.default_rng(key).normal(0, 1, N_VOCAB) * flatness
    logits[EOG] -= 100
    logits[best] += 4.0 if best != EOG else 200.0
    return logits


def exact_marks(tokens: Sequence[int], head: int) -> list[int]:
    """The digests of a head's rows (head -1: the trunk's) for a timeline, computed from scratch."""
    marks, before = [], 0
    for token in tokens:
        before = digest(before, token)
        marks.append(before)
    for k in range(head + 1):
        marks = [digest(mark, tokens[t + 1 + k]) for t, mark in enumerate(marks) if t + 1 + k < len(tokens)]
    return marks
