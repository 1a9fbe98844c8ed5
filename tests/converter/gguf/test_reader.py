"""A GGUF header is read as llama.cpp and the gguf package read it, and no bytes of it are believed unchecked."""

import ctypes
import importlib.util
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_step35.errors import GgufError
from convert_step35.gguf.reader import MAX_ARRAY_ELEMENTS, MAX_KEYS, MAX_TENSORS, GgufFile, GgufTensor, read_gguf
from limited_reader import LimitedReader, Outcome, assert_clean, flips

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = GGUFValueType
STORED_TYPES = sorted(GGML_QUANT_SIZES.keys() - {GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K})
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", U64: "Q", I64: "q", F32: "f", F64: "d", BOOL: "?"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(value_type: GGUFValueType, value: Any) -> bytes:
    return text(value) if value_type == STRING else struct.pack("<" + FORMATS[value_type], value)


def key(name: str | bytes, value_type: int, value: bytes) -> bytes:
    """One metadata entry of raw value bytes."""
    return text(name) + struct.pack("<I", value_type) + value


def array(element_type: int, length: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", element_type, length) + elements


def tensor(name: str | bytes = "t", ne: tuple[int, ...] = (8,), ggml_type: int = 0, offset: int = 0) -> bytes:
    """One tensor entry; `ne` is innermost first, as the file has it."""
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, ggml_type, offset)


def packed(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file of metadata entries, tensor entries and the data after them."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data if tensors else header


VALID = packed(
    [
        key("general.architecture", STRING, text("step35")),
        key("general.alignment", U32, scalar(U32, 64)),
        key("step35.window", ARRAY, array(BOOL, 3, b"\1\0\1")),
        key("step35.heads", ARRAY, array(I32, 2, struct.pack("<2i", 64, -96))),
        key("tokenizer.tokens", ARRAY, array(STRING, 3, text("<s>") + text("") + text("é"))),
        key("step35.scale", F32, scalar(F32, 1.5)),
    ],
    [tensor("blk.0.w", (256, 2), GGMLQuantizationType.Q4_K, 0), tensor("blk.0.b", (3,), 0, 320)],
    bytes(320 + 12),
    alignment=64,
)
VALID_HEADER_BYTES = len(VALID) - 332


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedReader]:
    with LimitedReader(
        "convert_step35.gguf.reader:read_gguf", tmp_path_factory.mktemp("gguf") / "hostile.gguf"
    ) as reader:
        yield reader


