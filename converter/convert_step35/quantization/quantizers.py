"""Picks what quantizes a type: the native kernels where they make libggml's bytes, else libggml."""

import os
from functools import lru_cache

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.errors import OptionError, quoted
from convert_step35.quantization.libggml import Ggml, load_ggml
from convert_step35.quantization.measure import ErrorSums, error_sums
from convert_step35.quantization.native_kernels import NativeKernels, native_path
from convert_step35.quantization.trial import agrees_with_libggml

# An environment variable: with "libggml" the native kernels are not used.
SWITCH = "CONVERT_STEP35_QUANTIZERS"

_TILE_WEIGHTS = 256 * 1024  # 1 MiB of float32


class Quantizers:
    """What quantizes each type. `notes` say why libggml does what native kernels could do faster."""

    def __init__(self, ggml: Ggml, native: NativeKernels | None) -> None:
        self.ggml = ggml
        self.notes: list[str] = []
        self._native = native
        self._kernels: dict[GgmlType, NativeKernels | None] = {}

    def prepare(self, kinds: set[GgmlType]) -> None:
        """Build the tables of these types, and try each native kernel once beside libggml."""
        self.ggml.prepare(kinds)
        for kind in sorted(kinds - self._kernels.keys()):
            self._kernels[kind] = self._tried(kind)

    def name(self, kind: GgmlType) -> str:
        """Who quantizes a prepared type, for reports."""
        kernels = self._kernels[kind]
        return f"native, {kernels.lanes} lanes" if kernels is not None else "libggml"

    def quantize(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> int:
        """As Ggml.quantize, for a prepared type."""
        return (self._kernels[kind] or self.ggml).quantize(kind, rows, out, imatrix)

    def pack(
        self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None, scratch: np.ndarray
    ) -> ErrorSums | None:
        """Quantize for a prepared type and measure what that did; None where a weight is NaN or infinite.

        `rows` are [n_rows, row_size] of float32, or of bfloat16 in uint16; `scratch` is float32 [2, rows.size or more],
        and its first half may hold the rows.
        """
        if (kernels := self._kernels[kind]) is not None:
            return kernels.pack(kind, rows, out, imatrix)
        wide = self.widened(rows, scratch[0, : rows.size].reshape(rows.shape))
        if not self.all_finite(wide):
            return None
        return self._pack_in_steps(kind, wide, out, imatrix, scratch[1])

    def _pack_in_steps(
        self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None, restored: np.ndarray
    ) -> ErrorSums:
        """Some rows at a time, which stay in a core's cache from step to step."""
        found, done, at_once = ErrorSums(0.0, 0.0, 0.0), 0, max(1, _TILE_WEIGHTS // rows.shape[1])
        for at in range(0, len(rows), at_once):
            tile = rows[at : at + at_once]
            n_bytes = self.ggml.quantize(kind, tile, out[done:], imatrix)
            again = restored[: tile.size].reshape(tile.shape)
            self.ggml.dequantize(kind, out[done : done + n_bytes], again)
            found, done = found + self.measure(tile, again), done + n_bytes
        return found

    def widened(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Rows as `pack` takes them in float32: themselves, or filled into `out`."""
        if rows.dtype == np.uint16:
            self.ggml.bf16_to_f32(rows, out)
            return out
        return rows

    def dequantize(self, kind: GgmlType, data: np.ndarray, out: np.ndarray) -> None:
        """As Ggml.dequantize, for a prepared type."""
        (self._kernels[kind] or self.ggml).dequantize(kind, data, out)

    def all_finite(self, rows: np.ndarray) -> bool:
        """False where a float32 weight is NaN or infinite."""
        return self._native.all_finite(rows) if self._native is not None else bool(np.isfinite(rows).all())

    def measure(self, rows: np.ndarray, restored: np.ndarray) -> ErrorSums:
        """Compare float32 [n_rows, row_size] with what its quantized bytes give; `restored` is overwritten."""
        return self._native.measure(rows, restored) if self._native is not None else error_sums(rows, restored)

    def _tried(self, kind: GgmlType) -> NativeKernels | None:
        """The native kernels, if they know this type and agree with libggml on it."""
        if self._native is None or kind not in self._native.kinds:
            return None
        if agrees_with_libggml(self._native, self.ggml, kind):
            return self._native
        self.notes.append(f"the native {kind.name} does otherwise than libggml here; libggml is used, which is slower")
        return None


@lru_cache(maxsize=1)
def load_quantizers() -> Quantizers:
    """The native kernels if they were built, beside the installed libggml."""
    if (choice := os.environ.get(SWITCH, "native")) not in ("native", "libggml"):
        raise OptionError(f"{SWITCH} expected native or libggml, got {quoted(choice, 40)}")
    if choice == "libggml":
        return _without_native(f"{SWITCH}=libggml")
    try:
        return Quantizers(load_ggml(), NativeKernels(native_path()))
    except (OSError, AttributeError):
        return _without_native(
            f"no native quantizers: {native_path()}; install step35 again with a C++ compiler in PATH"
        )


def _without_native(reason: str) -> Quantizers:
    quantizers = Quantizers(load_ggml(), None)
    quantizers.notes.append(f"{reason}: libggml quantizes, which is about 10 times slower")
    return quantizers
