"""Cuts tensors into chunks of rows, the unit that is read, quantized, written and journalled.

The cut depends on shapes alone, so the output does not depend on the number of threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from convert_step35.source.mapping import MappedTensor

# Two megabytes of bfloat16: many beside what Python does a chunk, few beside a model.
CHUNK_WEIGHTS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `first_row` to `first_row + n_rows` of a tensor, counted over all experts; never over an expert's end."""

    index: int
    first_row: int
    n_rows: int
    expert: int


def n_chunks(tensor: MappedTensor) -> int:
    """How many chunks a tensor has."""
    n_experts, n_rows, per_chunk = _rows(tensor)
    return n_experts * -(-n_rows // per_chunk)


def chunks(tensor: MappedTensor) -> Iterator[Chunk]:
    """All chunks of a tensor in order."""
    return (chunk_at(tensor, i) for i in range(n_chunks(tensor)))


def chunk_at(tensor: MappedTensor, index: int) -> Chunk:
    """The chunk with this index."""
    _, n_rows, per_chunk = _rows(tensor)
    expert, part = divmod(index, -(-n_rows // per_chunk))
    first = part * per_chunk
    return Chunk(index, expert * n_rows + first, min(per_chunk, n_rows - first), expert)


def _rows(tensor: MappedTensor) -> tuple[int, int, int]:
    """Experts, rows in each, and rows in a chunk."""
    *outer, row_size = tensor.shape
    n_experts, n_rows = outer if len(outer) == 2 else (1, outer[0] if outer else 1)
    return n_experts, n_rows, max(1, CHUNK_WEIGHTS // row_size)
