"""The parser: what the model wrote, however it was cut and however it slipped."""

import json
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.chat.events import AnswerEvent, ContentDelta, ReasoningDelta, ToolCallArguments, ToolCallBegin, ToolCallEnd
from step35.chat.messages import Tool
from step35.chat.output_parser import OutputParser
from step35.chat.tool_arguments import closed

WRITE = Tool(
    "write",
    "",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "mode": {"type": "integer"},
            "ratio": {"type": "number"},
            "force": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"$ref": "#/$defs/Where"},
            "limit": {"type": ["integer", "null"]},
            "kind": {"enum": ["a", 1]},
        },
        "$defs": {"Where": {"type": "object"}},
    },
)
NOW = Tool("now", "", {"type": "object", "properties": {}})
TOOLS = (WRITE, NOW)


def parse(
    pieces: Sequence[str], *, tools: Sequence[Tool] = TOOLS, in_reasoning: bool = True, truncated: bool = False
) -> dict:
    """Everything that the parser says, joined."""
    ids = (f"call_{n}" for n in count())
    parser = OutputParser(tools, in_reasoning, lambda: next(ids))
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish(truncated)
    return joined(events)


def joined(events: Sequence[AnswerEvent]) -> dict:
    said: dict = {"reasoning": "", "content": "", "calls": [], "order": []}
    for event in events:
        kind = type(event).__name__
        if said["order"][-1:] != [kind]:
            said["order"].append(kind)
        match event:
            case ReasoningDelta(text):
                said["reasoning"] += text
            case ContentDelta(text):
                said["content"] += text
            case ToolCallBegin(index, id, name):
                assert index == len(said["calls"])
                said["calls"].append({"id": id, "name": name, "arguments": "", "ended": False})
            case ToolCallArguments(index, fragment):
                assert fragment and index == len(said["calls"]) - 1 and not said["calls"][index]["ended"]
                said["calls"][index]["arguments"] += fragment
            case ToolCallEnd(index):
                said["calls"][index]["ended"] = True
    assert all(call["ended"] for call in said["calls"])
    return said


def call(name: str, **parameters: str) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def calls(text: str, **options: Any) -> list[tuple[str, dict]]:
    return [(entry["name"], json.loads(entry["arguments"])) for entry in parse([text], **options)["calls"]]


A = ("write", {"path": "a"})
LOOSE = "<parameter=path>\na\n"

