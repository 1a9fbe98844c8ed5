"""The native quantizers make libggml's bytes, block for block, or libggml does their work."""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from checkpoints import BUNDLED, TINY, write_checkpoint
from convert_step35.errors import OptionError
from convert_step35.gguf.ggml_types import block_size, row_bytes
from convert_step35.planning.chunks import CHUNK_WEIGHTS, chunk_at
from convert_step35.quantization.libggml import Ggml, load_ggml
from convert_step35.quantization.measure import ErrorSums, error_sums
from convert_step35.quantization.native_kernels import NativeKernels, native_path
from convert_step35.quantization.quantizers import SWITCH, Quantizers, load_quantizers
from convert_step35.quantization.trial import trial_rows, trial_weights
from convert_step35.reading.rows import RowReader
from convert_step35.source.checkpoint import open_checkpoint
from convert_step35.source.mapping import Kind, map_tensors
from convert_step35.writing.report import report_path

pytestmark = pytest.mark.skipif(not native_path().exists(), reason="installed without a C++ compiler")

KINDS = [GgmlType[name] for name in ["Q4_K", "Q8_0", "IQ4_XS", "IQ4_NL", "Q6_K", "Q5_K", "Q3_K", "Q2_K"]]
GGML = load_ggml()

Rows = np.ndarray


def widths() -> list[int]:
    """Every number of lanes that this processor runs."""
    return [lanes for lanes in (4, 8, 16) if native_path().exists() and lanes <= NativeKernels(native_path()).lanes]


def quantized(maker: Ggml | NativeKernels | Quantizers, kind: GgmlType, rows: Rows, weights: Rows | None) -> Rows:
    out = np.full(len(rows) * row_bytes(kind, rows.shape[1]), 0xA5, np.uint8)
    maker.quantize(kind, rows, out, weights)
    return out.reshape(len(rows), -1)


def assert_equal(kind: GgmlType, rows: Rows, weights: Rows | None, lanes: int) -> None:
    rows = np.ascontiguousarray(rows, np.float32)
    got = quantized(NativeKernels(native_path(), lanes), kind, rows, weights)
    differing = np.flatnonzero((got != quantized(GGML, kind, rows, weights)).any(axis=1))
    assert not len(differing), f"{kind.name}, {lanes} lanes: rows {differing.tolist()} of {len(rows)}"


def one_in(n: int, value: float, columns: int = 512) -> Rows:
    """Rows of zeros with one value, at every n-th column in turn."""
    return np.eye(columns, dtype=np.float32)[::n] * np.float32(value)


def ties(rng: np.random.Generator) -> Rows:
    """Values half way between two levels of a block whose largest is 15, 31, 63, ..., and their neighbours."""
    halves = rng.integers(-64, 64, (48, 512)) / 2.0
    halves[:, ::16] = rng.choice([15, 31, 63, 127, -16, -32, -128], (48, 32))
    exact = halves.astype(np.float32)
    return np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])


ADVERSARIAL: dict[str, Callable[[np.random.Generator], Rows]] = {
    "zeros": lambda rng: np.zeros((5, 512)),
    "negative zeros": lambda rng: np.where(rng.random((5, 512)) < 0.5, -0.0, 0.0),
    "denormals": lambda rng: rng.standard_normal((20, 512)) * 1e-40,
    "nearly denormal": lambda rng: rng.standard_normal((20, 512)) * 10.0 ** rng.uniform(-39, -30, (20, 1)),
    "around the smallest group": lambda rng: rng.standard_normal((20, 512)) * 10.0 ** rng.uniform(-17, -13, (20, 32)).repeat(16, 1),
    "one value": lambda rng: np.concatenate([one_in(61, 1.0), one_in(61, -3e-39), one_in(61, -2e30)]),
    "all equal": lambda rng: np.ones((12, 1)) * np.full((1, 512), 1.0) * rng.standard_normal((12, 1)),
    "alternating": lambda rng: np.where(np.arange(512) % 2, 1.0, -1.0) * rng.standard_normal((8, 1)),
    "outliers": lambda rng: rng.standard_normal((20, 512)) * np.where(rng.random((20, 512)) < 0.01, 1e6, 1.0),
    "huge": lambda rng: rng.standard_normal((20, 512)) * 10.0 ** rng.uniform(15, 37, (20, 1)),
    "any exponent": lambda rng: rng.standard_normal((40, 512)) * 10.0 ** rng.uniform(-44, 30, (40, 512)),
    "blocks of any size": lambda rng: rng.standard_normal((40, 512)) * 10.0 ** rng.uniform(-12, 4, (40, 32)).repeat(16, 1),
    "positive": lambda rng: np.abs(rng.standard_normal((12, 512))),
    "negative": lambda rng: -np.abs(rng.standard_normal((12, 512))),
    "narrow": lambda rng: rng.choice([-1.0, 1.0], (12, 1)) + 1e-7 * rng.standard_normal((12, 512)),
    "sparse": lambda rng: rng.standard_normal((12, 512)) * (rng.random((12, 512)) < 0.02),
    "few levels": lambda rng: rng.integers(-8, 8, (40, 512)) * 0.125,
    "ties": ties,
    "ordinary": lambda rng: rng.standard_normal((64, 512)) * 0.02,
}  # fmt: skip

