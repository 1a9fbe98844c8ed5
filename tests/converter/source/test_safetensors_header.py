"""A safetensors file, its index and its links are believed only as far as they can be checked."""

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_step35.errors import CheckpointError
from convert_step35.source.safetensors_header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    StoredTensor,
    read_header,
    read_index,
    resolve_shard,
)
from limited_reader import LimitedReader, Outcome, assert_clean, flips


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of a header, given as an object or as raw bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


VALID = packed(
    {
        "__metadata__": {"format": "pt"},
        "b.weight": entry("BF16", [2, 3], [8, 20]),
        "a.weight": entry("F32", [2], [0, 8]),
        "scalar": entry("F8_E4M3", [], [20, 21]),
    },
    bytes(range(21)),
)
VALID_HEADER_BYTES = len(VALID) - 21


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedReader]:
    path = tmp_path_factory.mktemp("shard") / "hostile.safetensors"
    with LimitedReader("convert_step35.source.safetensors_header:read_header", path) as reader:
        yield reader


@pytest.fixture(scope="module")
def index_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedReader]:
    path = tmp_path_factory.mktemp("index") / "model.safetensors.index.json"
    with LimitedReader("convert_step35.source.safetensors_header:read_index", path) as reader:
        yield reader


def contents(tensors: tuple[StoredTensor, ...], data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {t.name: (t.dtype, list(t.shape), data[t.offset : t.offset + t.n_bytes]) for t in tensors}


def library_contents(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """The same by the safetensors library; None where it refuses."""
    try:
        return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def assert_sound(outcome: Outcome, data: bytes) -> None:
    """A clean error, or tensors that the safetensors library finds too."""
    assert_clean(outcome, "CheckpointError")
    if outcome.error is None:
        assert contents(outcome.value, data) == library_contents(data)


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    start = VALID_HEADER_BYTES
    assert read_header(path) == (
        StoredTensor("a.weight", "F32", (2,), path, start, 8),
        StoredTensor("b.weight", "BF16", (2, 3), path, start + 8, 12),
        StoredTensor("scalar", "F8_E4M3", (), path, start + 20, 1),
    )


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([np.float32, np.float16, np.int8, np.uint64, np.bool_]),
            st.lists(st.integers(1, 4), max_size=4),
        ),
        max_size=5,
    ).filter(lambda tensors: "__metadata__" not in tensors)
)
def test_what_the_library_writes_is_read_alike(tmp_path_factory: pytest.TempPathFactory, tensors: dict) -> None:
    arrays = {name: np.ones(shape, dtype) for name, (dtype, shape) in tensors.items()}
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    data = path.read_bytes()
    assert contents(read_header(path), data) == library_contents(data)


def test_every_dtype_of_the_library_has_its_size(tmp_path: Path) -> None:
    path = tmp_path / "dtypes.safetensors"
    for dtype, n_bits in DTYPE_BITS.items():
        data = packed({"x": entry(dtype, [8], [0, n_bits])}, bytes(n_bits))
        path.write_bytes(data)
        theirs = library_contents(data)
        assert theirs and contents(read_header(path), data) == theirs


def test_a_header_may_be_padded_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "padded.safetensors"
    path.write_bytes(packed(b"{}" + b" " * 6))
    assert read_header(path) == ()


def test_data_is_never_read(tmp_path: Path) -> None:
    """A shard of 4 TiB, all of it a hole, is described in no time."""
    path = tmp_path / "sparse.safetensors"
    header = packed({"x": entry("F32", [2**20, 2**20], [0, 2**42])})
    path.write_bytes(header)
    os.truncate(path, len(header) + 2**42)
    assert read_header(path)[0].n_bytes == 2**42


