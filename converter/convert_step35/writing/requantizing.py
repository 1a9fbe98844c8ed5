"""Gives the MTP heads of a finished GGUF another type: cheaper drafts, and the same text."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as V
from gguf import LlamaFileType

from convert_step35.errors import GgufError, PlanError
from convert_step35.gguf.ggml_types import QUANTIZABLE, row_bytes
from convert_step35.gguf.header import Entry
from convert_step35.gguf.model import GgufModel, architecture_of, has_mtp, has_trunk, open_model, require_step35
from convert_step35.gguf.reader import GgufTensor
from convert_step35.gguf.shard_names import is_shard_name
from convert_step35.planning.chunks import Chunk, chunks
from convert_step35.planning.presets import fit_to_row, requires_imatrix
from convert_step35.planning.recipes import MTP_OPTION, head_matrices, mtp_text, tensor_bytes
from convert_step35.quantization.measure import ErrorSums, TensorErrors, tensor_errors
from convert_step35.quantization.quantizers import Quantizers
from convert_step35.reading.ranges import read_piece
from convert_step35.source.mapping import MappedTensor, map_tensors
from convert_step35.writing.rewriting import Made, Written, entries_of, rewrite

RECIPE_KEY = "convert_step35.recipe"
# The heads' types before, where those were lossy: such heads are not what the checkpoint gives.
FROM_KEY = "convert_step35.heads_requantized_from"
_EXACT = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix of the heads that gets another type."""

    mapped: MappedTensor
    stored: GgufTensor
    ggml_type: GgmlType

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.mapped, self.ggml_type)


