"""The grammar that an answer must follow after its reasoning: JSON, or calls of tools in the model's own form. Pure."""

from collections.abc import Sequence
from typing import Any

from step35.chat.messages import Conversation, Tool
from step35.chat.tool_arguments import types_of
from step35.markup import FUNCTION_END, PARAMETER_END, TOOL_CALL, TOOL_CALL_END, function_tag, parameter_tag
from step35.server.generation_request import GenerationRequest, JsonOutput
from step35.server.grammar.gbnf import Rules, either, json_literal, literal
from step35.server.grammar.json_schema import KEYWORDS, schema_rule


def _text_rules(end: str) -> dict[str, str]:
    """Returns the rules of any text without `end` in it, the first named text-0.

    One rule for each letter of the end that has been seen; any `<` begins it anew (Knuth, Morris, Pratt 1977).
    """
    rules = {"text-0": '"" | [^<] text-0 | "<" text-1'}
    for i, letter in enumerate(end[1:], 1):
        seen = f" | {literal(letter)} text-{i + 1}" if i < len(end) - 1 else ""
        rules[f"text-{i}"] = f'"" | [^<{letter}] text-0 | "<" text-1{seen}'
    return rules


LEAD = r'"\n"{0,2}'
"""What may stand between the end of the reasoning and the answer."""
TEXT_RULES = _text_rules(PARAMETER_END)
WORDS = {"boolean": ("true", "false", "True", "False"), "null": ("null", "None")}


def grammar_of(request: GenerationRequest) -> str | None:
    """Returns the GBNF of an answer's part after the reasoning, or None if anything goes.

    Raises ApiError 400 that names what of a schema a grammar can't express.
    """
    tools = request.prompt.tools if isinstance(request.prompt, Conversation) else ()
    rules = Rules()
    must_call = request.tool_choice not in ("auto", "none")
    branches = []
    if must_call or (request.output and tools and request.tool_choice == "auto"):
        branches.append(_calls(rules, _chosen(tools, request.tool_choice), request.parallel_tool_calls))
    if request.output and not must_call:
        branches.append(_json(rules, request.output))
    return rules.text(f"{LEAD} {either(*branches)}") if branches else None


def _json(rules: Rules, output: JsonOutput) -> str:
    return "object" if output.schema is None else schema_rule(output.schema, rules)


def _chosen(tools: Sequence[Tool], choice: str) -> list[Tool]:
    name = choice.removeprefix("function:")
    return [tool for tool in tools if name in (tool.name, choice)]


def _calls(rules: Rules, tools: Sequence[Tool], in_parallel: bool) -> str:
    rules.include(TEXT_RULES)
    call = rules.add("call", either(*(_call(rules, tool) for tool in tools)))
    return f'{call} ("\\n" {call})*' if in_parallel else call


def _call(rules: Rules, tool: Tool) -> str:
    parameters = [_parameter(rules, tool, name, schema) for name, schema in _properties(tool).items()]
    begin, end = literal(f"{TOOL_CALL}\n{function_tag(tool.name)}\n"), literal(f"{FUNCTION_END}\n{TOOL_CALL_END}")
    return rules.add("tool", " ".join([begin, *parameters, end]))


def _properties(tool: Tool) -> dict[str, Any]:
    properties = tool.parameters.get("properties")
    return properties if isinstance(properties, dict) else {}


def _parameter(rules: Rules, tool: Tool, name: str, schema: Any) -> str:
    begin, end = literal(f"{parameter_tag(name)}\n"), literal(f"\n{PARAMETER_END}\n")
    rule = rules.add("parameter", f"{begin} {_value(tool, schema)} {end}")
    required = tool.parameters.get("required")
    return rule if isinstance(required, list) and name in required else f"{rule}?"


def _value(tool: Tool, schema: Any) -> str:
    """Returns the rule of a value as the parser reads it back: strings are plain text, others JSON of their type."""
    values = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(values, list) and values:
        return either(*(literal(value) if isinstance(value, str) else json_literal(value) for value in values))
    types = types_of(schema, tool.parameters)
    if "string" in types or not types <= KEYWORDS.keys():
        return "text-0"
    return either(*(_typed(kind) for kind in sorted(types)))


def _typed(kind: str) -> str:
    return either(*map(literal, WORDS[kind])) if kind in WORDS else kind