ONE = b"\1\2\3\4"
RULES = [
    pytest.param(b"", "expected at least 8 bytes, got 0", id="empty file"),
    pytest.param(b"\2\0\0\0", "expected at least 8 bytes, got 4", id="half a length"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="Git LFS pointer"),
    pytest.param(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100000000 bytes", id="header over 100 MB"),
    pytest.param(struct.pack("<Q", 2**64 - 8) + b"{}", "at most 100000000 bytes", id="header of 2^64 - 8"),
    pytest.param(struct.pack("<Q", 10) + b"{}", "got 2: the download is incomplete", id="header past the end"),
    pytest.param(packed(b""), "starts with '{', got ''", id="no header"),
    pytest.param(packed(b" {}"), "starts with '{', got ' '", id="padding before the header"),
    pytest.param(packed(b"[]"), "starts with '{', got '['", id="header is an array"),
    pytest.param(packed(b"{}\n"), "ends with '}' and spaces", id="padding other than spaces"),
    pytest.param(packed(b"{}\0\0"), "ends with '}' and spaces", id="padding of zeros"),
    pytest.param(packed(b"{} {}"), "Extra data", id="two headers"),
    pytest.param(packed(b'{"a":NaN}'), "finite numbers", id="NaN"),
    pytest.param(packed(b'{"\xff":1}'), "expected UTF-8", id="not UTF-8"),
    pytest.param(packed(b'{"a":' * 20 + b"1" + b"}" * 20), "at most 8 levels", id="nesting"),
    pytest.param(packed({"__metadata__": []}), "__metadata__", id="metadata is an array"),
    pytest.param(packed({"__metadata__": {"format": 1}}), "__metadata__", id="metadata of numbers"),
    pytest.param(
        packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), ONE), "'a' twice", id="duplicate tensor"
    ),
    pytest.param(
        packed(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"shape":[2,2]}}', ONE),
        "'shape' twice",
        id="duplicate field",
    ),
    pytest.param(packed({"": entry()}, ONE), "printable characters, got ''", id="empty name"),
    pytest.param(packed({"n" * 513: entry()}, ONE), "1 to 512 printable characters", id="long name"),
    pytest.param(packed({"a\x1b[2J": entry()}, ONE), r"got 'a\x1b[2J'", id="name with control characters"),
    pytest.param(packed({"a\0": entry()}, ONE), r"got 'a\x00'", id="name with a zero"),
    pytest.param(packed(b'{"\\ud800":1}'), "lone surrogate", id="name with a lone surrogate"),
    pytest.param(packed({"a": 1}), "dtype, shape and data_offsets, got 1", id="entry is a number"),
    pytest.param(packed({"a": {"dtype": "U8", "shape": [4]}}, ONE), "data_offsets, got", id="no offsets"),
    pytest.param(packed({"a": entry() | {"x": 1}}, ONE), "dtype, shape and data_offsets", id="unknown field"),
    pytest.param(packed({"a": entry("u8")}, ONE), "known dtype, got 'u8'", id="unknown dtype"),
    pytest.param(packed({"a": entry(["U8"])}, ONE), "known dtype", id="dtype is an array"),
    pytest.param(packed({"a": entry(shape="4")}, ONE), "positive integers, got '4'", id="shape is text"),
    pytest.param(packed({"a": entry(shape=[4.0])}, ONE), "positive integers", id="float in a shape"),
    pytest.param(packed({"a": entry("F32", [True])}, ONE), "positive integers", id="bool in a shape"),
    pytest.param(packed({"a": entry(shape=[-4])}, ONE), "positive integers", id="negative size"),
    pytest.param(packed({"a": entry(shape=[-2, -2])}, ONE), "positive integers", id="two negative sizes"),
    pytest.param(packed({"a": entry(shape=[0], offsets=[0, 0])}), "positive integers", id="no elements"),
    pytest.param(packed({"a": entry(shape=[1] * 9 + [4])}, ONE), "at most 8 positive", id="too many dimensions"),
    pytest.param(packed({"a": entry(shape=[2**63, 2, 2])}, ONE), "fits in 64 bits", id="size that wraps to zero"),
    pytest.param(packed({"a": entry(shape=[2**64 - 1] * 8)}, ONE), "fits in 64 bits", id="size far over 64 bits"),
    pytest.param(packed({"a": entry(shape=[2**64])}, ONE), "at most 64 bits", id="size of 2^64"),
    pytest.param(packed({"a": entry("F4", [3], [0, 2])}, b"12"), "whole bytes, got 12 bits", id="half a byte"),
    pytest.param(packed({"a": entry("F6_E2M3", [2], [0, 2])}, b"12"), "whole bytes, got 12 bits", id="F6 bits"),
    pytest.param(packed({"a": entry(offsets=4)}, ONE), "begin <= end", id="offsets are a number"),
    pytest.param(packed({"a": entry(offsets=[0, 2, 4])}, ONE), "begin <= end", id="three offsets"),
    pytest.param(packed({"a": entry(offsets=[4, 0])}, ONE), "begin <= end", id="end before begin"),
    pytest.param(packed({"a": entry(offsets=[-4, 0])}, ONE), "begin <= end", id="negative offset"),
    pytest.param(packed({"a": entry(offsets=[False, 4])}, ONE), "begin <= end", id="bool offset"),
    pytest.param(packed({"a": entry(offsets=[0.0, 4])}, ONE), "begin <= end", id="float offset"),
    pytest.param(packed({"a": entry("F32", [2])}, ONE), "expected 8 bytes for F32 [2]", id="range under the shape"),
    pytest.param(packed({"a": entry(shape=[3])}, ONE), "expected 3 bytes for U8 [3]", id="range over the shape"),
    pytest.param(
        packed({"a": entry(), "b": entry(offsets=[2, 6])}, ONE + b"56"), "tensor 'b', expected data", id="overlap"
    ),
    pytest.param(packed({"a": entry(), "b": entry()}, ONE), "overlaps the tensor before it", id="same range twice"),
    pytest.param(packed({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789"), "leaves a gap", id="gap"),
    pytest.param(packed({"a": entry(offsets=[1, 5])}, b"12345"), "leaves a gap", id="gap at the start"),
    pytest.param(packed({"a": entry()}, b"123"), "the download is incomplete, 1 bytes missing", id="short data"),
    pytest.param(packed({"a": entry("U8", [2**40], [0, 2**40])}, ONE), "missing", id="range far past the end"),
    pytest.param(packed({"a": entry()}, b"12345"), "1 bytes belong to no tensor", id="bytes after the last tensor"),
    pytest.param(packed({}, b"1"), "1 bytes belong to no tensor", id="bytes of no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "problem"), RULES)
def test_is_refused(reader: LimitedReader, data: bytes, problem: str) -> None:
    outcome = reader.read(data)
    assert_clean(outcome, "CheckpointError")
    assert problem in outcome.message and str(reader.path) in outcome.message


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(lambda: packed(b'{"a":' * 2_000_000), id="nested objects"),
        pytest.param(lambda: packed(b'{"a":' + b"[" * 10_000_000), id="nested arrays"),
        pytest.param(lambda: packed(b'{"a":[' + b"{}," * 10_000_000 + b"{}]}"), id="empty objects"),
        # Found by the first run of these tests: re.sub took 500 MB to drop the strings of this 9 MB.
        pytest.param(lambda: packed(b'{"a":[' + b'"",' * 3_000_000 + b'""]}'), id="empty strings"),
        pytest.param(lambda: packed(b'{"a":[' + b"9" * 10_000_000 + b"]}"), id="long integer"),
        pytest.param(lambda: packed('{"a":"😀'.encode() + b"b" * 30_000_000 + b'"}'), id="wide string"),
        pytest.param(lambda: packed(b'{"' + b'\\"' * 10_000_000), id="unclosed string of quotes"),
        pytest.param(lambda: packed({"a": entry(shape=[2**62] * 100_000)}, ONE), id="long shape"),
        pytest.param(lambda: packed({str(i): 0 for i in range(MAX_TENSORS + 1)}), id="too many tensors"),
        pytest.param(lambda: packed({str(i): entry() for i in range(MAX_TENSORS)}, ONE), id="one range 100 000 times"),
    ],
)
def test_a_bomb_is_refused_within_the_limits(reader: LimitedReader, bomb: Callable[[], bytes]) -> None:
    outcome = reader.read(bomb())
    assert_clean(outcome, "CheckpointError")
    assert outcome.error


def test_a_file_cut_anywhere_is_refused(reader: LimitedReader) -> None:
    for n_bytes in range(len(VALID)):
        outcome = reader.read(VALID[:n_bytes])
        assert_clean(outcome, "CheckpointError")
        assert outcome.error, f"accepted {n_bytes} of {len(VALID)} bytes"


@pytest.mark.slow
def test_any_flipped_bit_is_refused_or_read_as_the_library_does(reader: LimitedReader) -> None:
    for data in flips(VALID, VALID_HEADER_BYTES):
        assert_sound(reader.read(data), data)


HOSTILE_SCALARS = st.sampled_from(
    [0, 1, 4, 8, 20, 21, -1, 2 ** 31, 2 ** 32, 2 ** 53, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1, 2 ** 64, 10 ** 30, 1.0, 1e+300, True, None, "", "F4", "F32", "F64", "__metadata__", "a.weight", [], [0], {}]
).map(copy.deepcopy)  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Each container and key under which a value of this JSON document lies."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in pairs] + [node for _, inner in pairs for node in nodes(inner)]


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """The valid file with a few values or names of its header replaced."""
    header = json.loads(VALID[8:VALID_HEADER_BYTES])
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(nodes(header) or [(header, "new")]))
        if isinstance(container, dict) and draw(st.booleans()):
            container[draw(st.text(max_size=6))] = container.pop(key, draw(HOSTILE_SCALARS))
        else:
            container[key] = draw(HOSTILE_SCALARS)
    return packed(header, VALID[VALID_HEADER_BYTES:])


@st.composite
def spliced_files(draw: st.DrawFn) -> bytes:
    """The valid file with a piece of it replaced, dropped or repeated; its length field may be put right again."""
    begin, end = sorted((draw(st.integers(0, len(VALID))), draw(st.integers(0, len(VALID)))))
    piece = draw(
        st.binary(max_size=12) | st.just(VALID[begin:end] * 2) | st.sampled_from([b"{", b'"', b"\\", b"[" * 99])
    )
    data = VALID[:begin] + piece + VALID[end:]
    header_bytes = max(len(data) - 29, 0)
    return packed(data[8 : 8 + header_bytes], data[8 + header_bytes :]) if draw(st.booleans()) else data


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_headers() | spliced_files())
def test_any_mutation_is_refused_or_read_as_the_library_does(reader: LimitedReader, data: bytes) -> None:
    assert_sound(reader.read(data), data)


