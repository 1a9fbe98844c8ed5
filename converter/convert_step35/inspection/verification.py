"""Checks a finished GGUF: its structure, every row, the report's digests, and the checkpoint it came from."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert_step35.errors import ConvertError, GgufError, quoted
from convert_step35.gguf.ggml_types import QUANTIZABLE, row_bytes
from convert_step35.gguf.header import Entry
from convert_step35.gguf.imatrix import Imatrix
from convert_step35.gguf.metadata import ARCH
from convert_step35.gguf.model import GgufModel
from convert_step35.gguf.reader import GgufTensor
from convert_step35.gguf.shard_names import whole_name
from convert_step35.planning.chunks import CHUNK_WEIGHTS, Chunk, chunks
from convert_step35.planning.plan import MTP_PREFIX
from convert_step35.quantization.libggml import Ggml
from convert_step35.quantization.measure import non_finite
from convert_step35.reading.ranges import read_piece
from convert_step35.reading.rows import RowReader
from convert_step35.source.checkpoint import Checkpoint
from convert_step35.source.mapping import MappedTensor
from convert_step35.source.strict_json import read_json
from convert_step35.writing.report import report_path

_PIECE_BYTES = 4 * 1024**2
_MAX_REPORT_BYTES = 64 * 1024**2

# Keys that say where a file comes from rather than what the model is.
_PROVENANCE = (
    "general.name",
    "general.license",
    "general.file_type",
    "general.size_label",
    "convert_step35.",
    "quantize.imatrix.",
    "split.",
)


# Shows a bar over some bytes, as progress.bytes_bar does.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_progress(what: str, n_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """A Progress that shows nothing."""
    return nullcontext(lambda n: None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification looked at and what it found; no problems means the file is sound."""

    n_tensors: int
    n_digests: int
    n_compared_chunks: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check_rows(
    model: GgufModel, ggml: Ggml, n_threads: int, progress: Progress = no_progress
) -> tuple[dict[str, str], list[str]]:
    """Read every tensor: its sha256, and a problem where a scale or a value is NaN or infinite."""
    tensors = list(model.tensors.values())
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    with ThreadPoolExecutor(n_threads) as pool, progress("reading", n_bytes) as on_bytes:
        results = list(pool.map(lambda t: _check_tensor(model.homes[t.name], t, ggml, on_bytes), tensors))
    digests = {tensor.name: digest for tensor, (digest, _) in zip(tensors, results, strict=True)}
    problems = [
        f"{tensor.name} holds NaN or infinity; convert again"
        for tensor, (_, valid) in zip(tensors, results, strict=True)
        if not valid
    ]
    return digests, problems


def _check_tensor(path: Path, tensor: GgufTensor, ggml: Ggml, on_bytes: Callable[[int], None]) -> tuple[str, bool]:
    per_row = row_bytes(tensor.ggml_type, tensor.shape[-1]) if tensor.shape else tensor.n_bytes
    piece = max(1, _PIECE_BYTES // per_row) * per_row
    sha, valid = hashlib.sha256(), True
    with path.open("rb") as file:
        for at in range(0, tensor.n_bytes, piece):
            data = read_piece(file.fileno(), tensor.offset + at, min(piece, tensor.n_bytes - at), path)
            sha.update(data.data)
            valid = valid and ggml.is_valid(tensor.ggml_type, data)
            on_bytes(len(data))
    return sha.hexdigest(), valid


def check_report(model: GgufModel, digests: dict[str, str]) -> tuple[int, list[str]]:
    """Compare with the digests in the report beside the model, if there is one: how many, and what differs."""
    expected = _reported_digests(model)
    problems = [
        f"{name} differs from the report: sha256 expected {quoted(expected[name])}, got {digest}; "
        "the file was changed or damaged"
        for name, digest in digests.items()
        if expected.get(name, digest) != digest
    ]
    return sum(name in expected for name in digests), problems


def _reported_digests(model: GgufModel) -> dict[str, str]:
    """The digests of this model's files in its report, which also covers its MTP side file."""
    own = model.path.with_name(whole_name(model.path.name))
    names = {file.path.name for file in model.files}
    for out in (own, own.with_name(own.name.removeprefix(MTP_PREFIX))):
        if report_path(out).exists():
            found = _digests_in(report_path(out), names)
            if found:
                return found
    return {}


def _digests_in(path: Path, files: set[str]) -> dict[str, str]:
    try:
        entries = read_json(path, max_bytes=_MAX_REPORT_BYTES)["tensors"]
        return {entry["name"]: entry["sha256"] for entry in entries if entry["file"] in files}
    except (ConvertError, KeyError, TypeError) as exc:
        raise GgufError(
            f"damaged report: {path} expected the JSON that convert-step35 writes; remove it, or convert again"
        ) from exc


def check_metadata(model: GgufModel, expected: Sequence[Entry]) -> list[str]:
    """Keys that the checkpoint would give another value, and those that it would not give; provenance is left out."""
    wanted = {
        entry.key: list(entry.value) if entry.is_array else entry.value
        for entry in expected
        if not entry.key.startswith(_PROVENANCE)
    }
    problems = [
        f"{key} {_difference(want, model.metadata.get(key))}"
        for key, want in wanted.items()
        if not _same(want, model.metadata.get(key))
    ]
    extra = [key for key in model.metadata if key.startswith((f"{ARCH}.", "tokenizer.")) and key not in wanted]
    return problems + [
        f"{key} expected nothing, got {quoted(model.metadata[key])}: the checkpoint gives no such key" for key in extra
    ]


def _difference(want: Any, got: Any) -> str:
    """Wanted and got; of two lists their lengths or the first entries that differ."""
    if isinstance(want, list) and isinstance(got, list):
        if len(want) != len(got):
            return f"expected {len(want)} values, got {len(got)}"
        i = next(i for i, (a, b) in enumerate(zip(want, got, strict=True)) if not _same(a, b))
        return f"expected {quoted(want[i])} at {i}, got {quoted(got[i])}"
    return f"expected {quoted(want)}, got {quoted(got)}"


def _same(want: object, got: object) -> bool:
    if isinstance(want, float) and isinstance(got, float):
        return np.float32(want) == np.float32(got)
    if isinstance(want, list) and isinstance(got, list):
        return len(want) == len(got) and all(_same(a, b) for a, b in zip(want, got, strict=True))
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
    progress: Progress = no_progress,
) -> tuple[int, list[str]]:
    """Convert chunks of the checkpoint again and compare bytes; None compares all. How many, and what differs."""
    problems = {tensor.name: _incomparable(model, ggml, imatrix, tensor) for tensor in mapped}
    comparable = [tensor for tensor in mapped if problems[tensor.name] is None]
    items = list(_sampled(comparable, chunks_per_tensor))
    ggml.prepare({model.tensors[tensor.name].ggml_type for tensor in comparable})
    with (
        RowReader(checkpoint, ggml) as reader,
        ThreadPoolExecutor(n_threads) as pool,
        progress("comparing", sum(_n_bytes(model, *item) for item in items)) as on_bytes,
    ):
        equal = list(pool.map(lambda item: _is_equal(model, reader, ggml, imatrix, on_bytes, *item), items))
    hint = (
        "; it was quantized with an imatrix, pass it with --imatrix"
        if imatrix is None and "quantize.imatrix.file" in model.metadata
        else ""
    )
    for (tensor, _), same in zip(items, equal, strict=True):
        if not same:
            problems[tensor.name] = (
                f"{tensor.name} is not what the checkpoint gives as {model.tensors[tensor.name].ggml_type.name}{hint}"
            )
    return len(items), [problem for problem in problems.values() if problem is not None]


