"""An importance matrix: how much each input column of each matrix (of each expert) matters.

The GGUF form of llama-imatrix: `NAME.in_sum2` and `NAME.counts`; weights are sum / count, and 1.0 for an
expert that was never hit, as llama-quantize does.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as V

from convert_step35.errors import GgufError, PlanError, quoted
from convert_step35.gguf.header import Entry
from convert_step35.gguf.reader import GgufFile, GgufTensor, read_gguf
from convert_step35.source.mapping import MappedTensor

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Importance:
    """The sums of one matrix, float32 [n_matrices, row_size], and its counts, float32 [n_matrices]."""

    sums: np.ndarray
    counts: np.ndarray

    def weights(self, expert: int) -> np.ndarray:
        """float32 [row_size] for one matrix of the stack."""
        count = self.counts[expert]
        if count <= 0:
            return np.ones(self.sums.shape[1], dtype=np.float32)
        return np.divide(self.sums[expert], count, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Imatrix:
    """A whole file; the sums stay on disk behind a map."""

    path: Path
    sha256: str
    entries: dict[str, Importance]
    datasets: tuple[str, ...]
    n_chunks: int

    def provenance(self) -> tuple[Entry, ...]:
        """llama-quantize's own keys for the file, its data and its size."""
        keys = [Entry("quantize.imatrix.file", V.STRING, os.fsencode(self.path.name).decode(errors="replace"))]
        if self.datasets:
            keys.append(Entry("quantize.imatrix.dataset", V.STRING, self.datasets[0]))
        keys.append(Entry("quantize.imatrix.entries_count", V.UINT32, len(self.entries)))
        if self.n_chunks:
            keys.append(Entry("quantize.imatrix.chunks_count", V.UINT32, self.n_chunks))
        return tuple(keys)


def read_imatrix(path: Path) -> Imatrix:
    """Read and check an imatrix: NaN, infinities, negative sums and a missing half are refused."""
    file = read_gguf(path)
    names = sorted(name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS))
    if not names:
        raise PlanError(
            f"not an imatrix: {path} expected tensors that end in {_SUMS}, got none; make one with llama-imatrix"
        )
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return Imatrix(
        path=path,
        sha256=_sha256(path),
        entries={name: _importance(file, name, data) for name in names},
        datasets=_datasets(file),
        n_chunks=_n_chunks(file),
    )


def check_fit(imatrix: Imatrix, tensors: tuple[MappedTensor, ...]) -> None:
    """Every entry for a tensor of this model has its row size and its number of experts."""
    for tensor in tensors:
        entry = imatrix.entries.get(tensor.name)
        if entry is None:
            continue
        want = (tensor.shape[0] if len(tensor.shape) == 3 else 1, tensor.row_size)
        if entry.sums.shape != want:
            raise PlanError(
                f"imatrix of another model: {imatrix.path}: {tensor.name} expected {want} (matrices, columns), "
                f"got {entry.sums.shape}"
            )


def _datasets(file: GgufFile) -> tuple[str, ...]:
    names = file.metadata.get("imatrix.datasets", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanError(
            f"damaged imatrix: {file.path}: imatrix.datasets expected a list of names, got {quoted(names)}; "
            "make the imatrix again"
        )
    return tuple(names)


def _n_chunks(file: GgufFile) -> int:
    n = file.metadata.get("imatrix.chunk_count", 0)
    if type(n) is not int or not 0 <= n < 2**32:
        raise PlanError(
            f"damaged imatrix: {file.path}: imatrix.chunk_count expected a count, got {quoted(n)}; "
            "make the imatrix again"
        )
    return n


def _importance(file: GgufFile, name: str, data: np.ndarray) -> Importance:
    counts_tensor = file.tensors.get(name + _COUNTS)
    if counts_tensor is None:
        raise PlanError(f"damaged imatrix: {file.path}: {name} has sums but no counts")
    counts = _floats(file, counts_tensor, data).reshape(-1)
    sums = _floats(file, file.tensors[name + _SUMS], data)
    if counts.size == 0 or sums.size % counts.size:
        raise PlanError(f"damaged imatrix: {file.path}: {name} has {sums.size} sums for {counts.size} counts")
    for what, values in (("sums", sums), ("counts", counts)):
        if not np.isfinite(values).all() or (values < 0).any():
            raise PlanError(
                f"damaged imatrix: {file.path}: {what} of {name} expected finite numbers of 0 or more; "
                "make the imatrix again"
            )
    return Importance(sums.reshape(counts.size, -1), np.rint(counts))


def _floats(file: GgufFile, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
    if tensor.ggml_type is not GgmlType.F32:
        raise GgufError(f"damaged imatrix: {file.path}: {tensor.name} expected F32, got {tensor.ggml_type.name}")
    return data[tensor.offset : tensor.offset + tensor.n_bytes].view(np.float32)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