# (text, reasoning, content, calls); no call is in an answer but those that are meant
GOLDEN: dict[str, tuple[str, str, str, list]] = {
    "an answer": ("Think.\n</think>\nHi.", "Think.", "Hi.", []),
    "one newline on each side of the tag": ("Think.\n\n</think>\n\nHi.\n", "Think.\n", "\nHi.\n", []),
    "no newlines": ("Think.</think>Hi.", "Think.", "Hi.", []),
    "no reasoning": ("</think>\nHi.", "", "Hi.", []),
    "reasoning without an end": ("Think.\n", "Think.\n", "", []),
    "a reasoning opened once more": ("</think>\n<think>\nHm.\n</think>\nHi.", "Hm.", "Hi.", []),
    "a second end of the reasoning": ("A\n</think>\n</think>\nHi.", "A", "Hi.", []),
    "angle brackets": ("a<b\n</think>\nx < y <tool <function= </parameter> <", "a<b", "x < y <tool <function= </parameter> <", []),
    "a call": ("T\n</think>\n" + call("write", path="a"), "T", "", [A]),
    "text before a call": ("</think>\nLook:\n\n" + call("now"), "", "Look:", [("now", {})]),
    "parallel calls": ("</think>\n" + call("write", path="a") + "\n" + call("now"), "", "", [A, ("now", {})]),
    "two functions in one wrapper": (
        "</think>\n" + call("now").removesuffix("</tool_call>") + call("now").removeprefix("<tool_call>\n"),
        "", "", [("now", {}), ("now", {})],
    ),
    "a call ends the reasoning": ("T\n" + call("now"), "T", "", [("now", {})]),
    "reasoning that speaks of the tag": ("I need <tool_call> for it.\n</think>\nHi.", "I need <tool_call> for it.", "Hi.", []),
    "reasoning that quotes a function": ("<function=now>?\n</think>\nHi.", "<function=now>?", "Hi.", []),
    "no name": ("</think>\n<tool_call>\n<function=>\n</function>\n</tool_call>", "", "<tool_call>\n<function=>\n</function>\n</tool_call>", []),
    "an empty wrapper": ("</think>\n<tool_call>\n</tool_call>", "", "<tool_call>\n</tool_call>", []),
    "an undeclared tool, well written": ("</think>\n" + call("grep", q="x"), "", "", [("grep", {"q": "x"})]),
    "no wrapper": ("</think>\n" + call("now")[12:-13], "", "", [("now", {})]),
    "no wrapper, undeclared": ("</think>\n<function=grep>\n</function>", "", "<function=grep>\n</function>", []),
    "a declared name within a line": ("</think>\nSay <function=now> to me", "", "Say <function=now> to me", []),
    "a space for the equals sign": ("</think>\n<tool_call>\n<function write>\n" + LOOSE + "</parameter>\n</function>\n</tool_call>", "", "", [A]),
    "an attribute": ('</think>\n<tool_call>\n<function name="now">\n</function>\n</tool_call>', "", "", [("now", {})]),
    "a space, undeclared": ("</think>\n<tool_call>\n<function grep>\n</tool_call>", "", "<tool_call>\n<function grep>\n</tool_call>", []),
    "no end of the parameter": ("</think>\n<tool_call>\n<function=write>\n" + LOOSE + "</function>\n</tool_call>", "", "", [A]),
    "no end of a parameter before the next": (
        "</think>\n<tool_call>\n<function=write>\n" + LOOSE + "<parameter=mode>\n7\n</parameter>\n</function>\n</tool_call>",
        "", "", [("write", {"path": "a", "mode": 7})],
    ),
    "no end of the function": ("</think>\n<tool_call>\n<function=write>\n" + LOOSE + "</parameter>\n</tool_call>", "", "", [A]),
    "no end but the wrapper's": ("</think>\n<tool_call>\n<function=write>\n" + LOOSE + "</tool_call>", "", "", [A]),
    "no end at all": ("</think>\n<tool_call>\n<function=write>\n" + LOOSE, "", "", [A]),
    "an undeclared tool's parameter without an end": (
        "</think>\n<tool_call>\n<function=grep>\n<parameter=q>\na\n</function>\n</tool_call>", "", "", [("grep", {"q": "a\n</function>\n</tool_call>"})],
    ),
    "a value that holds the tags": (
        "</think>\n" + call("write", text="say </parameter> or\n</function> or\n<parameter=key> <tool_call>\n</parameter>!"),
        "", "", [("write", {"text": "say </parameter> or\n</function> or\n<parameter=key> <tool_call>\n</parameter>!"})],
    ),
    "newlines of a value": ("</think>\n" + call("write", path="\n\n  a\n\n"), "", "", [("write", {"path": "\n\n  a\n\n"})]),
    "empty values": ("</think>\n" + call("write", path="", mode=""), "", "", [("write", {"path": "", "mode": ""})]),
    "a value on the tag's line": ("</think>\n<tool_call><function=write><parameter=path>a</parameter></function></tool_call>", "", "", [A]),
    "a value said twice": ("</think>\n" + call("write", path="a")[:-25] + LOOSE.replace("a\n", "b\n") + "</parameter>\n</function>\n</tool_call>", "", "", [A]),
    "text after a call": ("</think>\n" + call("now") + "\nDone.", "", "\nDone.", [("now", {})]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    text, reasoning, content, wanted = GOLDEN[name]
    said = parse([text])
    assert (said["reasoning"], said["content"]) == (reasoning, content)
    assert calls(text) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("truncated", [False, True])
def test_every_cut_into_two_says_the_same(name: str, truncated: bool) -> None:
    text = GOLDEN[name][0]
    for end in range(len(text) + 1):
        whole = parse([text[:end]], truncated=truncated)
        assert parse(list(text[:end]), truncated=truncated) == whole
    whole = parse([text], truncated=truncated)
    assert all(parse([text[:i], text[i:]], truncated=truncated) == whole for i in range(len(text)))


TYPED = [
    ("mode", "7", 7), ("mode", "-3", -3), ("mode", "7.0", 7), ("mode", "seven", "seven"), ("mode", "07", "07"),
    ("ratio", "1.5e3", 1500.0), ("ratio", "2", 2), ("ratio", "NaN", "NaN"),
    ("force", "true", True), ("force", "False", False), ("force", "yes", "yes"),
    ("tags", '["a", "b"]', ["a", "b"]), ("tags", '["a"', '["a"'), ("tags", "{}", "{}"), ("tags", "[NaN]", "[NaN]"),
    ("where", '{"a": [1]}', {"a": [1]}), ("where", "[1]", "[1]"),
    ("limit", "5", 5), ("limit", "null", None), ("limit", "None", None), ("limit", "few", "few"),
    ("text", "null", None), ("text", "nullable", "nullable"), ("text", "5", "5"), ("text", "n", "n"), ("text", " null ", None),
    ("kind", "1", 1), ("kind", "a", "a"), ("path", "5", "5"), ("path", "null", "null"), ("unknown", "5", "5"),
    ("path", 'a"\\\n\t\u2028é\N{GRINNING FACE}', 'a"\\\n\t\u2028é\N{GRINNING FACE}'), ("tags", "[" * 100000, "[" * 100000),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), TYPED, ids=[f"{key}={text[:8]!r}" for key, text, _ in TYPED])
def test_a_value_has_the_schemas_type_or_is_a_string(key: str, text: str, value: object) -> None:
    got = calls("</think>\n" + call("write", **{key: text}))[0][1][key]
    assert got == value and type(got) is type(value)


PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=write>", "<function write>", "<function=grep>", "<function=now>",
     "</function>", "<parameter=path>", "<parameter=text>", "<parameter=mode>", "</parameter>", "\n", "\n\n", " ", "<", ">", "a", "null",
     "7", '"', "é", "<func", "</", "<function=", " " * 70, "x" * 210]
)  # fmt: skip