class InitParams(ctypes.Structure):
    """gguf.h: struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """libggml as the installed llama.cpp has it."""
    package = importlib.util.find_spec("llama_cpp")
    assert package and package.origin
    return ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libggml-base.so"))


@pytest.fixture(scope="module")
def llama_cpp_accepts(library: ctypes.CDLL) -> Callable[[Path], bool]:
    """Whether the GGUF parser of the installed llama.cpp accepts a file."""
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    library.gguf_free.argtypes = [ctypes.c_void_p]

    def accepts(path: Path) -> bool:
        context = library.gguf_init_from_file(os.fsencode(path), InitParams(no_alloc=True, ctx=None))
        library.gguf_free(context)
        return context is not None

    return accepts


def same(ours: Any, theirs: Any) -> bool:
    """Equality in which NaN equals itself."""
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs or (ours != ours and theirs != theirs)


def assert_read_alike(file: GgufFile, path: Path) -> None:
    """The gguf package reads the same from the file."""
    theirs = gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys() == file.value_types.keys()
    for name, field in fields.items():
        assert same(file.metadata[name], field.contents()), name
        assert [kind for kind in file.value_types[name] if kind is not None][: len(field.types)] == field.types
    assert [(t.name, t.ggml_type, list(reversed(t.shape)), t.offset, t.n_bytes) for t in file.tensors.values()] == [
        (t.name, t.tensor_type, t.shape.tolist(), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(VALID)
    start = VALID_HEADER_BYTES
    assert read_gguf(path) == GgufFile(
        path=path,
        version=3,
        alignment=64,
        metadata={
            "general.architecture": "step35",
            "general.alignment": 64,
            "step35.window": [True, False, True],
            "step35.heads": [64, -96],
            "tokenizer.tokens": ["<s>", "", "é"],
            "step35.scale": 1.5,
        },
        value_types={
            "general.architecture": (STRING, None),
            "general.alignment": (U32, None),
            "step35.window": (ARRAY, BOOL),
            "step35.heads": (ARRAY, I32),
            "tokenizer.tokens": (ARRAY, STRING),
            "step35.scale": (F32, None),
        },
        tensors={
            "blk.0.w": GgufTensor("blk.0.w", GGMLQuantizationType.Q4_K, (2, 256), start, 288),
            "blk.0.b": GgufTensor("blk.0.b", GGMLQuantizationType.F32, (3,), start + 320, 12),
        },
        data_offset=start,
        n_bytes=len(VALID),
    )


def test_version_2_is_read_and_no_tensors_need_no_padding(
    tmp_path: Path, llama_cpp_accepts: Callable[[Path], bool]
) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(packed([key("a", U8, b"\7")], version=2))
    file = read_gguf(path)
    assert (file.version, file.metadata, file.tensors, file.data_offset) == (
        2,
        {"a": 7},
        {},
        len(packed([key("a", U8, b"\7")])),
    )
    assert llama_cpp_accepts(path)


def test_what_the_gguf_package_writes_is_read_alike(tmp_path: Path, llama_cpp_accepts: Callable[[Path], bool]) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "step35", endianess=gguf.GGUFEndian.LITTLE)
    writer.add_token_list(["<s>", "é", "\n"])
    writer.add_array("step35.attention.sliding_window_pattern", [True, False])
    writer.add_float64("step35.f64", math.pi)
    writer.add_tensor("a", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.add_tensor("b", np.zeros((2, 3, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    file = read_gguf(path)
    assert_read_alike(file, path)
    assert file.tensors["b"].shape == (2, 3, 32)
    assert llama_cpp_accepts(path)


ELEMENTS: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    U8: st.integers(0, 2**8 - 1), I8: st.integers(-(2**7), 2**7 - 1),
    U16: st.integers(0, 2**16 - 1), I16: st.integers(-(2**15), 2**15 - 1),
    U32: st.integers(0, 2**32 - 1), I32: st.integers(-(2**31), 2**31 - 1),
    U64: st.integers(0, 2**64 - 1), I64: st.integers(-(2**63), 2**63 - 1),
    F32: st.floats(width=32), F64: st.floats(), BOOL: st.booleans(), STRING: st.text(max_size=5),
}  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@st.composite
def keys(draw: st.DrawFn, name: str) -> bytes:
    element_type = draw(st.sampled_from(sorted(ELEMENTS)))
    if draw(st.booleans()):
        return key(name, element_type, scalar(element_type, draw(ELEMENTS[element_type])))
    values = draw(st.lists(ELEMENTS[element_type], max_size=4))
    return key(name, ARRAY, array(element_type, len(values), b"".join(scalar(element_type, v) for v in values)))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Valid GGUF files of every value type and every ggml type."""
    alignment = draw(st.sampled_from([8, 32, 64]))
    metadata = [draw(keys(name)) for name in draw(st.lists(NAMES, unique=True, max_size=4))]
    metadata.append(key("general.alignment", U32, scalar(U32, alignment)))
    tensors, offset = [], 0
    for name in draw(st.lists(NAMES, unique=True, max_size=3)):
        ggml_type = draw(st.sampled_from(STORED_TYPES))
        block_values, block_bytes = GGML_QUANT_SIZES[ggml_type]
        blocks, *rest = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        tensors.append(tensor(name, (blocks * block_values, *rest), ggml_type, offset))
        offset += -(-blocks * math.prod(rest) * block_bytes // alignment) * alignment
    return packed(metadata, tensors, bytes(offset), alignment=alignment)


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(files())
def test_a_valid_file_is_read_as_others_read_it(
    tmp_path: Path, llama_cpp_accepts: Callable[[Path], bool], data: bytes
) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(data)
    assert_read_alike(read_gguf(path), path)
    assert llama_cpp_accepts(path)


def test_every_ggml_type_has_the_size_that_libggml_gives_it(tmp_path: Path, library: ctypes.CDLL) -> None:
    """The gguf package has 40 bytes for a block of Q8_1, libggml 36; no file holds that type, and it is refused."""
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    path = tmp_path / "type.gguf"
    for ggml_type in STORED_TYPES:
        path.write_bytes(packed([], [tensor(ne=(512, 3), ggml_type=ggml_type)], bytes(12_288)))
        assert read_gguf(path).tensors["t"].n_bytes == 3 * library.ggml_row_size(ggml_type, 512), ggml_type


def test_data_is_never_read(tmp_path: Path) -> None:
    """A tensor of 4 TiB, all of it a hole, is described in no time."""
    path = tmp_path / "sparse.gguf"
    header = packed([], [tensor(ne=(2**20, 2**20))])
    path.write_bytes(header)
    os.truncate(path, len(header) + 2**42)
    assert read_gguf(path).tensors["t"].n_bytes == 2**42


def test_a_real_vocabulary_is_read_at_once(tmp_path: Path) -> None:
    n_tokens = 128_896
    tokens = b"".join(text(f"token{i}") for i in range(n_tokens))
    merges = b"".join(text(f"a{i} b{i}") for i in range(n_tokens))
    scores = array(F32, n_tokens, np.ones(n_tokens, "<f4").tobytes())
    path = tmp_path / "vocabulary.gguf"
    lists = [
        key("tokens", ARRAY, array(STRING, n_tokens, tokens)),
        key("merges", ARRAY, array(STRING, n_tokens, merges)),
    ]
    path.write_bytes(packed([*lists, key("scores", ARRAY, scores)]))
    start = time.process_time()
    assert read_gguf(path).metadata["merges"][-1] == "a128895 b128895"
    assert time.process_time() - start < 2  # 0.2 s on an idle core


ONE = bytes(32)
RULES = [
    pytest.param(b"", "expected to start with b'GGUF', got b''", id="empty file"),
    pytest.param(b"GG", "got b'GG'", id="half a magic"),
    pytest.param(b"ggml" + bytes(20), "expected to start with b'GGUF', got b'ggml'", id="another format"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="Git LFS pointer"),
    pytest.param(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF file", id="big endian"),
    pytest.param(packed(version=0), "unknown GGUF version: ", id="version 0"),
    pytest.param(packed(version=1), "expected 2 or 3, got 1", id="version 1"),
    pytest.param(packed(version=4), "expected 2 or 3, got 4", id="version 4"),
    pytest.param(b"GGUF\3\0\0\0" + struct.pack("<QQ", 2**63, 0), "at most 100000 tensors", id="tensor count bomb"),
    pytest.param(
        b"GGUF\3\0\0\0" + struct.pack("<QQ", 0, 2**64 - 1), "at most 65536 metadata keys", id="key count bomb"
    ),
    pytest.param(b"GGUF\3\0\0\0" + struct.pack("<QQ", 0, 1000), "download is incomplete", id="keys past the end"),
    pytest.param(b"GGUF\3\0\0\0" + struct.pack("<QQ", 1000, 0), "download is incomplete", id="tensors past the end"),
    pytest.param(packed([key("", U8, b"\1")]), "printable bytes, got ''", id="empty key"),
    pytest.param(packed([key("k" * 65_536, U8, b"\1")]), "1 to 65535 printable bytes", id="long key"),
    pytest.param(packed([key("a\n", U8, b"\1")]), r"got 'a\n'", id="key with control characters"),
    pytest.param(packed([key(b"\xff", U8, b"\1")]), "a metadata key in UTF-8", id="key not UTF-8"),
    pytest.param(packed([struct.pack("<Q", 2**64 - 1)]), "expected 18446744073709551615 bytes", id="key length bomb"),
    pytest.param(packed([key("a", U8, b"\1")] * 2), "each metadata key once, got 'a' twice", id="duplicate key"),
    pytest.param(packed([key("a", 13, b"\1")]), "known type for the value of 'a', got type 13", id="unknown type"),
    pytest.param(packed([key("a", ARRAY, array(99, 1))]), "got type 99", id="unknown element type"),
    pytest.param(packed([key("a", ARRAY, array(ARRAY, 1) * 5)]), "got an array of arrays", id="nested array"),
    pytest.param(packed([key("a", ARRAY, array(ARRAY, 1) * 99_999)]), "array of arrays", id="deeply nested array"),
    pytest.param(packed([key("a", STRING, struct.pack("<Q", 2**40))]), "got 0: the download", id="string length bomb"),
    pytest.param(packed([key("a", STRING, text(b"\xc3"))]), "'a' in UTF-8, got byte 0xc3", id="string not UTF-8"),
    pytest.param(packed([key("a", ARRAY, array(U8, 2**64 - 1))]), "at most 4000000 array elem", id="array length bomb"),
    pytest.param(packed([key("a", ARRAY, array(F64, 2**61))]), "array elements in all", id="array size that wraps"),
    pytest.param(packed([key("a", ARRAY, array(F64, 1000))]), "expected 8000 bytes", id="array past the end"),
    pytest.param(
        packed([key("a", ARRAY, array(STRING, 1000))]), "the download is incomplete", id="strings past the end"
    ),
    pytest.param(packed([key("a", BOOL, b"\2")]), "value of 'a' to be 0 or 1, got 2", id="bool of 2"),
    pytest.param(packed([key("a", ARRAY, array(BOOL, 2, b"\1\xff"))]), "0 or 1, got 255", id="bool of 255"),
    pytest.param(
        packed([key("general.alignment", U64, bytes(8))]), "UINT32, got UINT64", id="alignment of another type"
    ),
    pytest.param(
        packed([key("general.alignment", ARRAY, array(U32, 1, b"\x20\0\0\0"))]), "got ARRAY", id="array as alignment"
    ),
    pytest.param(packed([key("general.alignment", U32, scalar(U32, 0))]), "got 0", id="alignment 0"),
    pytest.param(packed([key("general.alignment", U32, scalar(U32, 4))]), "at least 8, got 4", id="alignment 4"),
    pytest.param(packed([key("general.alignment", U32, scalar(U32, 48))]), "power of two", id="alignment 48"),
    pytest.param(
        packed([key("general.alignment", U32, scalar(U32, 2**31))], [tensor()], ONE),
        "missing",
        id="alignment past the end",
    ),
    pytest.param(packed([], [tensor("")], ONE), "1 to 63 printable bytes, got ''", id="empty tensor name"),
    pytest.param(packed([], [tensor("t" * 64)], ONE), "1 to 63 printable bytes", id="long tensor name"),
    pytest.param(packed([], [tensor("é" * 32)], ONE), "1 to 63 printable bytes", id="tensor name of 64 bytes"),
    pytest.param(packed([], [tensor("a\0b")], ONE), r"got 'a\x00b'", id="tensor name with a zero"),
    pytest.param(packed([], [tensor(b"\x80")], ONE), "a tensor name in UTF-8", id="tensor name not UTF-8"),
    pytest.param(
        packed([], [tensor(), tensor(offset=32)], ONE * 2), "each tensor once, got 't'", id="duplicate tensor"
    ),
    pytest.param(packed([], [tensor(ne=(1,) * 5)], ONE), "at most 4 dimensions for 't', got 5", id="five dimensions"),
    pytest.param(packed([], [text("t") + b"\xff" * 4], ONE), "got 4294967295", id="dimension count bomb"),
    pytest.param(packed([], [tensor(ne=(8, 0))], ONE), "1 to 2^63 - 1 bytes for 't', got F32 (0, 8)", id="no elements"),
    pytest.param(packed([], [tensor(ne=(2**63, 2))], ONE), "2^63 - 1", id="size that wraps to zero"),
    pytest.param(packed([], [tensor(ne=(2**63, 0))], ONE), "2^63 - 1", id="negative dimension of nothing"),
    pytest.param(packed([], [tensor(ne=(2**64 - 1,) * 4)], ONE), "2^63 - 1", id="size far over 64 bits"),
    pytest.param(packed([], [tensor(ne=(2**32, 2**29))], ONE), "2^63 - 1", id="bytes of 2^63"),
    pytest.param(packed([], [tensor(ne=(255,), ggml_type=12)], ONE * 9), "whole blocks of 256", id="part of a block"),
    pytest.param(packed([], [tensor(ne=(8, 32), ggml_type=12)], ONE * 9), "whole blocks", id="blocks over two rows"),
    pytest.param(packed([], [tensor(ne=(), ggml_type=8)], ONE), "whole blocks of 32", id="block of one number"),
    pytest.param(packed([], [tensor(ggml_type=4)], ONE), "known ggml type for 't', got type 4", id="removed ggml type"),
    pytest.param(packed([], [tensor(ne=(64,), ggml_type=9)], ONE * 9), "got type 9", id="ggml type of activations"),
    pytest.param(packed([], [tensor(ggml_type=2**32 - 1)], ONE), "got type 4294967295", id="unknown ggml type"),
    pytest.param(packed([], [tensor(offset=1)], ONE * 2), "not a multiple of 32", id="offset not aligned"),
    pytest.param(packed([], [tensor(offset=32)], ONE * 2), "which leaves a gap", id="gap at the start"),
    pytest.param(packed([], [tensor(), tensor("u", offset=64)], ONE * 3), "which leaves a gap", id="gap"),
    pytest.param(packed([], [tensor(), tensor("u")], ONE), "overlaps the tensor before", id="same range twice"),
    pytest.param(packed([], [tensor(ne=(16,)), tensor("u", offset=32)], ONE * 3), "overlaps", id="overlap"),
    pytest.param(packed([], [tensor(offset=2**64 - 32)], ONE), "leaves a gap", id="offset that wraps"),
    pytest.param(packed([], [tensor()], ONE[:-1]), "the download is incomplete, 1 bytes missing", id="short data"),
    pytest.param(packed([], [tensor(ne=(2**40,))], ONE), f"{2**42 - 32} bytes missing", id="data far past the end"),
    pytest.param(packed([], [tensor()])[:-1], "33 bytes missing", id="cut in the padding"),
]


@pytest.mark.parametrize(("data", "problem"), RULES)
def test_is_refused(reader: LimitedReader, data: bytes, problem: str) -> None:
    outcome = reader.read(data)
    assert_clean(outcome, "GgufError")
    assert problem in outcome.message and str(reader.path) in outcome.message


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(
            lambda: packed([key("a", ARRAY, array(U16, MAX_ARRAY_ELEMENTS, bytes(range(256)) * 31_250)), b"x"]),
            id="small numbers",
        ),
        pytest.param(
            lambda: packed([key("a", ARRAY, array(STRING, MAX_ARRAY_ELEMENTS, text("€") * 3_999_999))]),
            id="short strings, one too few",
        ),
        pytest.param(
            lambda: packed([key(f"{i}", ARRAY, array(U8, 1000, bytes(1000))) for i in range(5000)]), id="many arrays"
        ),
        pytest.param(lambda: packed([key("a", STRING, text("😀" + "a" * 60_000_000)), b"x"]), id="wide string"),
        pytest.param(lambda: packed([key(f"{i}", U8, b"\1") for i in range(MAX_KEYS)] + [b"x"]), id="many keys"),
        pytest.param(
            lambda: packed([], [tensor(f"{i}", offset=32 * i) for i in range(MAX_TENSORS)]), id="many tensors"
        ),
    ],
)
def test_a_bomb_is_refused_within_the_limits(reader: LimitedReader, bomb: Callable[[], bytes]) -> None:
    outcome = reader.read(bomb())
    assert_clean(outcome, "GgufError")
    assert outcome.error


