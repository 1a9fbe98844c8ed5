"""JSON from others is parsed exactly, or refused in one line, whatever its bytes."""

import contextlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_step35.errors import CheckpointError, OutputError
from convert_step35.source.strict_json import MAX_VALUES, parse_json, read_json

LIMIT = 10_000_000

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def parse(data: bytes) -> object:
    return parse_json(data, "input.json", max_bytes=LIMIT)


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_what_json_writes_is_read_back(value: object, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(deadline=None)
@given(st.text('{}[]",:\\u0123eE+-.dDfF \n\tntalsr', max_size=40) | st.binary(max_size=40))
def test_what_is_accepted_means_what_the_json_module_says(data: str | bytes) -> None:
    data = data.encode() if isinstance(data, str) else data
    try:
        value = parse(data)
    except CheckpointError as exc:
        assert str(exc).startswith("invalid JSON: input.json ") and str(exc).isprintable()
    else:
        assert value == json.loads(data.decode())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"", "at line 1, column 1: Expecting value", id="empty"),
        pytest.param(b"\xef\xbb\xbf{}", "at line 1, column 1", id="byte order mark"),
        pytest.param("{}".encode("utf-16"), "expected UTF-8, got byte 0xff at 0", id="UTF-16"),
        pytest.param(b'{"a": "\xc3"}', "expected UTF-8, got byte 0xc3 at 7", id="broken UTF-8"),
        pytest.param(b"{} {}", "at line 1, column 4: Extra data", id="two values"),
        pytest.param(b'{"a": 1, "a": 2}', "expected each key once, got 'a' twice", id="duplicate key"),
        pytest.param(b'[{"a": 1, "\\u0061": 2}]', "expected each key once, got 'a' twice", id="escaped duplicate key"),
        pytest.param(b"[NaN]", "expected finite numbers, got NaN", id="NaN"),
        pytest.param(b"[-Infinity]", "expected finite numbers, got -Infinity", id="infinity"),
        pytest.param(b"[1e999]", "expected finite numbers, got '1e999'", id="number that becomes infinite"),
        pytest.param(b"[18446744073709551616]", "expected integers of at most 64 bits", id="2^64"),
        pytest.param(b"[-9223372036854775809]", "expected integers of at most 64 bits", id="-2^63 - 1"),
        pytest.param(b'["\\ud800"]', "got the lone surrogate in '\\ud800'", id="lone surrogate"),
        pytest.param(b'{"\\uDC00\\ud83d": 1}', "got the lone surrogate", id="surrogates in the wrong order"),
        pytest.param(b'["a\nb"]', "Invalid control character", id="raw control character"),
        pytest.param(b"[" * 65 + b"]" * 65, "expected at most 64 levels of nesting, got 65", id="one level too deep"),
        pytest.param(b"0" * (LIMIT + 1), "expected at most 10000000 bytes, got 10000001", id="one byte too many"),
    ],
)
def test_is_refused_in_one_line(data: bytes, problem: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse(data)
    assert problem in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_brackets_and_quotes_inside_strings_are_not_nesting() -> None:
    text = '[[["\\' * 100
    assert parse(json.dumps([text] * 100).encode()) == [text] * 100


def test_nesting_at_the_limit_is_read() -> None:
    assert parse(b"[" * 64 + b"]" * 64) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(lambda: b"[" * LIMIT, id="unclosed arrays"),
        pytest.param(lambda: b'{"a":' * (LIMIT // 5), id="unclosed objects"),
        pytest.param(lambda: b"[" + b"9" * (LIMIT - 2) + b"]", id="long integer"),
        pytest.param(lambda: b"[0." + b"9" * (LIMIT - 4) + b"]", id="long fraction"),
        pytest.param(lambda: b'["' + b'\\"' * (LIMIT // 2 - 2), id="unclosed string of quotes"),
        pytest.param(lambda: b'"' * LIMIT, id="quotes"),
        pytest.param(lambda: b"[" + b"[]," * MAX_VALUES + b"1]", id="empty arrays"),
        pytest.param(lambda: b"\n" * LIMIT, id="empty lines"),
    ],
)
def test_a_bomb_is_refused_in_linear_time(bomb: Callable[[], bytes]) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError):
        parse(bomb())
    assert time.process_time() - start < 10


@pytest.mark.parametrize("n_frames_left", range(20, 100, 5))
def test_a_nearly_full_stack_is_an_error_of_ours(n_frames_left: int) -> None:
    def descend(levels: int) -> object:
        return descend(levels - 1) if levels else parse(b"[" * 60 + b"]" * 60)

    n_frames = len(inspect.stack(context=0))
    # Whether the parser runs out of stack here depends on the Python; RecursionError must not be what comes out.
    with contextlib.suppress(CheckpointError):
        descend(sys.getrecursionlimit() - n_frames - n_frames_left)


def test_the_caller_chooses_the_error_and_the_advice() -> None:
    with pytest.raises(OutputError, match="^invalid JSON: journal .*; start again$"):
        parse_json(b"{", "journal", max_bytes=10, error=OutputError, advice="start again")


def test_a_file_holds_one_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, "x"]}')
    assert read_json(path, max_bytes=100) == {"a": [1, 2.5, "x"]}
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="expected an object, got list"):
        read_json(path, max_bytes=100)


def test_a_file_over_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match=f"expected at most 100 bytes, got {2**40}"):
        read_json(path, max_bytes=100)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Opening a pipe without a writer would block for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="expected a regular file"):
            read_json(path, max_bytes=100)
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "none.json", max_bytes=100)
