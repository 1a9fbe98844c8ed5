"""What encode_header writes, gguf-py and our own reader read back, value for value."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderField
from gguf import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_step35.gguf.ggml_types import QUANTIZABLE
from convert_step35.gguf.header import ALIGNMENT, Entry, TensorInfo, encode_header, padded
from convert_step35.gguf.reader import read_gguf

INTEGERS = {
    V.UINT8: (0, 8),
    V.INT8: (1, 7),
    V.UINT16: (0, 16),
    V.INT16: (1, 15),
    V.UINT32: (0, 32),
    V.INT32: (1, 31),
    V.UINT64: (0, 64),
    V.INT64: (1, 63),
}
NAMES = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=["L", "N", "P", "S"]), min_size=1, max_size=20
)


def values(kind: V) -> st.SearchStrategy[Any]:
    """Every value that a type can hold."""
    match kind:
        case V.STRING:
            return st.text(st.characters(codec="utf-8"), max_size=12)
        case V.BOOL:
            return st.booleans()
        case V.FLOAT32 | V.FLOAT64:
            return st.floats(width=32 if kind is V.FLOAT32 else 64)
        case _:
            signed, bits = INTEGERS[kind]
            return st.integers(-(2**bits) if signed else 0, 2**bits - 1)


def entry(key: str) -> st.SearchStrategy[Entry]:
    kinds = st.sampled_from([V.STRING, V.BOOL, V.FLOAT32, V.FLOAT64, *INTEGERS])
    return kinds.flatmap(
        lambda kind: st.one_of(values(kind), st.lists(values(kind), max_size=4).map(tuple)).map(
            lambda value: Entry(key, kind, value)
        )
    )


def entries() -> st.SearchStrategy[list[Entry]]:
    # general.alignment moves the data, so it is no ordinary key.
    keys = st.lists(NAMES.filter(lambda name: name != "general.alignment"), max_size=5, unique=True)
    return keys.flatmap(lambda names: st.tuples(*(entry(name) for name in names))).map(list)


@st.composite
def tensors(draw: st.DrawFn) -> list[TensorInfo]:
    """Tensors of up to three dimensions, one after the other, every row whole blocks."""
    infos, offset = [], 0
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        kind = draw(st.sampled_from(QUANTIZABLE))
        n_per_block, block_bytes = GGML_QUANT_SIZES[kind]
        outer = draw(st.lists(st.integers(1, 3), max_size=2))
        n_blocks = draw(st.integers(1, 3))
        infos.append(TensorInfo(name, kind, (*outer, n_blocks * n_per_block), offset))
        offset += padded(math.prod(outer) * n_blocks * block_bytes)
    return infos


def data_bytes(infos: list[TensorInfo]) -> int:
    return padded(infos[-1].offset + n_bytes(infos[-1])) if infos else 0


def n_bytes(info: TensorInfo) -> int:
    n_per_block, block_bytes = GGML_QUANT_SIZES[info.ggml_type]
    return math.prod(info.shape) // n_per_block * block_bytes


def same(got: Any, want: Any) -> bool:
    if isinstance(want, tuple):
        return len(got) == len(want) and all(same(a, b) for a, b in zip(got, want, strict=True))
    return got == want or (isinstance(want, float) and math.isnan(want) and math.isnan(got))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "header.gguf"


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(entries(), tensors())
def test_our_reader_reads_back_what_was_encoded(path: Path, keys: list[Entry], infos: list[TensorInfo]) -> None:
    header = encode_header(keys, infos)
    path.unlink(missing_ok=True)
    path.write_bytes(header + bytes(data_bytes(infos)))
    file = read_gguf(path)
    assert file.metadata.keys() == {key.key for key in keys}
    for key in keys:
        assert same(file.metadata[key.key], key.value)
        assert file.value_types[key.key] == ((V.ARRAY, key.value_type) if key.is_array else (key.value_type, None))
    assert len(header) % ALIGNMENT == 0 and (not infos or file.data_offset == len(header))
    assert [(t.name, t.ggml_type, t.shape, t.offset - len(header), t.n_bytes) for t in file.tensors.values()] == [
        (info.name, info.ggml_type, info.shape, info.offset, n_bytes(info)) for info in infos
    ]


def field_of(reader: GGUFReader, key: str) -> ReaderField:
    field = reader.get_field(key)
    assert field is not None, f"gguf-py found no {key}"
    return field


@settings(max_examples=100, deadline=None)
@given(entries(), tensors())
def test_gguf_py_reads_back_what_was_encoded(path: Path, keys: list[Entry], infos: list[TensorInfo]) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(encode_header(keys, infos) + bytes(data_bytes(infos)))
    reader = GGUFReader(path)
    counts = [field_of(reader, f"GGUF.{name}").contents() for name in ("version", "tensor_count", "kv_count")]
    assert counts == [3, len(infos), len(keys)]
    for key in keys:
        field = field_of(reader, key.key)
        # gguf-py forgets the type of an empty array's items.
        assert (
            field.types == ([V.ARRAY, key.value_type] if key.value else [V.ARRAY]) if key.is_array else [key.value_type]
        )
        assert same(field.contents() if key.value != () else (), key.value)
    assert [(t.name, t.tensor_type, tuple(reversed(t.shape.tolist())), t.n_bytes) for t in reader.tensors] == [
        (info.name, info.ggml_type, info.shape, n_bytes(info)) for info in infos
    ]


def test_a_header_is_the_format_byte_for_byte() -> None:
    """One key and one tensor, spelled out from ggml's docs/gguf.md."""
    want = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    want += struct.pack("<Q", 3) + b"a.b" + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 7, 8)
    want += struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 64, 3, 8, 0)
    got = encode_header([Entry("a.b", V.UINT32, (7, 8))], [TensorInfo("t", GGMLQuantizationType.Q8_0, (3, 64), 0)])
    assert got == want.ljust(128, b"\0")


def test_padding_goes_to_the_next_multiple_of_the_alignment() -> None:
    assert [padded(n) for n in (0, 1, 31, 32, 33)] == [0, 32, 32, 32, 64]