def test_a_header_of_endless_text_is_not_read(reader: LimitedReader) -> None:
    """A sparse file costs its sender nothing, so its size is no excuse for reading it all."""
    reader.path.write_bytes(packed([key("a", STRING, struct.pack("<Q", 2**40))]))
    os.truncate(reader.path, 2**41)
    outcome = reader.read_again()
    assert_clean(outcome, "GgufError")
    assert "expected a header of at most 268435456 bytes" in outcome.message


def test_a_file_cut_anywhere_is_refused(reader: LimitedReader) -> None:
    for n_bytes in [*range(VALID_HEADER_BYTES + 10), *range(len(VALID) - 20, len(VALID))]:
        outcome = reader.read(VALID[:n_bytes])
        assert_clean(outcome, "GgufError")
        assert outcome.error, f"accepted {n_bytes} of {len(VALID)} bytes"


def assert_sound(outcome: Outcome, path: Path, llama_cpp_accepts: Callable[[Path], bool]) -> None:
    """A clean error, or a file that the gguf package reads alike and llama.cpp accepts."""
    assert_clean(outcome, "GgufError")
    if outcome.error is None:
        assert_read_alike(outcome.value, path)
        assert llama_cpp_accepts(path)


@pytest.mark.slow
def test_any_flipped_bit_is_refused_or_read_as_others_read_it(
    reader: LimitedReader, llama_cpp_accepts: Callable[[Path], bool]
) -> None:
    for data in flips(VALID, VALID_HEADER_BYTES):
        assert_sound(reader.read(data), reader.path, llama_cpp_accepts)


INTERESTING = st.sampled_from(
    [0, 1, 2, 4, 5, 8, 9, 13, 31, 32, 64, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A valid file with a few 32- or 64-bit numbers overwritten and perhaps a piece replaced, dropped or repeated."""
    data = bytearray(draw(st.just(VALID) | files()))
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.sampled_from([1, 4, 8]))
        begin = draw(st.integers(0, len(data) - size))
        data[begin : begin + size] = (draw(INTERESTING) % 256**size).to_bytes(size, "little")
    if draw(st.booleans()):
        begin, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        data[begin:end] = draw(st.binary(max_size=16) | st.just(bytes(data[begin:end]) * 2))
    return bytes(data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_files())
def test_any_mutation_is_refused_or_read_as_others_read_it(
    reader: LimitedReader, llama_cpp_accepts: Callable[[Path], bool], data: bytes
) -> None:
    assert_sound(reader.read(data), reader.path, llama_cpp_accepts)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Opening a pipe without a writer would block for ever."""
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path, Path("/dev/zero")):
        with pytest.raises(GgufError, match="expected a regular file"):
            read_gguf(path)
    with pytest.raises(GgufError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")
