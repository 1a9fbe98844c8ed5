"""What quantization did to the numbers: sums over chunks, and the errors per tensor made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convert_step35.errors import CheckpointError
from convert_step35.planning.chunks import chunk_at
from convert_step35.source.mapping import MappedTensor


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Of a chunk: the largest absolute error, the sum of squared errors, and the sum of squared weights."""

    max_error: float
    squared_error: float
    squared_sum: float

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(
            max(self.max_error, other.max_error),
            self.squared_error + other.squared_error,
            self.squared_sum + other.squared_sum,
        )

    def agrees_with(self, other: "ErrorSums") -> bool:
        """The same largest error, and sums that differ by the order of their float32 additions only."""
        return self.max_error == other.max_error and all(
            math.isclose(getattr(self, name), getattr(other, name), rel_tol=1e-4)
            for name in ("squared_error", "squared_sum")
        )


@dataclass(frozen=True, slots=True)
class TensorErrors:
    """The error of one tensor. NMSE = sum (x - q)^2 / sum x^2; SQNR = -10 log10 NMSE, None where NMSE is 0."""

    nmse: float
    sqnr_db: float | None
    max_abs_error: float
    worst_expert: int | None
    worst_expert_nmse: float | None


def error_sums(rows: np.ndarray, restored: np.ndarray) -> ErrorSums:
    """Compare float32 [n_rows, row_size] with what its quantized bytes give; `restored` is overwritten."""
    np.subtract(restored, rows, out=restored)
    return ErrorSums(float(max(restored.max(), -restored.min())), _squared_sum(restored), _squared_sum(rows))


def _squared_sum(rows: np.ndarray) -> float:
    """float32 within a row, float64 over rows."""
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


def tensor_errors(tensor: MappedTensor, sums: Sequence[ErrorSums]) -> TensorErrors:
    """Errors of a tensor from those of all its chunks, in chunk order."""
    nmse = _nmse(sums)
    worst, worst_nmse = _worst_expert(tensor, sums) if len(tensor.shape) == 3 else (None, None)
    return TensorErrors(
        nmse=nmse,
        sqnr_db=-10 * math.log10(nmse) if nmse > 0 else None,
        max_abs_error=max(chunk.max_error for chunk in sums),
        worst_expert=worst,
        worst_expert_nmse=worst_nmse,
    )


def _nmse(sums: Sequence[ErrorSums]) -> float:
    total = math.fsum(chunk.squared_sum for chunk in sums)
    return math.fsum(chunk.squared_error for chunk in sums) / total if total > 0 else 0.0


def _worst_expert(tensor: MappedTensor, sums: Sequence[ErrorSums]) -> tuple[int, float]:
    by_expert: dict[int, list[ErrorSums]] = {}
    for index, chunk in enumerate(sums):
        by_expert.setdefault(chunk_at(tensor, index).expert, []).append(chunk)
    nmse = {expert: _nmse(group) for expert, group in by_expert.items()}
    worst = max(nmse, key=lambda expert: nmse[expert])
    return worst, nmse[worst]


def non_finite(rows: np.ndarray, tensor: MappedTensor) -> CheckpointError:
    """The error for rows that hold NaN or infinity: no quantizer accepts one."""
    row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
    return CheckpointError(
        f"non-finite weight: {tensor.source} holds NaN or infinity in row {row} of a chunk; the checkpoint is damaged"
    )
