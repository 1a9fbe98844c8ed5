"""A call's parameters, written by the model as plain text, to the JSON of its arguments, as they come."""

import json
import re
from typing import Any

_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,300})")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,300})(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")
_WORDS = {
    "null": {"null": "null", "None": "null"},
    "boolean": {"true": "true", "True": "true", "false": "false", "False": "false"},
}
_TYPES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}
_MAX_DEPTH = 8
_MAX_WORD = 64  # with the white space around it


class ArgumentWriter:
    """Writes one call's arguments. All that it returns, joined, is a JSON object.

    A parameter of type string streams; others wait for their end, because their text tells the type.
    What doesn't read as the schema's type is a string.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._names: set[str] = set()
        self._value: _Value | None = None

    def open(self) -> str:
        return "{"

    def close(self) -> str:
        return "}"

    def is_new(self, name: str) -> bool:
        return name not in self._names

    def begin(self, name: str) -> None:
        """Begins a parameter; a second value for the same name is dropped."""
        types = types_of(_property(self._schema, name), self._schema)
        lead = (", " if self._names else "") + json.dumps(name, ensure_ascii=False) + ": "
        self._value = _Value(types, lead) if self.is_new(name) else None
        self._names.add(name)

    def add(self, text: str) -> str:
        return self._value.add(text) if self._value else ""

    def end(self) -> str:
        value, self._value = self._value, None
        return value.end() if value else ""


class _Value:
    """One value: kept back while it may be something else than a string."""

    def __init__(self, types: frozenset[str], lead: str) -> None:
        self._types, self._lead = types, lead
        self._words = {word: json_ for kind in types & _WORDS.keys() for word, json_ in _WORDS[kind].items()}
        self._needs_all = bool(types - _WORDS.keys() - {"string"}) or "string" not in types
        self._kept_back: list[str] = []
        self._is_open = False

    def add(self, text: str) -> str:
        if self._is_open:
            return _escaped(text)
        self._kept_back.append(text)
        return "" if self._needs_all or self._may_be_a_word() else self._open()

    def _may_be_a_word(self) -> bool:
        so_far = "".join(self._kept_back)
        return len(so_far) < _MAX_WORD and any(word.startswith(so_far.strip()) for word in self._words)

    def _open(self) -> str:
        self._is_open = True
        return self._lead + '"' + _escaped("".join(self._kept_back))

    def end(self) -> str:
        if self._is_open:
            return '"'
        text = "".join(self._kept_back)
        typed = self._typed(text.strip())
        return self._lead + typed if typed is not None else self._open() + '"'

    def _typed(self, text: str) -> str | None:
        """Returns the text as JSON of a type that isn't string, if it is that."""
        if text in self._words:
            return self._words[text]
        if self._types & {"integer", "number"} and _INTEGER.fullmatch(text):
            return text
        if "number" in self._types and _NUMBER.fullmatch(text):
            return text
        if "integer" in self._types and _INTEGER.fullmatch(text.removesuffix(".0")):
            return text.removesuffix(".0")
        kind = {"{": "object", "[": "array"}.get(text[:1])
        return text if kind in self._types and _is_json(text) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, dict) else None


def types_of(schema: Any, root: dict[str, Any], depth: int = 0) -> frozenset[str]:
    """Returns the JSON types that a schema allows, as far as it says; string if it doesn't."""
    return _declared_types(schema, root, depth) or frozenset({"string"})


def _declared_types(schema: Any, root: dict[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(entry for entry in kind if isinstance(entry, str))
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return frozenset(json_type(value) for value in values)
    if "$ref" in schema:
        return _declared_types(resolved(schema["$ref"], root), root, depth + 1)
    branches = [schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)]
    return frozenset[str]().union(*(_declared_types(branch, root, depth + 1) for some in branches for branch in some))


def json_type(value: Any) -> str:
    """Returns the name of a JSON value's type."""
    return _TYPES[type(value)]


def resolved(ref: Any, root: dict[str, Any]) -> Any:
    """Returns what a local reference such as #/$defs/Point names, or None."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    value: Any = root
    for key in ref.removeprefix("#").split("/")[1:]:
        value = value.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(value, dict) else None
    return value


def closed(arguments: str) -> str:
    """Returns arguments that were cut short by the writer's rules as a JSON object."""
    for end in ("", "}", '"}'):
        if _is_json(arguments + end):
            return arguments + end
    return "{}"
