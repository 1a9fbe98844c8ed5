"""Reads rows of checkpoint tensors as float32, transformed as the mapping says."""

import os
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np

from convert_step35.planning.chunks import Chunk
from convert_step35.quantization.libggml import Ggml
from convert_step35.reading.ranges import read_into
from convert_step35.reading.read_ahead import Place
from convert_step35.source.checkpoint import FP8_DTYPE, BlockScale, Checkpoint, Source
from convert_step35.source.mapping import Kind, MappedTensor
from convert_step35.source.rope_freqs import rope_freqs
from convert_step35.source.safetensors_header import StoredTensor

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, FP8_DTYPE: 1}


def _fp8_table() -> np.ndarray:
    """float32 [256]: the value of every float8_e4m3fn byte (OCP 8-bit floating point specification, E4M3)."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7))
    value[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits & 0x80, -value, value).astype(np.float32)


_FP8 = _fp8_table()


class RowReader:
    """Row ranges of a checkpoint's tensors; safe to use from several threads, each with its own buffer."""

    def __init__(self, checkpoint: Checkpoint, ggml: Ggml) -> None:
        self._checkpoint = checkpoint
        self._ggml = ggml
        self._files: dict[Path, int] = {}
        self._scales: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def __enter__(self) -> "RowReader":
        for path in self._checkpoint.shards:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)

    def place(self, tensor: MappedTensor, chunk: Chunk) -> Place | None:
        """Where the chunk's bytes stand; None for a tensor that is generated."""
        source = self._checkpoint.source_of(tensor)
        if source is None:
            return None
        stored = source.weight
        row_bytes = tensor.row_size * _ITEM_BYTES[stored.dtype]
        return Place(stored.path, stored.offset + chunk.first_row * row_bytes, chunk.n_rows * row_bytes)

    def read(self, tensor: MappedTensor, chunk: Chunk, out: np.ndarray, raw: np.ndarray) -> np.ndarray:
        """Read the chunk by itself and widen it; `raw` is a uint8 work buffer."""
        place = self.place(tensor, chunk)
        if place is None:
            return self.generated(tensor, chunk, out)
        data = raw[: place.n_bytes]
        read_into(self._files[place.path], data, place.offset, place.path)
        return self._widened(self._source(tensor), tensor, chunk, data, out)

    def weights(self, tensor: MappedTensor, chunk: Chunk, data: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The chunk of these bytes, [n_rows, row_size]: bfloat16 matrices as they are, in uint16, all else widened."""
        source = self._source(tensor)
        if tensor.kind is Kind.MATRIX and source.weight.dtype == "BF16":
            return data.view("<u2").reshape(chunk.n_rows, tensor.row_size)
        return self._widened(source, tensor, chunk, data, out)

    def generated(self, tensor: MappedTensor, chunk: Chunk, out: np.ndarray) -> np.ndarray:
        """Fill float32 `out` with the chunk of a tensor that no file has, and return it as [n_rows, row_size]."""
        rows = _shaped(out, tensor, chunk)
        rows[:] = rope_freqs(self._checkpoint.arch)
        return rows

    def _source(self, tensor: MappedTensor) -> Source:
        """What a tensor with bytes is made of."""
        source = self._checkpoint.source_of(tensor)
        assert source is not None, f"{tensor.name} is generated"
        return source

    def _widened(
        self, source: Source, tensor: MappedTensor, chunk: Chunk, data: np.ndarray, out: np.ndarray
    ) -> np.ndarray:
        """Fill float32 `out` with the chunk of these bytes and return it as [n_rows, row_size]."""
        rows = _shaped(out, tensor, chunk)
        self._convert(source, chunk, rows, data)
        if tensor.kind is Kind.NORM:
            rows += np.float32(1.0)
        return rows

    def _convert(self, source: Source, chunk: Chunk, rows: np.ndarray, data: np.ndarray) -> None:
        if source.scale is not None:
            np.take(_FP8, data, out=rows.reshape(-1))
            rows *= self._fp8_scales(source.weight, source.scale, chunk, rows.shape[1])
        elif source.weight.dtype == "BF16":
            self._ggml.bf16_to_f32(data, rows)
        elif source.weight.dtype == "F16":
            self._ggml.f16_to_f32(data, rows)
        else:
            rows.reshape(-1)[:] = data.view("<f4")

    def _fp8_scales(self, weight: StoredTensor, scale: BlockScale, chunk: Chunk, row_size: int) -> np.ndarray:
        """float32 [n_rows, row_size]: dequantization multiplies by `weight_scale_inv`, whatever its name says."""
        scales = self._scale_matrices(scale.stored)[chunk.expert]
        first = chunk.first_row - chunk.expert * weight.shape[-2]
        per_row = scales[np.arange(first, first + chunk.n_rows) // scale.block_rows]
        return np.repeat(per_row, scale.block_columns, axis=1)[:, :row_size]

    def _scale_matrices(self, scale: StoredTensor) -> np.ndarray:
        """float32 [n_experts, row blocks, column blocks], kept: all scales of the real model are 46 MB."""
        with self._lock:
            if scale.name not in self._scales:
                data = np.empty(scale.n_bytes, dtype=np.uint8)
                read_into(self._files[scale.path], data, scale.offset, scale.path)
                values = np.empty(scale.shape, dtype=np.float32)
                chunk = Chunk(0, 0, 1, 0)
                self._convert(Source(scale), chunk, values.reshape(1, -1), data)
                self._scales[scale.name] = values.reshape(-1, *scale.shape[-2:])
            return self._scales[scale.name]


def _shaped(out: np.ndarray, tensor: MappedTensor, chunk: Chunk) -> np.ndarray:
    """The part of float32 `out` that the chunk fills, [n_rows, row_size]."""
    return out[: chunk.n_rows * tensor.row_size].reshape(chunk.n_rows, tensor.row_size)
