"""YAML of our own, read strictly: every mistake is one line that names the file's line."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from step35.errors import SettingsError

_T = TypeVar("_T")
_NEEDED: Any = object()


class Section:
    """One mapping of a file. Its keys are taken one by one; `end` refuses what is left."""

    def __init__(self, file: str, node: yaml.Node, loader: yaml.SafeLoader, name: str = "") -> None:
        self._file, self._node, self._loader, self.name = file, node, loader, name
        if not isinstance(node, yaml.MappingNode):
            raise self.error(name or "the file", "keys and values", self._value(node), node)
        self._entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            text = str(self._value(key))
            if text in self._entries:
                raise self.error(self._path(text), "once", "it twice", key)
            self._entries[text] = value
        self._left = set(self._entries)

    def take(self, key: str, kind: Callable[[Any], _T], want: str, default: Any = _NEEDED) -> _T:
        """Returns a value; `kind` makes it from what YAML read and raises ValueError or TypeError if it can't."""
        node = self._node_of(key)
        if node is None and default is _NEEDED:
            raise self._missing(key)
        if node is None:
            return default
        value = self._value(node)
        try:
            return kind(value)
        except (ValueError, TypeError) as error:
            raise self.error(self._path(key), want, repr(value), node) from error

    def section(self, key: str) -> "Section":
        """Returns the mapping under a key."""
        node = self._node_of(key)
        if node is None:
            raise self._missing(key)
        return Section(self._file, node, self._loader, self._path(key))

    def sections(self, key: str) -> list["Section"]:
        """Returns the mappings of a list; none if the key is absent."""
        node = self._node_of(key)
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(self._path(key), "a list", repr(self._value(node)), node)
        return [Section(self._file, item, self._loader, f"{self._path(key)}[{i}]") for i, item in enumerate(node.value)]

    def names(self) -> list[str]:
        """Returns the mapping's keys."""
        return list(self._entries)

    def end(self) -> None:
        """Raises SettingsError if a key was never taken."""
        for key in self._entries:
            if key in self._left:
                raise self.error(self._path(key), "a known key", "an unknown one", self._entries[key])

    def fault(self, key: str, want: str, got: object) -> SettingsError:
        """Returns the error that names a key's line; for checks that need more than one value."""
        return self.error(self._path(key), want, got, self._entries.get(key))

    def error(self, what: str, want: str, got: object, node: yaml.Node | None = None) -> SettingsError:
        line = (node or self._node).start_mark.line + 1
        return SettingsError(f"bad value: {self._file} line {line}: {what} expected {want}, got {got}")

    def _node_of(self, key: str) -> yaml.Node | None:
        self._left.discard(key)
        return self._entries.get(key)

    def _missing(self, key: str) -> SettingsError:
        for meant in get_close_matches(key, self._left, 1):
            return self.error(self._path(meant), f"the key {key}", "an unknown one", self._entries[meant])
        return self.error(self._path(key), "to be there", "nothing")

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def _value(self, node: yaml.Node) -> Any:
        return self._loader.construct_object(node, deep=True)


def read_yaml(path: Path) -> Section:
    """Returns the file's mapping; raises SettingsError if the file is missing or isn't YAML."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Returns a file's text; raises SettingsError if it is missing or isn't UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"can't read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"can't read {path}: expected a text in UTF-8, got {error.reason}") from error


def parse_yaml(text: str, file: str) -> Section:
    """Returns the mapping that a text holds; `file` is what errors call it."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"not YAML: {file}: {' '.join(str(error).split())}") from error
    if node is None:
        raise SettingsError(f"empty file: {file} expected keys and values, got nothing")
    return Section(file, node, loader)


def whole(value: Any) -> int:
    """A whole number from 0 on; for `take`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


def positive(value: Any) -> float:
    """A number above 0; for `take`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError
    return float(value)


def text(value: Any) -> str:
    """A text; for `take`."""
    if not isinstance(value, str):
        raise ValueError
    return value


def one_of(*known: str) -> Callable[[Any], str]:
    """One of some words; for `take`."""

    def check(value: Any) -> str:
        if value not in known:
            raise ValueError
        return value

    return check