@st.composite
def near_layouts(draw: st.DrawFn) -> bytes:
    """Well-typed headers whose ranges, sizes and coverage are right or nearly so."""
    header, begin = {}, 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), draw(st.lists(st.integers(1, 4), max_size=3))
        end = begin + int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8
        slips = draw(st.sampled_from([(0, 0)] * 6 + [(0, 1), (1, 0), (1, 1), (-1, 0), (-1, -1)]))
        header[name] = entry(dtype, shape, [max(begin + slips[0], 0), max(end + slips[1], 0)])
        begin = end
    names = draw(st.permutations(list(header)))
    return packed(
        {name: header[name] for name in names}, bytes(max(begin + draw(st.sampled_from([0, 0, 0, 1, -1])), 0))
    )


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(near_layouts())
def test_layouts_are_judged_as_the_library_judges_them(reader: LimitedReader, data: bytes) -> None:
    outcome = reader.read(data)
    assert_sound(outcome, data)
    assert (outcome.error is None) == (library_contents(data) is not None), outcome.message


def test_the_index_maps_tensors_to_shards(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(
        '{"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001.safetensors", "b": "x.safetensors"}}'
    )
    assert read_index(path) == {"a": "model-00001.safetensors", "b": "x.safetensors"}


UNSAFE_NAMES = [
    "../out/secret.safetensors",
    "sub/model.safetensors",
    "/etc/secret.safetensors",
    "..\\secret.safetensors",
    "C:secret.safetensors",
    "model.bin",
    "",
    "..",
    "a\0.safetensors",
    "a\n.safetensors",
    "\x1b[2J.safetensors",
    "\u202e.safetensors",
    "x" * 250 + ".safetensors",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_an_index_names_plain_shards_only(index_reader: LimitedReader, name: str) -> None:
    outcome = index_reader.read(json.dumps({"weight_map": {"a": name}}).encode())
    assert_clean(outcome, "CheckpointError")
    assert "unsafe shard name" in outcome.message


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_an_unsafe_shard_name_is_not_resolved_either(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="unsafe shard name"):
        resolve_shard(tmp_path, name)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"[]", "expected an object", id="array"),
        pytest.param(b"{}", "expected a weight_map of 1 to 100000 tensors", id="no weight map"),
        pytest.param(b'{"weight_map": {}}', "got 0", id="empty weight map"),
        pytest.param(b'{"weight_map": ["a"]}', "expected a weight_map", id="weight map is an array"),
        pytest.param(b'{"weight_map": {"a": 1}}', "unsafe shard name", id="shard is a number"),
        pytest.param(b'{"weight_map": {"": "a.safetensors"}}', "printable characters", id="empty tensor name"),
        pytest.param(
            b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice", id="duplicate tensor"
        ),
        pytest.param(b'{"weight_map": ' * 1000 + b"1" + b"}" * 1000, "at most 64 levels", id="nesting"),
    ],
)
def test_an_index_is_refused(index_reader: LimitedReader, data: bytes, problem: str) -> None:
    outcome = index_reader.read(data)
    assert_clean(outcome, "CheckpointError")
    assert problem in outcome.message