@dataclass(frozen=True, slots=True)
class HeadsPlan:
    """A model and what of it will change; all else is copied."""

    model: GgufModel
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors of the new file."""
        saved = sum(change.stored.n_bytes - change.n_bytes for change in self.changes)
        return sum(tensor.n_bytes for tensor in self.model.tensors.values()) - saved


@dataclass(frozen=True, slots=True)
class Requantized:
    """A finished file: its tensors, and what quantizing did to those that changed, against the values they had."""

    written: tuple[Written, ...]
    errors: dict[str, TensorErrors]


def plan_heads(path: Path, kind: GgmlType) -> HeadsPlan:
    """Open a GGUF, with or without a trunk, and choose what to quantize again; refuses what has no whole heads."""
    if is_shard_name(path.name):
        raise GgufError(
            f"a shard: {path} expected a whole file; make the heads' file from the checkpoint with run --mtp only "
            "--mtp-type"
        )
    model, mapped = open_heads(path)
    changes = tuple(
        Change(t, model.tensors[t.name], fit_to_row(kind, t.row_size))
        for t in mapped
        if model.tensors[t.name].ggml_type is not fit_to_row(kind, t.row_size)
    )
    if not changes:
        raise PlanError(f"nothing to do: all {len(mapped)} matrices of the MTP heads in {path} are {kind.name} already")
    for change in changes:
        _check(change, path)
    return HeadsPlan(model, changes, tuple(_notes(changes)))


def requantize(
    plan: HeadsPlan, out: Path, kind: GgmlType, quantizers: Quantizers, n_threads: int, on_bytes: Callable[[int], None]
) -> Requantized:
    """Write the file with its heads quantized again; PlanError or GgufError leave nothing behind."""
    quantizers.prepare({c.ggml_type for c in plan.changes} | {c.stored.ggml_type for c in plan.changes})
    errors: dict[str, TensorErrors] = {}
    made = {c.stored.name: _made(c, plan.model.path, quantizers, n_threads, errors) for c in plan.changes}
    tensors = [made.get(name, tensor) for name, tensor in plan.model.tensors.items()]
    written = rewrite(plan.model, out, _entries(plan, kind), tensors, on_bytes=on_bytes)
    return Requantized(tuple(written), errors)


def open_heads(path: Path) -> tuple[GgufModel, list[MappedTensor]]:
    """A model, of one file or of shards, and the matrices of its heads, each there and of its shape."""
    model = open_model(path)
    require_step35(model)
    arch = architecture_of(model)
    if not has_mtp(model, arch):
        raise GgufError(
            f"no MTP heads: {path} holds none; make a file of them from the checkpoint with convert-step35 run --mtp "
            "only"
        )
    mapped = map_tensors(arch, trunk=has_trunk(model, arch), mtp=True)
    names = head_matrices(mapped)
    heads = [tensor for tensor in mapped if tensor.name in names]
    for tensor in heads:
        stored = model.tensors.get(tensor.name)
        if stored is None or stored.shape != tensor.shape:
            got = list(stored.shape) if stored is not None else "nothing"
            raise GgufError(
                f"incomplete MTP heads: {path}: {tensor.name} expected {list(tensor.shape)}, got {got}; "
                "see convert-step35 inspect"
            )
    return model, heads


def _check(change: Change, path: Path) -> None:
    name, kind = change.mapped.name, change.ggml_type
    if change.stored.ggml_type not in QUANTIZABLE:
        raise GgufError(
            f"{path}: {name} has the type {change.stored.ggml_type.name}, which can't be read back; convert it again"
        )
    if requires_imatrix(name, kind, LlamaFileType.GUESSED):
        raise PlanError(
            f"imatrix needed: {name} as {kind.name} is garbage without one; choose a type such as Q4_K or IQ4_XS"
        )


def _lossy(changes: Sequence[Change]) -> list[str]:
    return sorted({change.stored.ggml_type.name for change in changes} - _EXACT)


def _notes(changes: Sequence[Change]) -> Iterator[str]:
    if lossy := _lossy(changes):
        yield (
            f"the heads are {' and '.join(lossy)}: quantized again from those values, so with a little more error than"
            " from the checkpoint (run --mtp only --mtp-type)"
        )
        if sum(c.n_bytes for c in changes) > sum(c.stored.n_bytes for c in changes):
            yield f"{changes[0].ggml_type.name} takes more room than that, and brings back nothing of what was lost"


def _entries(plan: HeadsPlan, kind: GgmlType) -> list[Entry]:
    """The file's own metadata; a recipe in it names the heads' new type too."""
    entries = [_with_new_type(entry, kind) for entry in entries_of(plan.model.files[0]) if entry.key != FROM_KEY]
    earlier = plan.model.metadata.get(FROM_KEY)
    sources = [*([str(earlier)] if earlier is not None else []), *_lossy(plan.changes)]
    return [*entries, Entry(FROM_KEY, V.STRING, ", then ".join(sources))] if sources else entries


def _with_new_type(entry: Entry, kind: GgmlType) -> Entry:
    if entry.key != RECIPE_KEY or entry.value_type is not V.STRING:
        return entry
    words = [word for word in entry.value.split() if not word.startswith(MTP_OPTION)]
    return replace(entry, value=" ".join([*words, mtp_text(kind)]))


def _made(change: Change, path: Path, quantizers: Quantizers, n_threads: int, errors: dict[str, TensorErrors]) -> Made:
    def pieces() -> Iterator[np.ndarray]:
        sums, every = [], list(chunks(change.mapped))
        with path.open("rb") as file, ThreadPoolExecutor(n_threads) as pool:
            convert = partial(_convert, change, file.fileno(), path, quantizers)
            # In batches: the whole matrix at once would fill the memory.
            for at in range(0, len(every), 4 * n_threads):
                for packed, errors_of_chunk in pool.map(convert, every[at : at + 4 * n_threads]):
                    sums.append(errors_of_chunk)
                    yield packed
        errors[change.mapped.name] = tensor_errors(change.mapped, sums)

    return Made(change.mapped.name, change.ggml_type, change.mapped.shape, change.n_bytes, pieces)


def _convert(
    change: Change, descriptor: int, path: Path, quantizers: Quantizers, chunk: Chunk
) -> tuple[np.ndarray, ErrorSums]:
    """A chunk of a head's matrix in its new type, and what that did to it."""
    stored, columns = change.stored, change.mapped.row_size
    per_row = row_bytes(stored.ggml_type, columns)
    data = read_piece(descriptor, stored.offset + chunk.first_row * per_row, chunk.n_rows * per_row, path)
    scratch = np.empty((2, chunk.n_rows * columns), np.float32)
    rows = scratch[0].reshape(chunk.n_rows, columns)
    quantizers.dequantize(stored.ggml_type, data, rows)
    packed = np.empty(chunk.n_rows * row_bytes(change.ggml_type, columns), np.uint8)
    sums = quantizers.pack(change.ggml_type, rows, packed, None, scratch)
    if sums is None:
        raise GgufError(f"damaged GGUF file: {path}: {stored.name} holds NaN or infinity; convert it again")
    return packed, sums
