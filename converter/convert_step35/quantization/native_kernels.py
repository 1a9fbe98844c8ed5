"""The native kernels that the install compiled: some types of ggml, many blocks at once, with libggml's bytes."""

import ctypes
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.gguf.ggml_types import QUANTIZABLE, block_size, row_bytes
from convert_step35.quantization.measure import ErrorSums

_LIBRARY = {"darwin": "libquantizers.dylib", "win32": "quantizers.dll"}.get(sys.platform, "libquantizers.so")
_FINITE = 1  # what the native quantizer returns where no weight was NaN or infinite


def native_path() -> Path:
    """Where the install leaves the native kernels."""
    return Path(__file__).with_name("native") / _LIBRARY


class NativeKernels:
    """The kernels of one library, for `lanes` blocks at a time. Every call releases the GIL."""

    def __init__(self, path: Path, lanes: int | None = None) -> None:
        self._library = ctypes.CDLL(str(path))
        number, pointer, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        self._declare("quantize", number, number, number, pointer, count, count, pointer, pointer, pointer)
        self._declare("dequantize", number, number, pointer, count, pointer)
        self._declare("all_finite", number, pointer, count)
        self._declare("measure", None, pointer, pointer, count, count, pointer)
        self.lanes = lanes or self._library.step35_lanes()
        self.kinds = frozenset(kind for kind in QUANTIZABLE if self._call("dequantize", kind, None, 0, None))

    def quantize(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> int:
        """As Ggml.quantize, for one of `kinds`; `rows` may be bfloat16 too, in uint16."""
        self._quantize(kind, rows, out, imatrix, None)
        return rows.shape[0] * row_bytes(kind, rows.shape[1])

    def pack(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> ErrorSums | None:
        """As `quantize`, and compare what the bytes give with the rows; None where a weight is NaN or infinite."""
        found = (ctypes.c_double * 3)()
        is_finite = self._quantize(kind, rows, out, imatrix, found) == _FINITE
        return ErrorSums(*found) if is_finite else None

    def dequantize(self, kind: GgmlType, data: np.ndarray, out: np.ndarray) -> None:
        """As Ggml.dequantize, for one of `kinds`."""
        assert kind in self.kinds and _is_plain(out) and data.nbytes >= row_bytes(kind, out.size)
        self._call("dequantize", kind, data.ctypes.data, out.size, out.ctypes.data)

    def all_finite(self, rows: np.ndarray) -> bool:
        assert _is_plain(rows)
        return bool(self._library.step35_all_finite(self.lanes, rows.ctypes.data, rows.size))

    def measure(self, rows: np.ndarray, restored: np.ndarray) -> ErrorSums:
        """As measure.error_sums, but `restored` is not overwritten."""
        assert _is_plain(rows) and _is_plain(restored) and rows.shape == restored.shape
        out = (ctypes.c_double * 3)()
        self._library.step35_measure(self.lanes, rows.ctypes.data, restored.ctypes.data, *rows.shape, out)
        return ErrorSums(*out)

    def _quantize(
        self,
        kind: GgmlType,
        rows: np.ndarray,
        out: np.ndarray,
        imatrix: np.ndarray | None,
        found: "ctypes.Array[ctypes.c_double] | None",
    ) -> int:
        is_bf16 = rows.dtype == np.uint16
        assert kind in self.kinds and (_is_plain(rows) or (is_bf16 and rows.flags.c_contiguous))
        assert rows.shape[1] % block_size(kind) == 0 and out.nbytes >= rows.shape[0] * row_bytes(kind, rows.shape[1])
        assert imatrix is None or (_is_plain(imatrix) and imatrix.shape == rows.shape[1:])
        weights = imatrix.ctypes.data if imatrix is not None else None
        return self._call("quantize", kind, is_bf16, rows.ctypes.data, *rows.shape, weights, out.ctypes.data, found)

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self._library, f"step35_{name}")
        function.restype, function.argtypes = result, [ctypes.c_int, *arguments]

    def _call(self, name: str, kind: GgmlType, *arguments: "int | ctypes.Array[ctypes.c_double] | None") -> int:
        return getattr(self._library, f"step35_{name}")(self.lanes, int(kind), *arguments)


def _is_plain(values: np.ndarray) -> bool:
    return values.dtype == np.float32 and values.flags.c_contiguous
