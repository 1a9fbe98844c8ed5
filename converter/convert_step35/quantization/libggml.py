"""ggml's own quantizers, called in the libggml-base of the installed llama-cpp-python."""

import ctypes
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from convert_step35.errors import ConvertError
from convert_step35.gguf.ggml_types import block_size, row_bytes

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")


class _TypeTraits(ctypes.Structure):
    """ggml.h, struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which libggml made the bytes; a resumed conversion must find the same one."""

    llama_cpp_python: str
    library_sha256: str


class Ggml:
    """The plain C functions of one libggml-base. Every call releases the GIL."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._declare("ggml_quantize_init", None, ctypes.c_int)
        self._declare("ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int)
        pointers = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        self._declare("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, *pointers)
        self._declare("ggml_validate_row_data", ctypes.c_bool, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        self._declare("ggml_bf16_to_fp32_row", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._declare("ggml_fp16_to_fp32_row", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._declare("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int)
        self._to_float: dict[GgmlType, Callable[[int, int, int], None]] = {}

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self._lib, name, None)
        if function is None:
            raise ConvertError(f"{self.path} has no {name}; install llama-cpp-python==0.3.36 again")
        function.restype, function.argtypes = result, list(arguments)

    def prepare(self, kinds: set[GgmlType]) -> None:
        """Build the tables of the IQ types (seconds, under a global lock) before threads need them."""
        for kind in sorted(kinds):
            self._lib.ggml_quantize_init(int(kind))
            self._bind_dequantizer(kind)

    def requires_imatrix(self, kind: GgmlType) -> bool:
        return self._lib.ggml_quantize_requires_imatrix(int(kind))

    def quantize(self, kind: GgmlType, rows: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> int:
        """Quantize float32 `rows` [n, row_size] into uint8 `out`; `imatrix` is float32 [row_size]. Returns bytes.

        ggml aborts the process on bad arguments, so they are checked here.
        """
        n_rows, row_size = rows.shape
        n_bytes = n_rows * row_bytes(kind, row_size)
        assert rows.dtype == np.float32 and rows.flags.c_contiguous and out.nbytes >= n_bytes
        assert row_size % block_size(kind) == 0 and (imatrix is not None or not self.requires_imatrix(kind))
        weights = None
        if imatrix is not None:
            assert imatrix.dtype == np.float32 and imatrix.shape == (row_size,) and imatrix.flags.c_contiguous
            weights = imatrix.ctypes.data
        return self._lib.ggml_quantize_chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, n_rows, row_size, weights)

    def is_valid(self, kind: GgmlType, data: np.ndarray) -> bool:
        """False where a scale of the quantized uint8 `data` is NaN or infinite."""
        return self._lib.ggml_validate_row_data(int(kind), data.ctypes.data, data.nbytes)

    def bf16_to_f32(self, data: np.ndarray, out: np.ndarray) -> None:
        self._lib.ggml_bf16_to_fp32_row(data.ctypes.data, out.ctypes.data, out.size)

    def f16_to_f32(self, data: np.ndarray, out: np.ndarray) -> None:
        self._lib.ggml_fp16_to_fp32_row(data.ctypes.data, out.ctypes.data, out.size)

    def dequantize(self, kind: GgmlType, data: np.ndarray, out: np.ndarray) -> None:
        """Dequantize uint8 `data` into float32 `out`, whose size says how many weights."""
        if kind is GgmlType.F32:
            out.reshape(-1).view(np.uint8)[:] = data[: out.nbytes]
        elif kind is GgmlType.BF16:
            self.bf16_to_f32(data, out)
        elif kind is GgmlType.F16:
            self.f16_to_f32(data, out)
        else:
            self._to_float[kind](data.ctypes.data, out.ctypes.data, out.size)

    def _bind_dequantizer(self, kind: GgmlType) -> None:
        """Look up what dequantizes a type; float types have nothing."""
        traits = self._lib.ggml_get_type_traits(int(kind)).contents
        expected = gguf.GGML_QUANT_SIZES[kind]
        if (got := (traits.blck_size, traits.type_size)) != expected:
            raise ConvertError(
                f"{self.path}: blocks of {kind.name} expected {expected} (weights, bytes), got {got}; "
                "install llama-cpp-python==0.3.36"
            )
        if traits.to_float:
            self._to_float[kind] = _ToFloat(traits.to_float)


@lru_cache(maxsize=1)
def load_ggml() -> Ggml:
    """The libggml-base inside the installed llama_cpp package, without importing that package."""
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ConvertError(
            "llama-cpp-python is not installed; its libggml holds the quantizers: pip install llama-cpp-python==0.3.36"
        )
    path = Path(spec.submodule_search_locations[0]) / "lib" / _LIBRARY
    if not path.is_file():
        raise ConvertError(f"libggml is missing: expected {path}; install llama-cpp-python==0.3.36 again")
    return Ggml(path)


def identify(ggml: Ggml) -> Identity:
    """Name the library by its package version and its own bytes."""
    try:
        package = version("llama-cpp-python")
    except PackageNotFoundError:
        package = "unknown"
    return Identity(package, hashlib.sha256(ggml.path.read_bytes()).hexdigest())
