"""Picks what quantizes a type: the native kernels where they make libggml's bytes, else libggml."""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.errors import OptionError, quoted
from convert_step35.ggml import QUANTIZABLE, Ggml, load_ggml, row_bytes
from convert_step35.measure import Sums, sums

# An environment variable: with "libggml" the native kernels are left alone.
SWITCH = "CONVERT_STEP35_QUANTIZERS"

_LIBRARY = {"darwin": "libquantizers.dylib", "win32": "quantizers.dll"}.get(sys.platform, "libquantizers.so")
_TRIAL_COLUMNS = 512


class Native:
    """The kernels of one library, `lanes` blocks at a time. Every call releases the GIL."""

    def __init__(self, path: Path, lanes: int | None = None) -> None:
        library = ctypes.CDLL(str(path))
        self._quantize, self._measure = library.step35_quantize, library.step35_measure
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, ctypes.c_int, pointer, count, count, pointer, pointer]
        self._measure.argtypes = [ctypes.c_int, pointer, pointer, count, count, pointer]
        self._measure.restype = None
        self.lanes = lanes or library.step35_lanes()
        self.kinds = frozenset(kind for kind in QUANTIZABLE if self._call(kind, None, (0, 256), None, None))

    def quantize(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> int:
        """As Ggml.quantize, for one of `kinds`."""
        n_bytes = rows.shape[0] * row_bytes(kind, rows.shape[1])
        assert rows.dtype == np.float32 and rows.flags.c_contiguous and out.nbytes >= n_bytes and kind in self.kinds
        weights = None
        if imatrix is not None:
            assert imatrix.dtype == np.float32 and imatrix.shape == rows.shape[1:] and imatrix.flags.c_contiguous
            weights = imatrix.ctypes.data
        self._call(kind, rows.ctypes.data, rows.shape, weights, out.ctypes.data)
        return n_bytes

    def measure(self, rows: np.ndarray, restored: np.ndarray) -> Sums:
        """As measure.sums, but `restored` stays."""
        assert rows.shape == restored.shape and rows.dtype == restored.dtype == np.float32
        assert rows.flags.c_contiguous and restored.flags.c_contiguous
        out = (ctypes.c_double * 3)()
        self._measure(self.lanes, rows.ctypes.data, restored.ctypes.data, *rows.shape, out)
        return Sums(*out)

    def _call(
        self, kind: GgmlType, rows: int | None, shape: tuple[int, ...], weights: int | None, out: int | None
    ) -> int:
        return self._quantize(self.lanes, int(kind), rows, *shape, weights, out)


class Quantizers:
    """What quantizes each type. `notes` say why libggml does what native kernels could do faster."""

    def __init__(self, ggml: Ggml, native: Native | None) -> None:
        self.ggml = ggml
        self.notes: list[str] = []
        self._native = native
        self._trusted: dict[GgmlType, bool] = {}

    def prepare(self, kinds: set[GgmlType]) -> None:
        """Build the tables of these types, and try each native kernel once beside libggml."""
        self.ggml.prepare(kinds)
        for kind in sorted(kinds - self._trusted.keys()):
            self._trusted[kind] = self._native is not None and kind in self._native.kinds and self._agrees(kind)

    def name(self, kind: GgmlType) -> str:
        """Who quantizes a prepared type, for reports."""
        return f"native, {self._native.lanes} lanes" if self._trusted[kind] else "libggml"

    def quantize(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> int:
        """As Ggml.quantize, for a prepared type."""
        chosen = self._native if self._trusted[kind] else self.ggml
        return chosen.quantize(kind, rows, out, imatrix)

    def measure(self, rows: np.ndarray, restored: np.ndarray) -> Sums:
        """Compare float32 [n_rows, row_size] with what its quantized bytes give; `restored` is overwritten."""
        return self._native.measure(rows, restored) if self._native is not None else sums(rows, restored)

    def _agrees(self, kind: GgmlType) -> bool:
        rows = trial_rows()
        if all(
            np.array_equal(self._bytes(self.ggml, kind, rows, w), self._bytes(self._native, kind, rows, w))
            for w in trial_weights()
        ):
            return True
        self.notes.append(
            f"the native {kind.name} makes other bytes than libggml here; libggml is used, which is slower"
        )
        return False

    @staticmethod
    def _bytes(maker: Ggml | Native, kind: GgmlType, rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        out = np.zeros(rows.shape[0] * row_bytes(kind, rows.shape[1]), np.uint8)
        maker.quantize(kind, rows, out, weights)
        return out


def trial_rows() -> np.ndarray:
    """float32 [n, 512]: rows that tell arithmetic apart: ordinary ones, and those at its edges."""
    rng = np.random.default_rng(35)
    noise = rng.standard_normal((16, _TRIAL_COLUMNS))
    wide = rng.standard_normal((8, _TRIAL_COLUMNS)) * 10.0 ** rng.uniform(-42, 18, (8, _TRIAL_COLUMNS))
    lone = np.zeros((3, _TRIAL_COLUMNS))
    lone[np.arange(3), (0, 37, 300)] = 3e-39, -1.0, 7e18
    levels = rng.integers(-8, 8, (4, _TRIAL_COLUMNS)) / 16
    flat = np.repeat([[0.0], [-0.0], [0.25], [-3.0], [1e-41]], _TRIAL_COLUMNS, axis=1)
    return np.concatenate([noise * 0.02, np.abs(noise[:4]), -np.abs(noise[4:8]), wide, lone, levels, flat]).astype(
        "<f4"
    )


def trial_weights() -> tuple[np.ndarray | None, ...]:
    """No imatrix, and one with zeros and large values in it."""
    rng = np.random.default_rng(36)
    weights = rng.lognormal(0, 2, _TRIAL_COLUMNS) * (rng.random(_TRIAL_COLUMNS) < 0.9)
    return None, weights.astype("<f4")


def native_path() -> Path:
    """Where the install leaves the native kernels."""
    return Path(__file__).with_name("native") / _LIBRARY


@lru_cache(maxsize=1)
def load_quantizers() -> Quantizers:
    """The native kernels if they were built, beside the installed libggml."""
    if (wish := os.environ.get(SWITCH, "native")) not in ("native", "libggml"):
        raise OptionError(f"{SWITCH} expected native or libggml, got {quoted(wish, 40)}")
    if wish == "libggml":
        return _without_native(f"{SWITCH}=libggml")
    try:
        return Quantizers(load_ggml(), Native(native_path()))
    except (OSError, AttributeError):
        return _without_native(
            f"no native quantizers: {native_path()}; install step35 again with a C++ compiler in PATH"
        )


def _without_native(reason: str) -> Quantizers:
    quantizers = Quantizers(load_ggml(), None)
    quantizers.notes.append(f"{reason}: libggml quantizes, which is about 10 times slower")
    return quantizers
