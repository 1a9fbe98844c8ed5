"""Any bytes are a header or a ModelError in one line, within bounded memory and time; what is a header can be planned."""

import ctypes
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import small_header
from limited_reader import LimitedReader, Outcome, assert_clean
from small_header import TENSORS
from step35.native.library import C
from step35.planning.gguf_file import MAX_ELEMENTS, MAX_HEADER_BYTES, MAX_KEYS, MAX_TENSORS

V = GGUFValueType
LONG = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedReader]:
    path = tmp_path_factory.mktemp("hostile") / "model.gguf"
    with LimitedReader("small_header:read_and_plan", path) as reader:
        yield reader


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_header.write(tmp_path_factory.mktemp("whole") / "model.gguf")


@pytest.fixture(scope="module")
def header_bytes(whole: bytes) -> int:
    return whole.rindex(b"output.weight") + len("output.weight") + 32


def assert_sound(outcome: Outcome) -> None:
    """A header, an error of ours, or a plan's refusal."""
    assert_clean(outcome, "SettingsError" if outcome.error == "SettingsError" else "ModelError")


def test_the_whole_file_is_a_header(reader: LimitedReader, whole: bytes) -> None:
    shape = reader.read(whole).value.shape
    assert (shape.n_trunk, shape.n_heads, [layer.is_moe for layer in shape.layers]) == (2, 1, [False, True, False])


# as it is known to break


def number(value: int, kind: V = V.UINT32) -> small_header.Entry:
    return value, kind


