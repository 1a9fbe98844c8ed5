"""llama.cpp's grammar language: rules under names, and the rules of JSON. Pure."""

import json
from typing import Any

JSON_RULES = {
    "ws": r'| " " | "\n"{1,2} [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "pair": r'string ":" ws value',
    "object": r'"{" ws (pair ("," ws pair)*)? ws "}"',
    "array": r'"[" ws (value ("," ws value)*)? ws "]"',
    "value": r"object | array | string | number | boolean | null",
    "date": r'[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": r'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,9})? '
    r'("Z" | [-+] [0-2] [0-9] ":" [0-5] [0-9])',
    "uuid": r'[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


class Rules:
    """A grammar that grows: every added rule gets a name of its own."""

    def __init__(self) -> None:
        self._rules = dict(JSON_RULES)

    def __len__(self) -> int:
        return len(self._rules)

    def reserve(self, hint: str) -> str:
        """Returns a new name, for a rule that refers to itself."""
        name = f"{hint}-{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name

    def add(self, hint: str, body: str) -> str:
        """Returns the name of a new rule."""
        return self.define(self.reserve(hint), body)

    def include(self, rules: dict[str, str]) -> None:
        """Takes in rules with names of their own."""
        self._rules |= rules

    def text(self, root: str) -> str:
        """Returns the grammar; `root` is the body of the rule that an answer follows."""
        return "\n".join(f"{name} ::= {body}" for name, body in {"root": root, **self._rules}.items()) + "\n"


def literal(text: str) -> str:
    """Returns a text as a terminal."""
    return '"' + "".join(_escape(letter) for letter in text) + '"'


def _escape(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    return letter if letter.isprintable() else f"\\U{ord(letter):08X}"


def json_literal(value: Any) -> str:
    """Returns a JSON value as a terminal, spelt without needless white space."""
    return literal(json.dumps(value, ensure_ascii=False))


def repeated(rule: str, least: int, most: int | None) -> str:
    """Returns a rule so many times; `most` None is without end."""
    return f"{rule}{{{least},{'' if most is None else most}}}"


def either(*branches: str) -> str:
    return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"