IMPORTANCE: dict[str, Callable[[np.random.Generator], Rows | None]] = {
    "none": lambda rng: None,
    "ordinary": lambda rng: rng.lognormal(0, 1, 512),
    "mostly zero": lambda rng: rng.lognormal(0, 2, 512) * (rng.random(512) < 0.1),
    "zeros": lambda rng: np.zeros(512),
    "any exponent": lambda rng: 10.0 ** rng.uniform(-40, 30, 512),
}


def importance_of(name: str, rng: np.random.Generator) -> np.ndarray | None:
    """Returns an imatrix's weights of 512 columns, float32; None for none."""
    weights = IMPORTANCE[name](rng)
    return None if weights is None else weights.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_adversarial_rows_become_libggmls_bytes_at_every_width(kind: GgmlType, importance: str) -> None:
    rng = np.random.default_rng(1)
    weights = importance_of(importance, rng)
    rows = np.concatenate([make(rng) for make in ADVERSARIAL.values()])
    for lanes in widths():
        assert_equal(kind, rows, weights, lanes)


ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
ORDINARY_FLOAT = st.floats(-1, 1, width=32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[GgmlType, Rows, Rows | None, int]:
    """Rows of any finite numbers, in numbers that leave lanes over, with importance or none."""
    kind = draw(st.sampled_from(KINDS))
    shape = draw(st.integers(1, 7)), block_size(kind) * draw(st.integers(1, 3))
    rows = draw(arrays(np.float32, shape, elements=draw(st.sampled_from([ANY_FLOAT, ORDINARY_FLOAT]))))
    importance = arrays(np.float32, shape[1], elements=st.floats(0, 2.0**20, width=32))
    return kind, rows, draw(st.none() | importance), draw(st.sampled_from(widths()))


@pytest.mark.slow
@settings(max_examples=150)
@given(cases())
def test_any_finite_rows_become_libggmls_bytes(case: tuple[GgmlType, Rows, Rows | None, int]) -> None:
    assert_equal(*case)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 13, 33])
def test_rows_that_do_not_fill_the_lanes_touch_no_byte_beyond_their_own(kind: GgmlType, n_rows: int) -> None:
    rows = np.random.default_rng(n_rows).standard_normal((n_rows, 1280)).astype(np.float32)
    n_bytes = n_rows * row_bytes(kind, 1280)
    for lanes in widths():
        out = np.full(n_bytes + 64, 0xA5, np.uint8)
        assert NativeKernels(native_path(), lanes).quantize(kind, rows, out, None) == n_bytes
        assert (
            np.array_equal(out[:n_bytes], quantized(GGML, kind, rows, None).reshape(-1))
            and (out[n_bytes:] == 0xA5).all()
        )