@given(
    st.lists(PIECES, max_size=14).map("".join), st.data(), st.booleans(), st.booleans(), st.sampled_from([(), TOOLS])
)
def test_any_cuts_say_the_same(
    text: str, data: st.DataObject, in_reasoning: bool, truncated: bool, tools: tuple[Tool, ...]
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    options = {"tools": tools, "in_reasoning": in_reasoning, "truncated": truncated}
    said = parse([text], **options)
    assert said == parse(pieces, **options) == parse(list(text), **options)
    for entry in said["calls"]:
        assert entry["name"] and isinstance(
            json.loads(entry["arguments"] if not truncated else closed(entry["arguments"])), dict
        )
    if not tools and not truncated:
        assert said["calls"] == []


values = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(
    lambda text: text.replace("</parameter>", "")
)


@given(
    st.dictionaries(st.sampled_from(["path", "other"]), values, max_size=2),
    values.map(lambda text: text.replace("<", "")),
)
def test_what_the_template_writes_is_read_back(parameters: dict[str, str], reasoning: str) -> None:
    said = parse([f"{reasoning}\n</think>\nI call.\n{call('write', **parameters)}"])
    assert (said["reasoning"], said["content"], json.loads(said["calls"][0]["arguments"])) == (
        reasoning,
        "I call.",
        parameters,
    )


def streamed(text: str) -> Iterator[tuple[str, list[AnswerEvent]]]:
    parser = OutputParser(TOOLS, False, lambda: "call")
    for letter in text:
        yield letter, parser.feed(letter)


def test_a_string_streams_while_it_is_written_and_a_number_when_it_is_whole() -> None:
    text = call("write", path="abc", mode="12")
    fragments = [
        event.fragment for _, events in streamed(text) for event in events if isinstance(event, ToolCallArguments)
    ]
    assert fragments == ["{", '"path": "a', "b", "c", '"', ', "mode": 12}']


def test_nothing_that_may_begin_a_tag_is_shown_too_early() -> None:
    shown = ""
    for letter, events in streamed("a <tool_call> b\n<tool_call>\n<function=now>\n"):
        shown += "".join(event.text for event in events if isinstance(event, ContentDelta))
        assert not shown.endswith(("<", "<t", "<tool_call")) and (letter != "b" or shown == "a <tool_call> b")
    assert shown == "a <tool_call> b"


def test_a_truncated_call_gives_what_was_parsed_and_can_be_closed() -> None:
    """A cut in a call used to be an HTTP 500 elsewhere."""
    text = "</think>\n" + call("write", mode="7", path='say "hi"\n<b>')
    for end in range(text.index("<function"), len(text)):
        said = parse([text[:end]], truncated=True)
        assert said["content"] == "" and len(said["calls"]) <= 1
        for entry in said["calls"]:
            got = json.loads(closed(entry["arguments"]))
            assert got.get("mode", 7) == 7 and 'say "hi"\n<b>'.startswith(got.get("path", ""))
    half = parse([text[: text.index('hi"')]], truncated=True)["calls"][0]["arguments"]
    assert half == '{"mode": 7, "path": "say \\"' and json.loads(closed(half)) == {"mode": 7, "path": 'say "'}


def test_without_tools_everything_is_text() -> None:
    said = parse(["T\n</think>\n" + call("write", path="a")], tools=())
    assert said["content"] == call("write", path="a") and said["calls"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["<", "\n", "<tool_call>", "<function=", "</parameter>", "<tool_call>\n<function=write>\n<parameter=text>\n", " "],
)
@pytest.mark.parametrize(
    "lead",
    ["", "<tool_call>\n<function=write>\n<parameter=path>\n", "<tool_call>\n<function=write>\n<parameter=tags>\n"],
)
def test_its_time_grows_with_the_text_only(text: str, lead: str) -> None:
    """Twice the text takes about twice the time; a quadratic scanner would need minutes for this."""
    began = time.monotonic()
    n = 400_000 // len(text)
    parse([lead, text * n])
    parse([lead, *[text] * (n // 8)])
    assert time.monotonic() - began < 20
