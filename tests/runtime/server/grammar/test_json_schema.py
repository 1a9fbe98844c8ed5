"""Structured output: the grammar of a schema or of calls, as llama.cpp itself follows it, and what is refused."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.chat.events import ToolCallArguments
from step35.chat.messages import Conversation, Message, Tool
from step35.chat.output_parser import OutputParser
from step35.native.model import Model
from step35.options import ModelOptions
from step35.sampling.sampler import Sampling
from step35.server.errors import ApiError
from step35.server.generation_request import GenerationRequest, JsonOutput
from step35.server.grammar.number_range import between
from step35.server.grammar.tool_grammar import grammar_of
from tiny_model import tiny_gguf

Follows = Callable[[str | None, str], bool]


@pytest.fixture(scope="module")
def follows() -> Iterator[Follows]:
    """Whether llama.cpp lets a text through a grammar, and an end after it."""
    model = Model(ModelOptions(tiny_gguf()))

    def check(gbnf: str | None, text: str) -> bool:
        grammar = model.open_grammar(gbnf or "")
        try:
            for token in [*model.tokenize(text.encode(), add_bos=False, parse_special=True), model.eos]:
                if not grammar.allowed(np.array([token]))[0]:
                    return False
                if token != model.eos:
                    grammar.accept(token)
            return True
        finally:
            grammar.close()

    yield check
    model.close()


def asked(**fields: Any) -> GenerationRequest:
    tools = fields.pop("tools", ())
    return GenerationRequest(Conversation((Message("user", "hi"),), tuple(tools)), Sampling(), **fields)


def grammar(schema: Any) -> str | None:
    return grammar_of(asked(output=JsonOutput(schema)))


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
            },
            "required": ["name"],
        }
    },
}
OPTIONAL = {"type": "object", "properties": {key: {"type": "integer"} for key in "abc"}, "required": ["b"]}

# (schema, texts of it, texts that aren't)
SCHEMAS: dict[str, tuple[Any, list[str], list[str]]] = {
    "any object": (None, ["{}", '{"a": [1, {"b": null}]}', '\n{"a":\n  1.5e3}'], ["[]", "x", '{"a": }', '{"a": 1', "\n\n\n{}"]),
    "a point": (POINT, ['{"x": 1, "y": -2.5}', '{"x":1,"y":0}'], ['{"x": 1}', '{"y": 1, "x": 1}', '{"x": 1.5, "y": 0}', '{"x": 1, "y": 0, "z": 1}']),
    "optional properties": (OPTIONAL, ['{"b": 1}', '{"a": 1, "b": 2}', '{"b": 1, "c": 2}', '{"a": 1, "b": 2, "c": 3}'], ["{}", '{"a": 1}', '{"a": 1, "c": 2}', '{, "b": 1}']),
    "nothing needed": ({"type": "object", "properties": {"a": {}, "b": {}}}, ["{}", '{"a": 1}', '{"b": "x"}', '{"a": [], "b": {}}'], ['{"b": 1, "a": 1}', '{"a": 1,}']),
    "a map": ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"k": 1, "l": 2}'], ['{"k": "v"}']),
    "an empty object": ({"type": "object", "additionalProperties": False}, ["{}"], ['{"k": 1}']),
    "a tree": (TREE, ['{"name": "a", "children": [{"name": "b"}, {"name": "c", "children": []}]}'], ['{"name": "a", "children": ["b"]}']),
    "values": ({"enum": ["a", 1, None, {"k": [1]}]}, ['"a"', "1", "null", '{"k": [1]}'], ['"b"', "2", "{}"]),
    "values of one type": ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    "a constant": ({"const": 'say "hi"\n'}, [json.dumps('say "hi"\n')], ['"hi"']),
    "a union": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ['"x"', "null"], ["1"]),
    "types": ({"type": ["boolean", "array"], "items": {"type": "boolean"}}, ["true", "[false, true]", "[]"], ["[1]", "null"]),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"abc"', '"é\\n"'], ['"a"', '"abcd"', '"a\nb"']),
    "a list of two or three": ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, ["[1, 2]", "[1,2,3]"], ["[]", "[1]", "[1, 2, 3, 4]"]),
    "at most one": ({"type": "array", "maxItems": 1}, ["[]", '["x"]'], ["[1, 2]"]),
    "none at all": ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    "a date": ({"type": "string", "format": "date"}, ['"2026-11-24"'], ['"2026-13-24"', '"today"']),
    "a date and time": ({"type": "string", "format": "date-time"}, ['"2026-11-24T12:00:00Z"'], ['"2026-11-24"']),
    "an annotation": ({"type": "string", "format": "email", "title": "t", "description": "d", "default": "x"}, ['"x"'], ["1"]),
    "anything": ({}, ["1", "{}", '"x"'], ["x"]),
    "bounds": ({"type": "integer", "minimum": -5, "exclusiveMaximum": 12}, ["-5", "-1", "0", "11"], ["-6", "12", "-0", "1.0", "05"]),
    "a lower bound": ({"type": "integer", "minimum": 3}, ["3", "10", "999"], ["2", "0", "-3"]),
    "a share": ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "0.25", "1", "1.0"], ["-0.1", "1.5", "2", "1e1"]),
    "one schema for all": ({"allOf": [{"type": "integer"}]}, ["1"], ['"x"']),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_llama_cpp_follows_the_grammar_of_a_schema(name: str, follows: Follows) -> None:
    schema, good, bad = SCHEMAS[name]
    gbnf = grammar(schema)
    assert [text for text in good if not follows(gbnf, text)] == [] == [text for text in bad if follows(gbnf, text)]


UNSUPPORTED = {
    "minimum": {"type": "number", "minimum": 0.5}, "exclusiveMinimum": {"type": "number", "exclusiveMinimum": 0}, "pattern": {"type": "string", "pattern": "a+"}, "not": {"not": {"type": "null"}},
    "multipleOf": {"type": "number", "multipleOf": 2}, "uniqueItems": {"type": "array", "uniqueItems": True}, "if": {"if": {}, "then": {}},
    "patternProperties": {"type": "object", "patternProperties": {}}, "minProperties": {"type": "object", "minProperties": 1},
    "prefixItems": {"type": "array", "prefixItems": [{}]}, "allOf": {"allOf": [{}, {}]}, "contains": {"type": "array", "contains": {}},
    "propertyNames": {"type": "object", "propertyNames": {}}, "nullable": {"type": "string", "nullable": True}, "frobnicate": {"frobnicate": 1},
}  # fmt: skip


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_an_unsupported_keyword_is_named_wherever_it_stands(keyword: str) -> None:
    """llama.cpp's own converter ignores what it doesn't know, so the answer breaks the schema."""
    deep = {"type": "object", "properties": {"a": {"type": "array", "items": {"anyOf": [UNSUPPORTED[keyword]]}}}}
    for schema, place in ((UNSUPPORTED[keyword], "#"), (deep, "#/properties/a/items/anyOf/0")):
        with pytest.raises(ApiError, match=f"unsupported JSON schema keyword: {keyword} at {place}") as caught:
            grammar(schema)
        assert (caught.value.status, caught.value.param) == (400, "response_format")


BROKEN = [
    ({"type": "text"}, "type at # expected string"), ({"type": []}, "type at # expected"), ({"enum": []}, "#/enum expected a list that isn't empty"),
    ({"$ref": "#/$defs/X"}, "expected a place in this schema, got '#/"), ({"$ref": "http://x"}, "expected a place in this schema"),
    ({"$ref": "#"}, "refers to nothing but itself"), ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to nothing but itself"),
    ({"type": "array", "maxItems": 2001}, "maxItems at # expected 0 to 2000, got 2001"), ({"type": "array", "minItems": 3, "maxItems": 2}, "at least minItems, 3, got 2"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "expected a declared property, got 'a'"), ({"type": "object", "required": 1}, "list of required names"),
    ({"type": "array", "items": 5}, "#/items expected an object, got 5"), ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "expected an object, got False"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum at # expected at most 2, got 3"), ({"type": "integer", "minimum": 1e999}, "expected a whole number of at most 16 digits, got inf"),
    ({"type": "string", "enum": [1]}, "expected a value of type string, got none"),
    ({"type": "object", "properties": {f"k{i}": {"type": "object", "properties": {f"l{j}": {} for j in range(60)}} for i in range(60)}}, "at most 5000 rules"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), BROKEN)
def test_a_broken_schema_is_400(schema: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        grammar(schema)
    assert caught.value.status == 400 and "\n" not in caught.value.message


def matches(rule: str, text: str) -> bool:
    """Whether a text follows a rule without references, which is a regular expression but for its quotes."""
    pattern = re.sub(r'"([^"]*)"', lambda literal: re.escape(literal[1]), rule).replace(" ", "")
    return re.fullmatch(pattern, text) is not None


@given(
    st.tuples(st.integers(-2000, 2000), st.integers(-2000, 2000)),
    st.integers(-2500, 2500),
    st.sampled_from(["", ".0", ".5", ".00", ".999"]),
)
def test_a_range_holds_its_numbers_and_no_others(bounds: tuple[int, int], whole: int, fraction: str) -> None:
    low, high = sorted(bounds)
    assert matches(between(low, high, False), str(whole)) == (low <= whole <= high)
    assert matches(between(low, high, True), f"{whole}{fraction}") == (low <= float(f"{whole}{fraction}") <= high)


# calls

WRITE = Tool("write", "", {"type": "object", "required": ["path", "n"], "properties": {
    "path": {"type": "string"}, "n": {"type": "integer"}, "mode": {"enum": ["a", 1]}, "force": {"type": "boolean"}, "tags": {"type": "array"}, "x": {"type": "file"},
}})  # fmt: skip
NOW = Tool("now", "", {})


def call(name: str, **parameters: str) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def test_a_required_call_is_one_of_the_tools_in_the_models_own_form(follows: Follows) -> None:
    gbnf = grammar_of(asked(tools=[WRITE, NOW], tool_choice="required"))
    text = "a\n<b></b></p> </parameter </paramete<</parameter\n\nend"
    good = [
        call("now"),
        "\n" + call("write", path=text, n="7"),
        call("write", path="", n="-7", mode="1", force="True", tags='["a"]', x="y"),
        call("now") + "\n" + call("now"),
    ]
    bad = [
        "Sure: " + call("now"),
        call("grep"),
        call("write", path="a"),
        call("write", n="7", path="a"),
        call("write", path="a", n="seven"),
        call("write", path="a</parameter>b", n="7"),
        "",
    ]
    assert [text for text in good if not follows(gbnf, text)] == [] == [text for text in bad if follows(gbnf, text)]


def test_a_named_tool_and_a_single_call_are_kept_to(follows: Follows) -> None:
    named = grammar_of(asked(tools=[WRITE, NOW], tool_choice="function:now", parallel_tool_calls=False))
    assert (
        follows(named, call("now"))
        and not follows(named, call("write", path="a", n="7"))
        and not follows(named, call("now") + "\n" + call("now"))
    )


def test_with_tools_and_a_schema_the_model_may_call_or_answer(follows: Follows) -> None:
    both = grammar_of(asked(tools=[NOW], output=JsonOutput(POINT)))
    assert follows(both, call("now")) and follows(both, '{"x": 1, "y": 2}') and not follows(both, "Hello")


def test_nothing_is_in_the_way_of_a_plain_question() -> None:
    assert (
        grammar_of(asked())
        is None
        is grammar_of(asked(tools=[NOW]))
        is grammar_of(asked(tools=[NOW], tool_choice="none"))
    )
    assert grammar_of(GenerationRequest("text", Sampling())) is None


def test_what_the_grammar_allows_the_parser_reads_with_the_schemas_types() -> None:
    parser = OutputParser([WRITE], False, lambda: "c")
    events = parser.feed(call("write", path="a", n="-7", force="True", tags='["a"]')) + parser.finish(False)
    arguments = "".join(event.fragment for event in events if isinstance(event, ToolCallArguments))
    assert json.loads(arguments) == {"path": "a", "n": -7, "force": True, "tags": ["a"]}
