"""Checks a finished GGUF: its structure, every row, the report's digests, and the checkpoint it came from."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert_step35.checkpoint import Checkpoint
from convert_step35.chunks import CHUNK_WEIGHTS, Chunk, chunks
from convert_step35.errors import GgufError
from convert_step35.ggml import Ggml, row_bytes
from convert_step35.gguf_header import Entry
from convert_step35.gguf_model import GgufModel
from convert_step35.gguf_reader import GgufTensor
from convert_step35.imatrix import Imatrix
from convert_step35.mapping import MappedTensor
from convert_step35.report import report_path
from convert_step35.rows import RowReader

_PIECE_BYTES = 4 * 1024**2

# Keys that say where a file comes from rather than what the model is.
_PROVENANCE = ("general.name", "general.license", "general.file_type", "general.size_label", "convert_step35.", "quantize.imatrix.", "split.")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification looked at and what it found; no problems means the file is sound."""

    n_tensors: int
    n_digests: int
    n_compared_chunks: int
    problems: tuple[str, ...]


def check_rows(model: GgufModel, ggml: Ggml, n_threads: int) -> tuple[dict[str, str], list[str]]:
    """Read every tensor: its sha256, and a problem where a scale or a value is NaN or infinite."""
    ggml.prepare({tensor.ggml_type for tensor in model.tensors.values()})
    tensors = list(model.tensors.values())
    with ThreadPoolExecutor(n_threads) as pool:
        results = list(pool.map(lambda tensor: _check_tensor(model.file_of(tensor.name).path, tensor, ggml), tensors))
    digests = {tensor.name: digest for tensor, (digest, _) in zip(tensors, results)}
    problems = [f"{tensor.name} holds NaN or infinity" for tensor, (_, valid) in zip(tensors, results) if not valid]
    return digests, problems


def _check_tensor(path: Path, tensor: GgufTensor, ggml: Ggml) -> tuple[str, bool]:
    per_row = row_bytes(tensor.ggml_type, tensor.shape[-1])
    piece = max(1, _PIECE_BYTES // per_row) * per_row
    sha, valid = hashlib.sha256(), True
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for at in range(0, tensor.n_bytes, piece):
            data = file.read(min(piece, tensor.n_bytes - at))
            sha.update(data)
            valid = valid and ggml.is_valid(tensor.ggml_type, np.frombuffer(data, np.uint8))
    return sha.hexdigest(), valid


def check_report(model: GgufModel, digests: dict[str, str]) -> tuple[int, list[str]]:
    """Compare with the digests in the report beside the model, if there is one: how many, and what differs."""
    expected = _reported_digests(model)
    problems = [f"{name} differs from the report beside the file" for name, digest in digests.items() if expected.get(name, digest) != digest]
    return sum(name in expected for name in digests), problems


def _reported_digests(model: GgufModel) -> dict[str, str]:
    names = {file.path.name for file in model.files}
    for path in sorted(model.files[0].path.parent.glob(report_path(Path("*")).name)):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["tensors"]
            found = {entry["name"]: entry["sha256"] for entry in entries if entry["file"] in names}
        except (ValueError, KeyError, TypeError) as exc:
            raise GgufError(f"damaged report: {path} expected the JSON that convert-step35 writes; remove it or convert again") from exc
        if found:
            return found
    return {}


def check_metadata(model: GgufModel, expected: Sequence[Entry]) -> list[str]:
    """Keys that the checkpoint would give another value; provenance is left out."""
    problems = []
    for entry in expected:
        if entry.key.startswith(_PROVENANCE):
            continue
        want = list(entry.value) if entry.is_array else entry.value
        got = model.metadata.get(entry.key)
        if not _same(want, got):
            problems.append(f"{entry.key} expected {str(want)[:80]}, got {str(got)[:80]}")
    return problems


def _same(want: object, got: object) -> bool:
    if isinstance(want, float) and isinstance(got, float):
        return np.float32(want) == np.float32(got)
    if isinstance(want, list) and isinstance(got, list):
        return len(want) == len(got) and all(_same(a, b) for a, b in zip(want, got))
    return want == got


def compare(
    model: GgufModel,
    checkpoint: Checkpoint,
    mapped: Sequence[MappedTensor],
    ggml: Ggml,
    imatrix: Imatrix | None,
    *,
    n_threads: int,
    chunks_per_tensor: int | None,
    on_chunk: Callable[[], None] = lambda: None,
) -> tuple[int, list[str]]:
    """Convert chunks of the checkpoint again and compare bytes; None compares all. How many, and what differs."""
    with RowReader(checkpoint, ggml) as reader, ThreadPoolExecutor(n_threads) as pool:

        def differing(item: tuple[MappedTensor, Chunk]) -> str | None:
            problem = _compare_chunk(model, reader, ggml, imatrix, *item)
            on_chunk()
            return problem

        problems = list(pool.map(differing, _sampled(model, mapped, chunks_per_tensor)))
    return len(problems), sorted({problem for problem in problems if problem is not None})


def _sampled(model: GgufModel, mapped: Sequence[MappedTensor], per_tensor: int | None) -> Iterator[tuple[MappedTensor, Chunk]]:
    """Chunks spread evenly over each tensor, first and last included."""
    for tensor in mapped:
        if tensor.name not in model.tensors:
            continue
        every = list(chunks(tensor))
        picked = every if per_tensor is None else [every[i] for i in sorted({*np.linspace(0, len(every) - 1, per_tensor).astype(int)})]
        yield from ((tensor, chunk) for chunk in picked)


def _compare_chunk(model: GgufModel, reader: RowReader, ggml: Ggml, imatrix: Imatrix | None, tensor: MappedTensor, chunk: Chunk) -> str | None:
    stored = model.tensors[tensor.name]
    n = max(CHUNK_WEIGHTS, tensor.row_size)
    rows = reader.read(tensor, chunk, np.empty(n, np.float32), np.empty(4 * n, np.uint8))
    weights = imatrix.entries.get(tensor.name) if imatrix is not None else None
    packed = np.empty(4 * n, np.uint8)
    n_bytes = ggml.quantize(stored.ggml_type, rows, packed, weights.weights(chunk.expert) if weights is not None else None)
    if bytes(packed[:n_bytes]) == _stored_bytes(model, stored, chunk, n_bytes):
        return None
    hint = "; it was quantized with an imatrix, pass it with --imatrix" if imatrix is None and "quantize.imatrix.file" in model.metadata else ""
    return f"{tensor.name} is not what the checkpoint gives as {stored.ggml_type.name}{hint}"


def _stored_bytes(model: GgufModel, stored: GgufTensor, chunk: Chunk, n_bytes: int) -> bytes:
    descriptor = os.open(model.file_of(stored.name).path, os.O_RDONLY)
    try:
        return os.pread(descriptor, n_bytes, stored.offset + chunk.first_row * row_bytes(stored.ggml_type, stored.shape[-1]))
    finally:
        os.close(descriptor)