def test_weights_of_the_trained_checkpoint_become_libggmls_bytes() -> None:
    checkpoint = open_checkpoint(BUNDLED)
    matrices = [t for t in map_tensors(checkpoint.arch, trunk=True, mtp=True) if t.kind is Kind.MATRIX]
    with RowReader(checkpoint, GGML) as reader:
        for tensor in matrices[::7]:
            out, raw = np.empty(CHUNK_WEIGHTS, np.float32), np.empty(4 * CHUNK_WEIGHTS, np.uint8)
            rows = reader.read(tensor, chunk_at(tensor, 0), out, raw)[:48]
            for kind in KINDS:
                if tensor.row_size % block_size(kind) == 0:
                    assert_equal(kind, rows, None, widths()[-1])


@pytest.mark.parametrize("row_size", [1, 31, 64, 1280])
def test_native_sums_are_numpys(row_size: int) -> None:
    rng = np.random.default_rng(row_size)
    rows = rng.standard_normal((9, row_size)).astype(np.float32)
    restored = (rows + 0.01 * rng.standard_normal(rows.shape)).astype(np.float32)
    restored[3, row_size // 2] = 7 * rows.max()
    for lanes in widths():
        got, want = NativeKernels(native_path(), lanes).measure(rows, restored), error_sums(rows, restored.copy())
        assert got.max_error == want.max_error
        assert (got.squared_error, got.squared_sum) == pytest.approx((want.squared_error, want.squared_sum), rel=1e-6)


def test_native_kernels_see_every_weight_that_is_not_finite() -> None:
    for n in (1, 5, 8, 40, 256, 300):
        for at in {0, n // 2, n - 1}:
            for bad in (np.nan, -np.nan, np.inf, -np.inf):
                rows = np.full((1, n), 3e38, np.float32)
                for lanes in widths():
                    assert NativeKernels(native_path(), lanes).all_finite(rows)
                rows[0, at] = bad
                for lanes in widths():
                    assert not NativeKernels(native_path(), lanes).all_finite(rows)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_rows", [1, 3, 64])
def test_native_dequantization_of_any_bytes_gives_libggmls_numbers(kind: GgmlType, n_rows: int) -> None:
    n = n_rows * 512
    data = np.random.default_rng(4).integers(0, 256, row_bytes(kind, n), dtype=np.uint8)
    GGML.prepare({kind})
    expected = np.zeros(n, np.float32)
    GGML.dequantize(kind, data, expected)
    for lanes in widths():
        got = np.full(n + 16, 7, np.float32)
        NativeKernels(native_path(), lanes).dequantize(kind, data, got[:n])
        np.testing.assert_array_equal(got[:n], expected)
        assert (got[n:] == 7).all()


def halves_of(rows: Rows) -> tuple[Rows, Rows]:
    """The rows cut to bfloat16, in uint16, and what those are in float32."""
    halves = np.ascontiguousarray(np.ascontiguousarray(rows, np.float32).view("<u2")[:, 1::2])
    return halves, (halves.astype(np.uint32) << 16).view(np.float32)


def packed_and_measured(
    native: NativeKernels, kind: GgmlType, rows: Rows, weights: Rows | None
) -> tuple[Rows, ErrorSums | None]:
    out = np.full(len(rows) * row_bytes(kind, rows.shape[1]), 0xA5, np.uint8)
    found = native.pack(kind, rows, out, weights)
    return out.reshape(len(rows), -1), found


def restored_by_libggml(kind: GgmlType, packed: Rows, shape: tuple[int, ...]) -> Rows:
    GGML.prepare({kind})
    restored = np.zeros(shape, np.float32)
    GGML.dequantize(kind, packed.reshape(-1), restored)
    return restored


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bfloat16_rows_become_libggmls_bytes_of_the_same_rows_in_float32(kind: GgmlType, importance: str) -> None:
    rng = np.random.default_rng(2)
    weights = importance_of(importance, rng)
    halves, rows = halves_of(np.concatenate([make(rng) for make in ADVERSARIAL.values()]))
    expected = quantized(GGML, kind, rows, weights)
    for lanes in widths():
        native = NativeKernels(native_path(), lanes)
        for got in (quantized(native, kind, halves, weights), packed_and_measured(native, kind, halves, weights)[0]):
            differing = np.flatnonzero((got != expected).any(axis=1))
            assert not len(differing), f"{kind.name}, {lanes} lanes: rows {differing.tolist()} of {len(rows)}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_what_one_call_measures_is_what_libggmls_bytes_lost(kind: GgmlType, name: str) -> None:
    rng = np.random.default_rng(3)
    halves, rows = halves_of(ADVERSARIAL[name](rng)[:5])
    restored = restored_by_libggml(kind, quantized(GGML, kind, rows, None), rows.shape)
    wide = rows.astype(np.float64)
    for lanes in widths():
        for given_rows in (rows, halves):
            found = packed_and_measured(NativeKernels(native_path(), lanes), kind, given_rows, None)[1]
            assert found is not None
            assert is_sum(found.squared_sum, (wide**2).sum())
            assert is_sum(found.squared_error, ((restored - wide) ** 2).sum())
            if np.isfinite(restored).all():
                assert found.max_error == np.abs(restored - rows).max()


def is_sum(got: float, exact: float) -> bool:
    """Whether a sum in float32 is what it should be; not finite where float32 can't hold it, or a scale is NaN or infinite."""
    if not np.isfinite(got):
        return not exact < 1e37
    return got == pytest.approx(exact, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_one_call_sees_every_weight_that_is_not_finite(kind: GgmlType) -> None:
    ordinary = np.full((5, 512), 3e38, np.float32)
    for lanes in widths():
        native = NativeKernels(native_path(), lanes)
        for given_rows in (ordinary, halves_of(ordinary)[0]):
            assert packed_and_measured(native, kind, given_rows, None)[1] is not None
        for at in (0, 1, 31, 255, 1300, ordinary.size - 1):
            for bad in (np.nan, -np.nan, np.inf, -np.inf):
                rows = ordinary.copy()
                rows.reshape(-1)[at] = bad
                for given_rows in (rows, halves_of(rows)[0]):
                    assert packed_and_measured(native, kind, given_rows, None)[1] is None


def test_bfloat16_rows_may_start_at_an_odd_byte() -> None:
    """A checkpoint's data starts wherever its header ends."""
    halves, rows = halves_of(np.random.default_rng(5).standard_normal((7, 512)))
    odd = np.empty(halves.nbytes + 1, np.uint8)
    odd[1:] = halves.reshape(-1).view(np.uint8)
    got, _ = packed_and_measured(
        NativeKernels(native_path()), GgmlType.Q4_K, odd[1:].view("<u2").reshape(halves.shape), None
    )
    assert np.array_equal(got, quantized(GGML, GgmlType.Q4_K, rows, None))


@pytest.mark.parametrize("kind", [*KINDS, GgmlType.Q4_0, GgmlType.BF16, GgmlType.F32], ids=lambda kind: kind.name)
def test_packing_gives_the_same_with_and_without_kernels(kind: GgmlType) -> None:
    halves, rows = halves_of(np.random.default_rng(6).standard_normal((9, 1280)))
    found = []
    for native in (NativeKernels(native_path()), None):
        quantizers = Quantizers(GGML, native)
        quantizers.prepare({kind})
        for given_rows in (rows, halves):
            out, scratch = np.zeros(len(rows) * row_bytes(kind, 1280), np.uint8), np.empty((2, rows.size), np.float32)
            found.append((out.tobytes(), quantizers.pack(kind, given_rows, out, None, scratch)))
            bad = given_rows.copy()
            bad[3, 77] = halves_of(np.full((1, 1), np.inf))[given_rows is rows].item()
            assert quantizers.pack(kind, bad, out, None, scratch) is None
    assert len({data for data, _ in found}) == 1
    assert all(sums.agrees_with(found[0][1]) for _, sums in found)


class Careless(NativeKernels):
    """Native kernels that get the last byte of Q4_K wrong where there is an imatrix."""

    def _quantize(
        self, kind: GgmlType, rows: Rows, out: Rows, imatrix: Rows | None, found: "ctypes.Array[ctypes.c_double] | None"
    ) -> int:
        outcome = super()._quantize(kind, rows, out, imatrix, found)
        if imatrix is not None and kind is GgmlType.Q4_K:
            out[len(rows) * row_bytes(kind, rows.shape[1]) - 1] ^= 1
        return outcome


class Flattering(NativeKernels):
    """Native kernels that report half of the largest error of Q4_K."""

    def pack(self, kind: GgmlType, rows: Rows, out: Rows, imatrix: Rows | None) -> ErrorSums | None:
        found = super().pack(kind, rows, out, imatrix)
        if found is None or kind is not GgmlType.Q4_K:
            return found
        return replace(found, max_error=found.max_error / 2)


@pytest.mark.parametrize("wrong", [Careless, Flattering])
def test_a_kernel_that_makes_another_byte_or_measures_otherwise_is_not_used(wrong: type[NativeKernels]) -> None:
    quantizers = Quantizers(GGML, wrong(native_path()))
    quantizers.prepare({GgmlType.Q4_K, GgmlType.Q4_0, GgmlType.Q8_0})
    assert quantizers.name(GgmlType.Q4_K) == quantizers.name(GgmlType.Q4_0) == "libggml"
    assert quantizers.name(GgmlType.Q8_0).startswith("native")
    assert quantizers.notes == ["the native Q4_K does otherwise than libggml here; libggml is used, which is slower"]
    rows, weights = trial_rows(), trial_weights()[1]
    got = quantized(quantizers, GgmlType.Q4_K, rows, weights)
    assert np.array_equal(got, quantized(GGML, GgmlType.Q4_K, rows, weights))


def test_a_sound_kernel_is_used_and_named() -> None:
    quantizers = Quantizers(GGML, NativeKernels(native_path()))
    quantizers.prepare(set(KINDS))
    assert quantizers.notes == []
    assert {quantizers.name(kind) for kind in KINDS} == {f"native, {widths()[-1]} lanes"}


@pytest.fixture
def fresh_load() -> Iterator[None]:
    """Lets a test choose the quantizers again."""
    load_quantizers.cache_clear()
    yield
    load_quantizers.cache_clear()


def test_without_a_built_library_libggml_quantizes_and_a_note_says_how_to_change_it(
    fresh_load: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in (tmp_path / "missing.so", tmp_path / "broken.so"):
        monkeypatch.setattr("convert_step35.quantization.quantizers.native_path", lambda path=path: path)
        load_quantizers.cache_clear()
        quantizers = load_quantizers()
        quantizers.prepare({GgmlType.Q4_K})
        assert quantizers.name(GgmlType.Q4_K) == "libggml"
        assert [
            f"no native quantizers: {path}; install step35 again with a C++ compiler" in n for n in quantizers.notes
        ] == [True]
        (tmp_path / "broken.so").write_bytes(b"no library")


def test_the_environment_can_ask_for_libggml(fresh_load: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "libggml")
    quantizers = load_quantizers()
    quantizers.prepare({GgmlType.Q4_K})
    assert quantizers.name(GgmlType.Q4_K) == "libggml" and SWITCH in quantizers.notes[0]


def test_the_environment_can_ask_for_nothing_else(fresh_load: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "ggml")
    with pytest.raises(OptionError, match=f"{SWITCH} expected native or libggml, got 'ggml'"):
        load_quantizers()


@pytest.mark.slow
def test_report_and_summary_say_what_quantized(tmp_path: Path) -> None:
    """And the file is the same, whatever did."""
    checkpoint = write_checkpoint(tmp_path / "small", replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=0))
    said, digests = set(), set()
    for wish in ("native", "libggml"):
        out = tmp_path / f"{wish}.gguf"
        command = [sys.executable, "-m", "convert_step35", "run", str(checkpoint), str(out), "--type", "Q4_K"]
        done = subprocess.run(command, env=os.environ | {SWITCH: wish}, capture_output=True, text=True, check=True)
        report = json.loads(report_path(out).read_text())
        assert report["quantizers"]["F32"] == "libggml" and report["quantizers"]["Q4_K"].startswith(wish)
        assert (f"{SWITCH}=libggml" in done.stderr) == (wish == "libggml")
        assert f"Q4_K  {wish} " in done.stdout
        said.add(report["quantizers"]["Q4_K"])
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(said) == 2 and len(digests) == 1