def test_an_index_of_too_many_tensors_is_refused(index_reader: LimitedReader) -> None:
    outcome = index_reader.read(json.dumps({"weight_map": dict.fromkeys(map(str, range(100_001)), "x")}).encode())
    assert "got 100001" in outcome.message


SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.safetensors"
    path.write_bytes(VALID)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    return folder


def test_a_plain_shard_is_found(checkpoint: Path) -> None:
    (checkpoint / SHARD).write_bytes(VALID)
    assert resolve_shard(checkpoint, SHARD) == checkpoint / SHARD


def test_a_link_into_the_blobs_of_its_own_cache_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    blobs = checkpoint.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "0f3a").write_bytes(VALID)
    (checkpoint / SHARD).symlink_to("../../blobs/0f3a")
    assert read_header(resolve_shard(checkpoint, SHARD))[0].name == "a.weight"
    (tmp_path / "link").symlink_to(checkpoint)
    assert resolve_shard(tmp_path / "link", SHARD).samefile(blobs / "0f3a")


def test_a_link_out_of_the_checkpoint_is_refused(checkpoint: Path, outside: Path) -> None:
    (checkpoint / SHARD).symlink_to(outside)
    with pytest.raises(CheckpointError, match="unsafe link"):
        resolve_shard(checkpoint, SHARD)


