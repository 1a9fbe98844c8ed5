"""A JSON schema to the grammar of its values; what a grammar can't express is refused by name. Pure.

Nothing fails open: every value of the grammar is valid under the schema, but for oneOf, which counts as
anyOf. Not every valid value is in it: properties come in the schema's order, and no others where some are
declared.
"""

from typing import Any

from step35.chat.tool_arguments import json_type, resolved
from step35.server.errors import ApiError, bad_request
from step35.server.grammar.gbnf import Rules, either, json_literal, repeated
from step35.server.grammar.number_range import MAX_DIGITS, MOST, between

MAX_RULES = 5000
MAX_REPEATS = 2000
"""What llama.cpp takes in one repetition."""
ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "format",
    "$schema", "$id", "$comment", "$anchor", "$defs", "definitions",
})  # fmt: skip
UNIONS = ("anyOf", "oneOf")
KEYWORDS = {
    "string": {"minLength", "maxLength"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "number": {"minimum", "maximum"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}
FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def schema_rule(schema: Any, rules: Rules, param: str = "response_format") -> str:
    """Adds a schema's rules and returns what stands for it; raises ApiError 400 that names what can't be expressed."""
    return _Translation(schema, rules, param).rule(schema, "#", frozenset())


class _Translation:
    """One schema on its way to rules; `path` says where in it one is, `open_refs` what refers to itself."""

    def __init__(self, root: Any, rules: Rules, param: str) -> None:
        self._root, self._rules, self._param = root, rules, param
        self._refs: dict[str, str] = {}

    def rule(self, schema: Any, path: str, open_refs: frozenset[str]) -> str:
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise self._refused(f"bad JSON schema: {path} expected an object, got {str(schema)[:40]}")
        if len(self._rules) > MAX_RULES:
            raise self._refused(f"JSON schema too large: expected at most {MAX_RULES} rules")
        if "$ref" in schema:
            return self._ref(schema, path, open_refs)
        if "enum" in schema or "const" in schema:
            return self._one_of_values(schema, path)
        for union in UNIONS:
            if union in schema:
                return self._union(schema, union, path, open_refs)
        if "allOf" in schema:
            return self._all_of(schema, path, open_refs)
        return self._typed(schema, path)

    def _refused(self, message: str) -> ApiError:
        return bad_request(message, self._param)

    def _check(self, schema: dict[str, Any], path: str, known: set[str]) -> None:
        for key in schema:
            if key not in known and key not in ANNOTATIONS and not _says_nothing(schema, key):
                raise self._refused(
                    f"unsupported JSON schema keyword: {key} at {path}; leave it out and check the answer"
                )

    def _list(self, schema: dict[str, Any], key: str, path: str) -> list[Any]:
        value = schema[key]
        if not isinstance(value, list) or not value:
            raise self._refused(f"bad JSON schema: {path}/{key} expected a list that isn't empty")
        return value

    def _ref(self, schema: dict[str, Any], path: str, open_refs: frozenset[str]) -> str:
        self._check(schema, path, {"$ref"})
        ref = schema["$ref"]
        target = resolved(ref, self._root)
        if target is None:
            raise self._refused(
                f"bad JSON schema: $ref at {path} expected a place in this schema, got {str(ref)[:80]!r}"
            )
        if ref in open_refs:
            raise self._refused(f"bad JSON schema: {ref[:80]!r} refers to nothing but itself")
        if ref not in self._refs:
            self._refs[ref] = name = self._rules.reserve("ref")
            self._rules.define(name, self.rule(target, ref, open_refs | {ref}))
        return self._refs[ref]

    def _one_of_values(self, schema: dict[str, Any], path: str) -> str:
        self._check(schema, path, {"enum", "const", "type"})
        values = [schema["const"]] if "const" in schema else self._list(schema, "enum", path)
        kinds = schema.get("type", list(KEYWORDS))
        fitting = [
            json_literal(value) for value in values if _is_of(value, [kinds] if isinstance(kinds, str) else kinds)
        ]
        if not fitting:
            raise self._refused(f"bad JSON schema: enum at {path} expected a value of type {str(kinds)[:80]}, got none")
        return either(*dict.fromkeys(fitting))

    def _union(self, schema: dict[str, Any], key: str, path: str, open_refs: frozenset[str]) -> str:
        self._check(schema, path, {key})
        branches = self._list(schema, key, path)
        return either(*(self.rule(branch, f"{path}/{key}/{i}", open_refs) for i, branch in enumerate(branches)))

    def _all_of(self, schema: dict[str, Any], path: str, open_refs: frozenset[str]) -> str:
        branches = self._list(schema, "allOf", path)
        if len(branches) > 1 or set(schema) - ANNOTATIONS != {"allOf"}:
            raise self._refused(
                f"unsupported JSON schema keyword: allOf at {path} with more than one schema; merge them"
            )
        return self.rule(branches[0], f"{path}/allOf/0", open_refs)

    def _typed(self, schema: dict[str, Any], path: str) -> str:
        kinds = schema.get("type", _implied(schema))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or not all(isinstance(k, str) and k in KEYWORDS for k in kinds):
            raise self._refused(
                f"bad JSON schema: type at {path} expected {', '.join(KEYWORDS)}, got {str(schema.get('type'))[:80]}"
            )
        self._check(schema, path, {"type"}.union(*(KEYWORDS[kind] for kind in kinds)))
        return either(*(self._of_type(kind, schema, path) for kind in kinds))

    def _of_type(self, kind: str, schema: dict[str, Any], path: str) -> str:
        match kind:
            case "string":
                return self._string(schema, path)
            case "array":
                return self._array(schema, path)
            case "object":
                return self._object(schema, path)
            case "integer" | "number" if KEYWORDS["integer"] & schema.keys():
                return self._number(kind, schema, path)
        return kind

    def _number(self, kind: str, schema: dict[str, Any], path: str) -> str:
        """Bounds of integers, and whole bounds of numbers."""
        for key in KEYWORDS[kind] & schema.keys():
            bound = schema[key]
            if type(bound) not in (int, float) or not abs(bound) <= MOST or bound != int(bound):
                want = f"a whole number of at most {MAX_DIGITS} digits"
                raise self._refused(
                    f"unsupported JSON schema keyword: {key} at {path} expected {want}, got {str(bound)[:40]}"
                )
        low = max(int(schema.get("minimum", -MOST)), int(schema.get("exclusiveMinimum", -MOST - 1)) + 1)
        high = min(int(schema.get("maximum", MOST)), int(schema.get("exclusiveMaximum", MOST + 1)) - 1)
        if low > high:
            raise self._refused(f"bad JSON schema: minimum at {path} expected at most {high}, got {low}")
        return self._rules.add(kind, between(low, high, has_fraction=kind == "number"))

    def _string(self, schema: dict[str, Any], path: str) -> str:
        least, most = self._bounds(schema, "minLength", "maxLength", path)
        form = FORMATS.get(str(schema.get("format")))
        if form and (least, most) == (0, None):
            return self._rules.add("string", f'"\\"" {form} "\\""')
        if (least, most) == (0, None):
            return "string"
        return self._rules.add("string", f'"\\"" {repeated("char", least, most)} "\\""')

    def _array(self, schema: dict[str, Any], path: str) -> str:
        least, most = self._bounds(schema, "minItems", "maxItems", path)
        if "prefixItems" in schema:
            raise self._refused(
                f"unsupported JSON schema keyword: prefixItems at {path}; use an object with named properties"
            )
        item = self.rule(schema.get("items", True), f"{path}/items", frozenset())
        if most == 0:
            return '"[" ws "]"'
        more = repeated(f'("," ws {item})', max(least - 1, 0), None if most is None else most - 1)
        items = f"{item} {more}" if least else f"({item} {more})?"
        return self._rules.add("array", f'"[" ws {items} ws "]"')

    def _bounds(self, schema: dict[str, Any], low: str, high: str, path: str) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for key, value in ((low, least), (high, most)):
            if value is not None and (type(value) is not int or not 0 <= value <= MAX_REPEATS):
                raise self._refused(
                    f"bad JSON schema: {key} at {path} expected 0 to {MAX_REPEATS}, got {str(value)[:40]}"
                )
        if most is not None and most < least:
            raise self._refused(f"bad JSON schema: {high} at {path} expected at least {low}, {least}, got {most}")
        return least, most

    def _object(self, schema: dict[str, Any], path: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if (
            not isinstance(properties, dict)
            or not isinstance(required, list)
            or not all(isinstance(k, str) for k in required)
        ):
            raise self._refused(
                f"bad JSON schema: {path} expected an object of properties and a list of required names"
            )
        unnamed = [name for name in required if name not in properties]
        if unnamed and others is False:
            raise self._refused(
                f"bad JSON schema: required at {path} expected a declared property, got {unnamed[0][:80]!r}"
            )
        every = {**properties, **dict.fromkeys(unnamed, others)}
        if not every:
            return self._map(others, path)
        pairs = [self._pair(name, value, path) for name, value in every.items()]
        return self._in_order(pairs, [name in required for name in every])

    def _map(self, others: Any, path: str) -> str:
        if others is False:
            return '"{" ws "}"'
        value = self.rule(others, f"{path}/additionalProperties", frozenset())
        pair = f'string ":" ws {value}'
        return self._rules.add("map", f'"{{" ws ({pair} ("," ws {pair})*)? ws "}}"')

    def _pair(self, name: str, schema: Any, path: str) -> str:
        value = self.rule(schema, f"{path}/properties/{name}"[:200], frozenset())
        return self._rules.add("pair", f'{json_literal(name)} ":" ws {value}')

    def _in_order(self, pairs: list[str], needed: list[bool]) -> str:
        """Returns an object of the pairs in this order, the ones that aren't needed perhaps left out."""
        rest, starts = "", []
        for pair, is_needed in zip(reversed(pairs), reversed(needed), strict=True):
            if is_needed:
                starts = []
            starts.append(f"{pair} {rest}".strip())
            here = f'"," ws {pair}' if is_needed else f'("," ws {pair})?'
            rest = self._rules.add("rest", f"{here} {rest}".strip())
        starts += [] if any(needed) else ['""']
        return self._rules.add("object", f'"{{" ws {either(*starts)} ws "}}"')


def _is_of(value: Any, kinds: Any) -> bool:
    """Whether a value has one of the types; a whole number is a number too."""
    kind = json_type(value)
    return isinstance(kinds, list) and (kind in kinds or (kind == "integer" and "number" in kinds))


def _says_nothing(schema: dict[str, Any], key: str) -> bool:
    """Whether a keyword demands nothing: it is null, or one of those whose false is the default."""
    return schema[key] is None or (key in ("uniqueItems", "nullable") and schema[key] is False)


def _implied(schema: dict[str, Any]) -> list[str]:
    """Returns the types of a schema that doesn't name them but has keywords of theirs."""
    kinds = [kind for kind, keys in KEYWORDS.items() if keys & schema.keys()]
    return kinds or list(KEYWORDS)