def _incomparable(model: GgufModel, ggml: Ggml, imatrix: Imatrix | None, tensor: MappedTensor) -> str | None:
    """Why a tensor can't be made again from the checkpoint; None if it can."""
    stored = model.tensors.get(tensor.name)
    if stored is None:
        return f"{tensor.name} is missing, and the checkpoint has it"
    if stored.shape != tensor.shape:
        return (
            f"{tensor.name} expected the checkpoint's shape {list(tensor.shape)}, got {list(stored.shape)}; "
            "is this another checkpoint?"
        )
    kind = stored.ggml_type
    if kind not in QUANTIZABLE:
        return f"{tensor.name} has the type {kind.name}, which this command can't make: not compared"
    if ggml.requires_imatrix(kind) and (imatrix is None or tensor.name not in imatrix.entries):
        return f"{tensor.name} was quantized to {kind.name} with an imatrix: not compared; pass it with --imatrix"
    return None


def _sampled(mapped: Sequence[MappedTensor], per_tensor: int | None) -> Iterator[tuple[MappedTensor, Chunk]]:
    """Chunks spread evenly over each tensor, first and last included."""
    for tensor in mapped:
        every = list(chunks(tensor))
        picked = (
            every
            if per_tensor is None
            else [every[i] for i in sorted({*np.linspace(0, len(every) - 1, per_tensor).astype(int)})]
        )
        yield from ((tensor, chunk) for chunk in picked)


def _n_bytes(model: GgufModel, tensor: MappedTensor, chunk: Chunk) -> int:
    """Bytes of a chunk as the model stores it."""
    return chunk.n_rows * row_bytes(model.tensors[tensor.name].ggml_type, tensor.row_size)


def _is_equal(
    model: GgufModel,
    reader: RowReader,
    ggml: Ggml,
    imatrix: Imatrix | None,
    on_bytes: Callable[[int], None],
    tensor: MappedTensor,
    chunk: Chunk,
) -> bool:
    stored = model.tensors[tensor.name]
    n = max(CHUNK_WEIGHTS, tensor.row_size)
    rows = reader.read(tensor, chunk, np.empty(n, np.float32), np.empty(4 * n, np.uint8))
    if not np.isfinite(rows).all():
        raise non_finite(rows, tensor)
    weights = imatrix.entries.get(tensor.name) if imatrix is not None else None
    packed = np.empty(4 * n, np.uint8)
    n_bytes = ggml.quantize(
        stored.ggml_type, rows, packed, weights.weights(chunk.expert) if weights is not None else None
    )
    on_bytes(n_bytes)
    return bytes(packed[:n_bytes]) == _stored_bytes(model, stored, chunk, n_bytes)


def _stored_bytes(model: GgufModel, stored: GgufTensor, chunk: Chunk, n_bytes: int) -> bytes:
    descriptor = os.open(model.homes[stored.name], os.O_RDONLY)
    try:
        return os.pread(
            descriptor, n_bytes, stored.offset + chunk.first_row * row_bytes(stored.ggml_type, stored.shape[-1])
        )
    finally:
        os.close(descriptor)
