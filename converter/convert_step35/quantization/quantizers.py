"""Picks what quantizes a type: the native kernels where they make libggml's bytes, else libggml."""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.errors import OptionError, quoted
from convert_step35.gguf.ggml_types import QUANTIZABLE, block_size, row_bytes
from convert_step35.quantization.libggml import Ggml, load_ggml
from convert_step35.quantization.measure import Sums, sums

# An environment variable: with "libggml" the native kernels are left alone.
SWITCH = "CONVERT_STEP35_QUANTIZERS"

_LIBRARY = {"darwin": "libquantizers.dylib", "win32": "quantizers.dll"}.get(sys.platform, "libquantizers.so")
_TRIAL_COLUMNS = 512
_TILE_WEIGHTS = 256 * 1024  # 1 MiB of float32
_DONE = 1  # what the native quantizer returns where all went well


class Native:
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

    def pack(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> Sums | None:
        """As `quantize`, and compare what the bytes give with the rows; None where a weight is NaN or infinite."""
        found = (ctypes.c_double * 3)()
        is_finite = self._quantize(kind, rows, out, imatrix, found) == _DONE
        return Sums(*found) if is_finite else None

    def dequantize(self, kind: GgmlType, data: np.ndarray, out: np.ndarray) -> None:
        """As Ggml.dequantize, for one of `kinds`."""
        assert kind in self.kinds and _is_plain(out) and data.nbytes >= row_bytes(kind, out.size)
        self._call("dequantize", kind, data.ctypes.data, out.size, out.ctypes.data)

    def all_finite(self, rows: np.ndarray) -> bool:
        assert _is_plain(rows)
        return bool(self._library.step35_all_finite(self.lanes, rows.ctypes.data, rows.size))

    def measure(self, rows: np.ndarray, restored: np.ndarray) -> Sums:
        """As measure.sums, but `restored` stays."""
        assert _is_plain(rows) and _is_plain(restored) and rows.shape == restored.shape
        out = (ctypes.c_double * 3)()
        self._library.step35_measure(self.lanes, rows.ctypes.data, restored.ctypes.data, *rows.shape, out)
        return Sums(*out)

    def _quantize(
        self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None, found: ctypes.Array | None
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

    def _call(self, name: str, kind: GgmlType, *arguments: int | None) -> int:
        return getattr(self._library, f"step35_{name}")(self.lanes, int(kind), *arguments)


def _is_plain(values: np.ndarray) -> bool:
    return values.dtype == np.float32 and values.flags.c_contiguous


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

    def pack(
        self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None, scratch: np.ndarray
    ) -> Sums | None:
        """Quantize for a prepared type and measure what that did; None where a weight is NaN or infinite.

        `rows` are [n_rows, row_size] of float32, or of bfloat16 in uint16; `scratch` is float32 [2, rows.size or more],
        and its first half may hold the rows.
        """
        if self._trusted[kind]:
            return self._native.pack(kind, rows, out, imatrix)
        wide = self.widened(rows, scratch[0, : rows.size].reshape(rows.shape))
        if not self.all_finite(wide):
            return None
        return self._pack_in_steps(kind, wide, out, imatrix, scratch[1])

    def _pack_in_steps(
        self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None, restored: np.ndarray
    ) -> Sums:
        """Some rows at a time, which stay in a core's cache from step to step."""
        found, done, at_once = Sums(0.0, 0.0, 0.0), 0, max(1, _TILE_WEIGHTS // rows.shape[1])
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
        (self._native if self._trusted[kind] else self.ggml).dequantize(kind, data, out)

    def all_finite(self, rows: np.ndarray) -> bool:
        """False where a float32 weight is NaN or infinite."""
        return self._native.all_finite(rows) if self._native is not None else bool(np.isfinite(rows).all())

    def measure(self, rows: np.ndarray, restored: np.ndarray) -> Sums:
        """Compare float32 [n_rows, row_size] with what its quantized bytes give; `restored` is overwritten."""
        return self._native.measure(rows, restored) if self._native is not None else sums(rows, restored)

    def _agrees(self, kind: GgmlType) -> bool:
        if all(self._agrees_on(kind, weights) for weights in trial_weights()):
            return True
        self.notes.append(f"the native {kind.name} does otherwise than libggml here; libggml is used, which is slower")
        return False

    def _agrees_on(self, kind: GgmlType, weights: np.ndarray | None) -> bool:
        """Both make the same bytes of the trial rows, also in bfloat16, and the same numbers of the bytes."""
        rows = trial_rows()
        halves = np.ascontiguousarray(rows.view("<u2")[:, 1::2])
        wide = self.widened(halves, np.empty_like(rows))
        return self._agrees_with(kind, rows, rows, weights) and self._agrees_with(kind, halves, wide, weights)

    def _agrees_with(self, kind: GgmlType, stored: np.ndarray, rows: np.ndarray, weights: np.ndarray | None) -> bool:
        ours, theirs = np.zeros((2, rows.nbytes), np.uint8)
        self._native.quantize(kind, stored, ours, weights)
        self.ggml.quantize(kind, rows, theirs, weights)
        restored, expected = np.zeros((2, *rows.shape), np.float32)
        self._native.dequantize(kind, theirs, restored)
        self.ggml.dequantize(kind, theirs, expected)
        same = np.array_equal(ours, theirs) and restored.tobytes() == expected.tobytes()
        # Scales of huge rows are beyond float16, and nothing is to be measured there.
        held = np.isfinite(expected).all(axis=1)
        found = self._native.pack(kind, stored[held], ours, weights)
        return same and found is not None and found.agrees_with(sums(rows[held], expected[held]))


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