def test_blobs_that_are_a_link_themselves_are_refused(checkpoint: Path, outside: Path) -> None:
    """An unpacked archive could bring its own snapshots folder beside a `blobs` that points anywhere."""
    (checkpoint.parent.parent / "blobs").symlink_to(outside.parent)
    (checkpoint / SHARD).symlink_to(f"../../blobs/{outside.name}")
    with pytest.raises(CheckpointError, match="unsafe link"):
        resolve_shard(checkpoint, SHARD)


def test_blobs_outside_a_cache_are_no_exception(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "abc123"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f3a").write_bytes(VALID)
    (folder / SHARD).symlink_to("../../blobs/0f3a")
    with pytest.raises(CheckpointError, match="unsafe link"):
        resolve_shard(folder, SHARD)


def test_only_a_file_is_a_shard(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="missing shard"):
        resolve_shard(checkpoint, SHARD)
    (checkpoint / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(CheckpointError, match="missing shard"):
        resolve_shard(checkpoint, "loop.safetensors")
    (checkpoint / "folder.safetensors").mkdir()
    os.mkfifo(checkpoint / "pipe.safetensors")
    for name in ("folder.safetensors", "pipe.safetensors"):
        with pytest.raises(CheckpointError, match="expected a regular file"):
            resolve_shard(checkpoint, name)
