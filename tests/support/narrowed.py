"""What a test knows about a value and its type doesn't say: that it is there, or of which kind it is."""

from typing import TypeVar

_T = TypeVar("_T")


def present(value: _T | None) -> _T:
    """Returns a value that must not be None."""
    assert value is not None
    return value


def of(kind: type[_T], value: object) -> _T:
    """Returns a value that must be of a kind."""
    assert isinstance(value, kind), value
    return value
