"""Tries a native kernel beside libggml: it is used only where it makes the same bytes and measures the same errors."""

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.quantization.libggml import Ggml
from convert_step35.quantization.measure import error_sums
from convert_step35.quantization.native_kernels import NativeKernels

_COLUMNS = 512


def trial_rows() -> np.ndarray:
    """float32 [n, 512]: rows on which other arithmetic gives other bytes: ordinary ones, and those at the edges."""
    rng = np.random.default_rng(35)
    noise = rng.standard_normal((16, _COLUMNS))
    wide = rng.standard_normal((8, _COLUMNS)) * 10.0 ** rng.uniform(-42, 18, (8, _COLUMNS))
    lone = np.zeros((3, _COLUMNS))
    lone[np.arange(3), (0, 37, 300)] = 3e-39, -1.0, 7e18
    levels = rng.integers(-8, 8, (4, _COLUMNS)) / 16
    flat = np.repeat([[0.0], [-0.0], [0.25], [-3.0], [1e-41]], _COLUMNS, axis=1)
    rows = [noise * 0.02, np.abs(noise[:4]), -np.abs(noise[4:8]), wide, lone, levels, flat]
    return np.concatenate(rows).astype("<f4")


def trial_weights() -> tuple[np.ndarray | None, ...]:
    """No imatrix, and one with zeros and large values in it."""
    rng = np.random.default_rng(36)
    weights = rng.lognormal(0, 2, _COLUMNS) * (rng.random(_COLUMNS) < 0.9)
    return None, weights.astype("<f4")


def agrees_with_libggml(kernels: NativeKernels, ggml: Ggml, kind: GgmlType) -> bool:
    """The kernel makes libggml's bytes of the trial rows, in float32 and in bfloat16, and the same numbers of them."""
    rows = trial_rows()
    halves = np.ascontiguousarray(rows.view("<u2")[:, 1::2])
    wide = np.empty_like(rows)
    ggml.bf16_to_f32(halves, wide)
    forms = ((rows, rows), (halves, wide))
    return all(
        _agrees_on(kernels, ggml, kind, stored, in_f32, weights)
        for weights in trial_weights()
        for stored, in_f32 in forms
    )


def _agrees_on(
    kernels: NativeKernels, ggml: Ggml, kind: GgmlType, stored: np.ndarray, rows: np.ndarray, weights: np.ndarray | None
) -> bool:
    """On these rows, `stored` as the kernel takes them and float32 for libggml."""
    ours, theirs = np.zeros(rows.nbytes, np.uint8), np.zeros(rows.nbytes, np.uint8)
    kernels.quantize(kind, stored, ours, weights)
    ggml.quantize(kind, rows, theirs, weights)
    restored, expected = np.zeros_like(rows), np.zeros_like(rows)
    kernels.dequantize(kind, theirs, restored)
    ggml.dequantize(kind, theirs, expected)
    same = np.array_equal(ours, theirs) and restored.tobytes() == expected.tobytes()
    # Scales of huge rows are beyond float16, and nothing is to be measured there.
    finite = np.isfinite(expected).all(axis=1)
    found = kernels.pack(kind, stored[finite], ours, weights)
    return same and found is not None and found.agrees_with(error_sums(rows[finite], expected[finite]))
