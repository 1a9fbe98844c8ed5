"""Trims the vocabulary of MTP heads: a side file whose output matrices hold the most frequent tokens only.

Cheaper drafts, and the same text: what isn't kept is never drafted. The file has ids of its own, so llama.cpp refuses
its architecture by name, and only a program that translates the ids loads it as step35. A row of a matrix is whole
blocks of its type: kept rows are copied byte for byte.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType as V

from convert_step35.errors import GgufError, OptionError, PlanError
from convert_step35.gguf.header import Entry
from convert_step35.gguf.metadata import ARCH
from convert_step35.gguf.model import TRIMMED_ARCH, GgufModel, architecture_of
from convert_step35.gguf.reader import GgufTensor
from convert_step35.quantization.quantizers import Quantizers
from convert_step35.reading.ranges import read_piece
from convert_step35.source.strict_json import read_json
from convert_step35.writing.requantizing import open_heads
from convert_step35.writing.rewriting import Made, Written, entries_of, rewrite

EMBEDDING, OUTPUT_SUFFIX = "token_embd.weight", ".nextn.shared_head_head.weight"
# Rows read at a time, and kept rows that they are compared with at a time: the products are 16 MiB.
_N_ROWS, _N_DIRECTIONS = 1024, 4096
_MAX_COUNTS_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class TrimPlan:
    """What of a model goes into the side file: `kept` are token ids, ascending, and `share` of what was counted."""

    model: GgufModel
    tensors: tuple[GgufTensor, ...]
    kept: np.ndarray
    n_vocab: int
    share: float

    @property
    def n_bytes(self) -> int:
        return sum(self.bytes_of(tensor) for tensor in self.tensors)

    def bytes_of(self, tensor: GgufTensor) -> int:
        """Bytes of a tensor in the side file."""
        return tensor.n_bytes // self.n_vocab * len(self.kept) if is_trimmed(tensor.name) else tensor.n_bytes


def is_trimmed(name: str) -> bool:
    """True for a matrix with one row a token."""
    return name == EMBEDDING or name.endswith(OUTPUT_SUFFIX)


def read_counts(path: Path, n_vocab: int) -> np.ndarray:
    """How often each token came, int64 [n_vocab], from the file that `step35 count-tokens` writes."""
    counts = read_json(path, max_bytes=_MAX_COUNTS_BYTES).get("counts")
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise OptionError(
            f"{path}: counts expected a list of whole numbers, one a token; make it with step35 count-tokens"
        )
    if len(counts) != n_vocab:
        raise OptionError(
            f"{path}: counts expected {n_vocab} tokens as in the model, got {len(counts)}; count with this model"
        )
    return np.array(counts, np.int64)


def plan_trim(path: Path, n_kept: int, counts_path: Path) -> TrimPlan:
    """Open a GGUF with heads, all shards of it, and choose the tokens to keep; equally frequent ones by their ids."""
    model, _ = open_heads(path)
    arch = architecture_of(model)
    if not 0 < n_kept < arch.vocab_size:
        raise OptionError(f"--vocab expected 1 to {arch.vocab_size - 1} of the model's tokens, got {n_kept}")
    heads = tuple(f"blk.{i}." for i in range(arch.n_trunk, len(arch.layers)))
    rest = ("blk.", "output.")
    tensors = tuple(t for t in model.tensors.values() if t.name.startswith(heads) or not t.name.startswith(rest))
    counts = read_counts(counts_path, arch.vocab_size)
    if not counts.any():
        raise PlanError(
            f"nothing was counted in {counts_path}: expected some tokens; count a text like what the model is for"
        )
    kept = np.sort(np.argsort(-counts, kind="stable")[:n_kept])
    return TrimPlan(model, tensors, kept, arch.vocab_size, float(counts[kept].sum() / counts.sum()))


def trim(plan: TrimPlan, out: Path, quantizers: Quantizers, on_bytes: Callable[[int], None]) -> list[Written]:
    """Write the side file."""
    stands_in = nearest_kept(lambda: _embedding(plan, quantizers), plan.kept)
    tensors = [_made(plan, t) if is_trimmed(t.name) else t for t in plan.tensors]
    return rewrite(plan.model, out, _entries(plan, stands_in), tensors, on_bytes=on_bytes)


def nearest_kept(read: Callable[[], Iterator[np.ndarray]], kept: np.ndarray) -> np.ndarray:
    """For each token the place in `kept` of the one with the most similar embedding, int32; a kept one has itself.

    Heads still read all tokens, and one that isn't kept is read as this one. `read` yields the embedding's rows, some
    at a time; it is called twice, so that memory holds the kept rows only.
    """
    directions, nearest, at = _directions(read(), kept), [], 0
    for part in read():
        is_other = np.ones(len(part), bool)
        is_other[_within(kept, at, len(part))] = False
        found = np.searchsorted(kept, np.arange(at, at + len(part)))
        found[is_other] = _most_similar(part[is_other], directions)
        nearest.append(found)
        at += len(part)
    return np.concatenate(nearest).astype(np.int32)


def _directions(parts: Iterator[np.ndarray], kept: np.ndarray) -> np.ndarray:
    """The kept rows at length 1, float32 [n_kept, hidden]."""
    chosen, at = [], 0
    for part in parts:
        chosen.append(part[_within(kept, at, len(part))])
        at += len(part)
    directions = np.concatenate(chosen)
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), np.float32(1e-30))
    return directions


def _most_similar(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """For each row the direction with the largest product, the first of equals; a row's own length changes nothing."""
    best, place = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64)
    for at in range(0, len(directions), _N_DIRECTIONS):
        products = rows @ directions[at : at + _N_DIRECTIONS].T
        largest = products.argmax(axis=1)
        values = products[np.arange(len(rows)), largest]
        is_better = values > best
        best[is_better], place[is_better] = values[is_better], at + largest[is_better]
    return place


