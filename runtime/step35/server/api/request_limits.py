"""How much a request may hold; past it, an error with the numbers. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from step35.server.errors import bad_request, too_large

MAX_DEPTH = 64
MAX_NODES = 500_000
MAX_MESSAGES = 8192
MAX_TOOLS = 1024
MAX_NAME = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_SCHEMA_NODES = 20_000
MAX_BIASES = 4096


def check_shape(body: dict[str, Any]) -> None:
    """Refuses a body that is nested too deeply or has too many values; walks it without recursion."""
    for n_nodes, depth in enumerate(_depths(body), 1):
        if depth > MAX_DEPTH:
            raise bad_request(f"the request is nested too deeply: expected at most {MAX_DEPTH} levels")
        if n_nodes > MAX_NODES:
            raise too_large(f"the request is too large: expected at most {MAX_NODES} values")


def check_count(what: str, items: Sequence[Any], most: int, param: str) -> None:
    """Refuses a list that is too long."""
    if len(items) > most:
        raise too_large(f"too many {what}: expected at most {most}, got {len(items)}", param)


def check_schema_size(schema: dict[str, Any], param: str) -> None:
    """Refuses a JSON schema with too many parts."""
    n_nodes = sum(1 for _ in _depths(schema))
    if n_nodes > MAX_SCHEMA_NODES:
        raise too_large(f"JSON schema too large: expected at most {MAX_SCHEMA_NODES} values, got {n_nodes}", param)


def _depths(value: Any) -> Iterator[int]:
    """Yields the depth of every value of a JSON document."""
    left = [(0, value)]
    while left:
        depth, value = left.pop()
        yield depth
        if isinstance(value, dict):
            left += [(depth + 1, item) for item in value.values()]
        elif isinstance(value, list):
            left += [(depth + 1, item) for item in value]
