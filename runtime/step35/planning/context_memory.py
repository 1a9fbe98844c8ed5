"""How many bytes a model and its contexts take, from the header alone.

Everything here is arithmetic; tests compare it with llama.cpp's own dry run, to the byte. The
contexts are those that the engine opens: one for the trunk, one for each MTP head. All of a context's
buffers are counted as if on one device; `placement` says which.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from step35.choices import KV_TYPES
from step35.planning import graph_allocator as graph_memory
from step35.planning.compute_graphs import F16, F32, Step, head_graph, trunk_graph
from step35.planning.model_header import Header, LayerShape, ModelShape, Tensor, is_skipped
from step35.row_counts import head_rows, verify_rows

CELL_PADDING = 256
"""llama.cpp pads a context and the sliding-window ring to this many cells."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is asked of the engine: the settings that memory depends on."""

    n_ctx: int = 32768
    n_batch: int = 512
    n_sessions: int = 1
    n_heads: int = 0
    """MTP heads that draft; with 0 their weights are not loaded either."""
    kv_type: str = "f16"
    n_checkpoints: int = 4
    has_flash_attention: bool = True

    @property
    def n_cells(self) -> int:
        return padded(self.n_ctx)


@dataclass(frozen=True, slots=True)
class ContextBytes:
    """The buffers of one context. `layers` has the KV bytes of every layer, 0 where it keeps none."""

    layers: tuple[int, ...]
    compute: int
    inputs: int
    """The part of `compute` that comes from the host at every step."""
    embedded: int
    """The rows of the token embedding that the host looks up: it has no other part of a graph that runs elsewhere."""
    outputs: int
    """Logits and hidden states, on the host."""

    @property
    def kv(self) -> int:
        return sum(self.layers)


def padded(n: int, to: int = CELL_PADDING) -> int:
    """Returns n, rounded up to a multiple."""
    return -(-n // to) * to


def ring_cells(shape: ModelShape, run: Run, n_batch: int) -> int:
    """Returns the cells of a sliding layer: the window of every session, and one batch."""
    return padded(min(run.n_cells, shape.window * run.n_sessions + n_batch))


def cell_bytes(shape: ModelShape, layer: LayerShape, kv_type: str) -> int:
    """Returns the bytes of one layer's K and V of one token."""
    return int(2 * layer.n_head_kv * shape.head_dim * KV_TYPES[kv_type].n_bits / 8)


@cache
def trunk_context(shape: ModelShape, run: Run) -> ContextBytes:
    """Returns the buffers of the trunk's context."""
    n_batch = min(run.n_batch, run.n_ctx)
    n_ring = ring_cells(shape, run, n_batch)
    n_cells = [n_ring if layer.is_sliding else run.n_cells for layer in shape.trunk]
    kv = [cell_bytes(shape, layer, run.kv_type) * n for layer, n in zip(shape.trunk, n_cells, strict=True)]
    step = _step(run, n_batch, verify_rows(n_batch, run.n_sessions), n_ring)
    outputs = F32 * (shape.n_vocab * step.n_outputs + shape.n_embd * n_batch)
    compute = graph_memory.n_bytes(trunk_graph(shape, step))
    embedded = F32 * shape.n_embd * step.n_tokens
    inputs = _mask_bytes(step, step.n_cells + step.n_ring_cells) + embedded
    return ContextBytes((*kv, *[0] * len(shape.heads)), compute, inputs, embedded, outputs)


@cache
def head_context(shape: ModelShape, run: Run) -> ContextBytes:
    """Returns the buffers of one head's context; llama.cpp keeps cells for all heads in each."""
    shape = replace(shape, n_vocab=shape.n_head_vocab)
    n_batch = min(head_rows(run.n_sessions), run.n_ctx)
    n_ring = ring_cells(shape, run, n_batch)
    kv = [cell_bytes(shape, layer, run.kv_type) * n_ring for layer in shape.heads]
    step = _step(run, n_batch, n_batch, n_ring)
    outputs = F32 * (shape.n_vocab + shape.n_embd) * step.n_outputs
    compute = graph_memory.n_bytes(head_graph(shape, step))
    embedded = F32 * shape.n_embd * step.n_tokens
    inputs = _mask_bytes(step, step.n_ring_cells) + embedded
    return ContextBytes((*[0] * shape.n_trunk, *kv), compute, inputs, embedded, outputs)


def _step(run: Run, n_batch: int, n_outputs: int, n_ring: int) -> Step:
    n_tokens = padded(n_batch, run.n_sessions)
    rotates_kv = KV_TYPES[run.kv_type].is_quantized
    return Step(n_tokens, min(n_tokens, n_outputs), run.n_cells, n_ring, run.has_flash_attention, rotates_kv)


def _mask_bytes(step: Step, n_cells: int) -> int:
    return step.n_tokens * n_cells * (F16 if step.has_flash_attention else F32)


def checkpoint_bytes(shape: ModelShape, run: Run) -> int:
    """Returns the bytes of one checkpoint: the window's cells of all sliding layers of one session."""
    return shape.window * sum(cell_bytes(shape, layer, run.kv_type) for layer in shape.trunk if layer.is_sliding)


def checkpoints_bytes(shape: ModelShape, run: Run) -> int:
    """Returns the bytes of all checkpoints that the sessions may keep."""
    return run.n_sessions * run.n_checkpoints * checkpoint_bytes(shape, run)


def loaded_tensors(header: Header, with_heads: bool) -> tuple[Tensor, ...]:
    """Returns the tensors that llama.cpp loads: without the heads still most of theirs."""
    return tuple(tensor for tensor in header.tensors if with_heads or not is_skipped(tensor))


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of some weights in a buffer, where every tensor starts at a multiple of 32."""
    return sum(padded(tensor.n_bytes, graph_memory.ALIGNMENT) for tensor in tensors)