FAULTS: dict[str, tuple[dict[str, small_header.Entry | None], str]] = {
    "alignment 0": ({"general.alignment": number(0)}, "general.alignment expected 1 to 4294967295, got 0"),
    "alignment 48": ({"general.alignment": number(48)}, "general.alignment expected a power of two, got 48"),
    "alignment a text": ({"general.alignment": ("32", V.STRING)}, "general.alignment expected an unsigned integer, got '32'"),
    "alignment of 64 bits": ({"general.alignment": number(32, V.UINT64)}, "expected an unsigned integer, got 32"),
    "split.count a text": ({"split.count": ("2", V.STRING)}, "split.count expected an unsigned integer, got '2'"),
    "split.count below 0": ({"split.count": number(-1, V.INT32)}, "split.count expected an unsigned integer, got -1"),
    "split.count huge": ({"split.count": number(2**32 - 1)}, "split.count expected 0 to 65535, got 4294967295"),
    "no first shard": ({"split.count": number(2, V.UINT16)}, "not the first shard: .* expected a name with -00001-of-00002"),
    "another model": ({"general.architecture": ("llama", V.STRING)}, "expected general.architecture=step35, got 'llama'"),
    "architecture a number": ({"general.architecture": number(1)}, "expected general.architecture=step35, got ''"),
    "no layers": ({"step35.block_count": None}, "step35.block_count expected an unsigned integer, got nothing"),
    "0 layers": ({"step35.block_count": number(0)}, "step35.block_count expected 1 to 512, got 0"),
    "layers without end": ({"step35.block_count": number(2**32 - 1)}, "step35.block_count expected 1 to 512"),
    "layers a text": ({"step35.block_count": ("3", V.STRING)}, "step35.block_count expected an unsigned integer, got '3'"),
    "layers a float": ({"step35.block_count": (3.0, V.FLOAT32)}, "step35.block_count expected an unsigned integer, got 3.0"),
    "more heads than layers": ({"step35.nextn_predict_layers": number(4)}, "nextn_predict_layers expected 0 to 3, got 4"),
    "more heads than there are": ({"step35.nextn_predict_layers": number(2)}, r"unknown tensor|incomplete MTP heads: .* expected 2 .* got 1"),
    "no heads declared": ({"step35.nextn_predict_layers": None}, "unknown tensor: .* 'blk.2.nextn.eh_proj.weight'"),
    "0 experts": ({"step35.expert_count": number(0)}, "step35.expert_count expected 1 to 1024, got 0"),
    "experts without end": ({"step35.expert_count": number(2**31)}, "step35.expert_count expected 1 to 1024"),
    "more used than there are": ({"step35.expert_used_count": number(5)}, "step35.expert_used_count expected 1 to 4, got 5"),
    "attention heads a text": ({"step35.attention.head_count": ("2", V.STRING)}, "attention.head_count expected 3 numbers, got '2'"),
    "attention heads texts": ({"step35.attention.head_count": (["2"] * 3, V.ARRAY)}, "expected 3 numbers, got an array of texts"),
    "attention heads not numbers": ({"step35.attention.head_count": (float("nan"), V.FLOAT32)}, "expected 3 whole numbers from 0 on, got nan"),
    "attention heads below 0": ({"step35.attention.head_count": ([2, -1, 2], V.ARRAY)}, "expected 3 whole numbers from 0 on, got an array of 3 int32"),
    "too few attention heads": ({"step35.attention.head_count_kv": ([1, 1], V.ARRAY)}, "expected 3 numbers, got an array of 2 int32"),
    "no pattern": ({"step35.attention.sliding_window_pattern": None}, "sliding_window_pattern expected 3 numbers, got nothing"),
    "no embedding": ({"step35.embedding_length": number(0)}, "step35.embedding_length expected 1 to"),
    "trimmed without a vocabulary": ({"general.architecture": ("step35-trimmed-heads", V.STRING)}, "step35.draft.tokens expected an array of int32, got nothing"),
    "trimmed with numbers of another type": (
        {"general.architecture": ("step35-trimmed-heads", V.STRING), "step35.draft.tokens": ([0.5], V.ARRAY)},
        "step35.draft.tokens expected an array of int32, got an array of 1 float32",
    ),
    "trimmed with ids that wrap": (
        {
            "general.architecture": ("step35-trimmed-heads", V.STRING),
            "step35.draft.tokens": ([0, 2**31 - 1, -(2**31), -1, 5], V.ARRAY),
            "step35.draft.stand_ins": ([0] * 6, V.ARRAY),
        },
        "damaged heads: .* expected ascending step35.draft.tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_a_key_that_is_wrong_is_named_with_what_was_expected(reader, tmp_path, changes, message) -> None:
    outcome = reader.read(small_header.write(tmp_path / "model.gguf", changes))
    assert_refused(outcome, message)


def assert_refused(outcome: Outcome, message: str) -> None:
    assert_clean(outcome, "ModelError")
    assert outcome.error and re.search(message, outcome.message), outcome.message


TENSOR_FAULTS = {
    "no embedding": (TENSORS[1:], "incomplete model: .* expected token_embd.weight"),
    "no first head": (tuple(t for t in TENSORS if t != "blk.2.nextn.eh_proj"), "incomplete MTP heads: .* expected 1 .* got 0"),
    "a layer too many": ((*TENSORS, "blk.3.attn_norm"), "unknown tensor: .* 'blk.3.attn_norm.weight'"),
    "a layer far away": ((*TENSORS, "blk.99999999999.attn_norm"), "unknown tensor: .* 'blk.99999999999.attn_norm.weight'"),
    "an unknown tensor": ((*TENSORS, "blk.1.ssm"), "unknown tensor: .* 'blk.1.ssm.weight'"),
    "no experts up": (tuple(t for t in TENSORS if t != "blk.1.ffn_up_exps"), "expected gate, up and down experts in layer 1, got no up"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_make_no_model_are_named(reader, tmp_path, tensors, message) -> None:
    assert_refused(reader.read(small_header.write(tmp_path / "model.gguf", tensors=tensors)), message)


# bytes that are wrong

WORDS = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\0" * 4, b"\xff" * 4, b"\0\0\xc0\x7f"])
WORDS |= st.integers(0, 63).map(lambda n: struct.pack("<Q", 1 << n))
EDITS = st.tuples(st.floats(0, 1), st.integers(0, 8), WORDS | st.binary(max_size=9))


def edited(data: bytes, header_bytes: int, edits: list[tuple[float, int, bytes]]) -> bytes:
    """The file with some bytes of its header replaced, removed or added."""
    for at, n_removed, added in edits:
        start = round(at * header_bytes)
        data = data[:start] + added + data[start + n_removed :]
    return data


@LONG
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_a_line(reader: LimitedReader, data: bytes) -> None:
    for magic in (b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + struct.pack("<QQ", 1, 1)):
        outcome = reader.read(magic + data)
        assert outcome.error
        assert_sound(outcome)


@LONG
@given(st.lists(EDITS, min_size=1, max_size=6))
def test_a_header_with_edits_is_planned_or_refused(
    reader: LimitedReader, whole: bytes, header_bytes: int, edits: list[tuple[float, int, bytes]]
) -> None:
    assert_sound(reader.read(edited(whole, header_bytes, edits)))


def test_a_flipped_bit_is_planned_or_refused_and_what_llama_cpp_refuses_is_refused(
    reader: LimitedReader, whole: bytes, header_bytes: int, tmp_path: Path
) -> None:
    """One bit of each byte; llama.cpp's own reader is asked about whatever is let through."""
    n_accepted, path = 0, tmp_path / "flipped.gguf"
    for position in range(header_bytes):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        outcome = reader.read(bytes(flipped))
        assert_sound(outcome)
        if outcome.error != "ModelError":
            path.write_bytes(flipped)
            assert llama_cpp_reads(path), f"bit {position % 8} of byte {position}"
            n_accepted += 1
    assert n_accepted


def llama_cpp_reads(path: Path) -> bool:
    """Whether llama.cpp's reader of headers takes a file."""

    class Params(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

    read, free = C._lib["gguf_init_from_file"], C._lib["gguf_free"]
    read.argtypes, read.restype = [ctypes.c_char_p, Params], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p], None
    gguf = read(os.fsencode(path), Params(True, None))
    free(gguf)
    return gguf is not None


# bombs


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def packed(n_tensors: int, n_keys: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + body


def numbers(key: bytes, kind: int, n: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, n) + data


BOMBS = {
    "keys without end": (lambda: packed(0, 2**64 - 1), f"expected at most {MAX_KEYS} metadata keys"),
    "tensors without end": (lambda: packed(2**63, 0), f"expected at most {MAX_TENSORS} tensors"),
    "numbers without end": (lambda: packed(0, 1, numbers(b"a", 4, 2**64 - 1)), f"expected at most {MAX_ELEMENTS} elements"),
    "texts without end": (lambda: packed(0, 1, numbers(b"a", 8, 2**61)), f"expected at most {MAX_ELEMENTS} elements"),
    "a text without end": (lambda: packed(0, 1, text(b"a") + struct.pack("<IQ", 8, 2**64 - 1)), "bytes too early"),
    "a name without end": (lambda: packed(0, 1, struct.pack("<Q", 2**64 - 1)), "bytes too early"),
    "arrays of arrays": (lambda: packed(0, 1, numbers(b"a", 9, 1) * 3), "a value's type expected one of GGUF's, got 9"),
    "many keys": (
        lambda: packed(0, MAX_KEYS, b"".join(text(b"%d" % i) + struct.pack("<IB", 0, 1) for i in range(MAX_KEYS))),
        "expected general.architecture=step35, got ''",
    ),
    "many tensors": (
        lambda: packed(MAX_TENSORS, 0, b"".join(text(b"%d" % i) + struct.pack("<IIQ", 0, 0, 0) for i in range(MAX_TENSORS))),
        "incomplete file",
    ),
    "small numbers": (
        lambda: packed(0, 20, b"".join(numbers(b"%d" % i, 0, MAX_ELEMENTS, bytes(MAX_ELEMENTS)) for i in range(20))),
        "expected general.architecture=step35, got ''",
    ),
    "empty texts": (
        lambda: packed(0, 3, b"".join(numbers(b"%d" % i, 8, MAX_ELEMENTS, bytes(8 * MAX_ELEMENTS)) for i in range(3))),
        "expected general.architecture=step35, got ''",
    ),
    "a wide text": (lambda: packed(0, 1, text(b"a") + struct.pack("<I", 8) + text("😀a".encode() * 10**7)), "got ''"),
    "a wide name": (lambda: packed(0, 2, (text("😀a".encode() * 10**7) + struct.pack("<IB", 0, 1)) * 2), "each metadata key once"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("bomb", "message"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_within_the_limits(reader: LimitedReader, bomb, message) -> None:
    assert_refused(reader.read(bomb()), message)


def test_a_header_without_end_is_not_read(reader: LimitedReader) -> None:
    """A sparse file costs its sender nothing."""
    reader.path.unlink(missing_ok=True)
    reader.path.write_bytes(packed(0, 1, text(b"a") + struct.pack("<IQ", 8, 2**40)))
    os.truncate(reader.path, 2**41)
    assert_refused(reader.read_again(), f"it ends at byte {MAX_HEADER_BYTES}, ")
