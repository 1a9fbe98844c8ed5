"""Parses JSON that others wrote: exact, bounded in size, depth, values and time."""

import json
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from convert_step35.errors import CheckpointError, ConvertError, quoted
from convert_step35.source.regular_file import open_regular, read_exactly

# A vocabulary of 128 896 tokens with its merges has half a million values. An empty array takes 3 bytes of JSON and
# 64 of memory, so the number of values is bounded too.
MAX_VALUES = 2_000_000
MAX_INTEGER_CHARS = 20
MAX_FLOAT_CHARS = 128

# The closing quote is optional and the repeat possessive, so that an unclosed string is walked over once.
_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    file, n_bytes = open_regular(path)
    with file:
        if n_bytes > max_bytes:
            raise CheckpointError(f"invalid JSON: {path} expected at most {max_bytes} bytes, got {n_bytes}")
        data = read_exactly(file, n_bytes, path)
    value = parse_json(data, str(path), max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise CheckpointError(f"invalid JSON: {path} expected an object, got {type(value).__name__}")
    return value


def parse_json(
    data: bytes,
    where: str,
    *,
    max_bytes: int,
    max_depth: int = 64,
    error: type[ConvertError] = CheckpointError,
    advice: str = "download the file again",
) -> Any:
    """Parse UTF-8 JSON without duplicate keys, NaN, infinities, lone surrogates or integers past 64 bits.

    `where` names the source in the one-line `error`. Time and memory are linear in the size of `data`.
    """
    try:
        _check_size(data, max_bytes)
        _check_structure(data, max_depth)
        value = _DECODER.decode(data.decode("utf-8"))
        if _SURROGATE_ESCAPE.search(data):
            _check_no_surrogates(value)
        return value
    except (ValueError, RecursionError) as exc:
        raise error(f"invalid JSON: {where} {_problem(exc)}; {advice}") from exc


def _problem(exc: ValueError | RecursionError) -> str:
    match exc:
        case json.JSONDecodeError():
            return f"at line {exc.lineno}, column {exc.colno}: {exc.msg}"
        case UnicodeDecodeError():
            return f"expected UTF-8, got byte 0x{exc.object[exc.start]:02x} at {exc.start}"
        case RecursionError():
            return "is nested too deeply"
        case _:
            return str(exc)


def _check_size(data: bytes, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise ValueError(f"expected at most {max_bytes} bytes, got {len(data)}")


def _check_structure(data: bytes, max_depth: int) -> None:
    """Bound the number of values and the nesting before anything is built."""
    n_quotes = data.count(b'"')
    if n_quotes > 4 * MAX_VALUES:
        raise ValueError(f"expected at most {4 * MAX_VALUES} quotation marks, got {n_quotes}")
    bare = _without_strings(data)
    n_values = sum(bare.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES} values, got {n_values}")
    brackets = bare.translate(None, _NOT_BRACKETS)
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if depth > max_depth:
        raise ValueError(f"expected at most {max_depth} levels of nesting, got {depth}")


def _without_strings(data: bytes) -> bytearray:
    # Not by re.sub: joining its pieces takes 80 bytes for each, which makes a memory bomb of many empty strings.
    bare, position = bytearray(), 0
    for string in _STRING.finditer(data):
        bare += data[position : string.start()]
        position = string.end()
    return bare + data[position:]


def _check_no_surrogates(value: Any) -> None:
    for text in _strings(value):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"expected Unicode text, got the lone surrogate in {quoted(text)}")


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"expected each key once, got {quoted(double)} twice in one object")
    return built


def _integer(literal: str) -> int:
    # Turning digits into an int takes quadratic time, so the length is checked first.
    if len(literal) > MAX_INTEGER_CHARS or not -(2**63) <= (value := int(literal)) < 2**64:
        raise ValueError(f"expected integers of at most 64 bits, got {quoted(literal, 24)}")
    return value


def _float(literal: str) -> float:
    if len(literal) > MAX_FLOAT_CHARS or not math.isfinite(value := float(literal)):
        raise ValueError(f"expected finite numbers, got {quoted(literal, 24)}")
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {literal}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant
)