def _within(kept: np.ndarray, at: int, n_rows: int) -> np.ndarray:
    """Which of the rows from `at` on are kept, counted from there."""
    return kept[(kept >= at) & (kept < at + n_rows)] - at


def _embedding(plan: TrimPlan, quantizers: Quantizers) -> Iterator[np.ndarray]:
    """The embedding's rows, float32 [n, hidden], as they are stored."""
    tensor = plan.model.tensors[EMBEDDING]
    quantizers.prepare({tensor.ggml_type})
    for data in _rows(plan, tensor):
        rows = np.empty((len(data), tensor.shape[1]), np.float32)
        quantizers.dequantize(tensor.ggml_type, data.reshape(-1), rows)
        if not quantizers.all_finite(rows):
            raise GgufError(
                f"damaged GGUF file: {plan.model.homes[EMBEDDING]}: {EMBEDDING} holds NaN or infinity; convert it again"
            )
        yield rows


def _rows(plan: TrimPlan, tensor: GgufTensor) -> Iterator[np.ndarray]:
    """The rows of a matrix, uint8 [n, bytes of a row], some at a time."""
    per_row = tensor.n_bytes // plan.n_vocab
    path = plan.model.homes[tensor.name]
    with path.open("rb") as file:
        for at in range(0, plan.n_vocab, _N_ROWS):
            n_bytes = min(_N_ROWS, plan.n_vocab - at) * per_row
            yield read_piece(file.fileno(), tensor.offset + at * per_row, n_bytes, path).reshape(-1, per_row)


def _made(plan: TrimPlan, tensor: GgufTensor) -> Made:
    def pieces() -> Iterator[np.ndarray]:
        for i, rows in enumerate(_rows(plan, tensor)):
            yield rows[_within(plan.kept, i * _N_ROWS, len(rows))].reshape(-1)

    shape = (len(plan.kept), *tensor.shape[1:])
    return Made(tensor.name, tensor.ggml_type, shape, plan.bytes_of(tensor), pieces)


def _entries(plan: TrimPlan, stands_in: np.ndarray) -> list[Entry]:
    """The file's own metadata without its tokenizer, which the model's file has; in its place the kept tokens."""
    ours = (
        Entry("general.architecture", V.STRING, TRIMMED_ARCH),
        Entry("tokenizer.ggml.model", V.STRING, "no_vocab"),
        Entry(f"{ARCH}.vocab_size", V.UINT32, len(plan.kept)),
        Entry(f"{ARCH}.draft.tokens", V.INT32, tuple(plan.kept.tolist())),
        Entry(f"{ARCH}.draft.stand_ins", V.INT32, tuple(stands_in.tolist())),
        Entry(f"{ARCH}.draft.vocab_sha256", V.STRING, vocab_digest(plan.model.metadata["tokenizer.ggml.tokens"])),
    )
    dropped = {entry.key for entry in ours}
    others = [e for e in entries_of(plan.model.files[0]) if not e.key.startswith(("tokenizer.", "split."))]
    return [*ours, *(entry for entry in others if entry.key not in dropped)]


def vocab_digest(tokens: Sequence[str]) -> str:
    """A digest of all token texts: which model's ids the file translates to."""
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()[:16]
