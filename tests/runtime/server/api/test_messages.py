"""Messages as the anthropic package sends and reads them."""

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import TextBlock, ThinkingBlock, ToolUseBlock
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowed import of
from served import ANSWER, CALLS, TOOL_SCHEMA, USAGE, Served, conversation, written
from step35.chat.events import ContentDelta, Finished, ReasoningDelta, ToolCallArguments, ToolCallBegin, ToolCallEnd
from step35.chat.messages import Message, Tool, ToolCall
from step35.server.api import messages
from step35.server.errors import ApiError
from step35.server.events import Failed, Progress
from step35.server.generation_request import GenerationRequest

HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"name": name, "description": "d", "input_schema": TOOL_SCHEMA} for name in ("weather", "now")]
CREATE: dict[str, Any] = {"model": "m", "max_tokens": 99, "messages": HI}


def ask(**fields: Any) -> GenerationRequest:
    return messages.read({**CREATE, **fields})


# the anthropic package


def test_the_client_reads_an_answer_with_its_thinking_and_what_was_cached() -> None:
    done = Served(messages, ANSWER).anthropic().messages.create(**CREATE)
    assert [block.type for block in done.content] == ["thinking", "text"]
    thinking, text = of(ThinkingBlock, done.content[0]), of(TextBlock, done.content[1])
    assert (thinking.thinking, text.text, done.stop_reason) == ("Let me see.", "Hello.", "end_turn")
    assert (done.usage.input_tokens, done.usage.cache_read_input_tokens, done.usage.output_tokens) == (20, 80, 20)


@pytest.mark.parametrize("events", [ANSWER, CALLS])
def test_the_clients_own_accumulator_ends_with_what_isnt_streamed(events: list[Any]) -> None:
    client = Served(messages, events).anthropic()
    with client.messages.stream(**CREATE, tools=TOOLS) as stream:
        streamed = stream.get_final_message()
    assert streamed.to_dict(exclude_none=True) == client.messages.create(**CREATE, tools=TOOLS).to_dict(
        exclude_none=True
    )


def test_the_client_reads_parallel_calls() -> None:
    done = Served(messages, CALLS).anthropic().messages.create(**CREATE, tools=TOOLS)
    assert [(b.id, b.name, b.input) for b in done.content if b.type == "tool_use"] == [
        ("call_a", "weather", {"city": "Bern"}),
        ("call_b", "now", {}),
    ]
    assert done.stop_reason == "tool_use"


def test_what_the_client_gets_can_be_sent_back() -> None:
    served = Served(messages, CALLS)
    client = served.anthropic()
    blocks = client.messages.create(**CREATE, tools=TOOLS).content
    result = {"type": "tool_result", "tool_use_id": "call_a", "content": [{"type": "text", "text": "Sunny"}]}
    turns = [
        *HI,
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    client.messages.create(**{**CREATE, "messages": turns}, tools=TOOLS)
    assert conversation(served.requests[1]).messages[1:] == (
        Message(
            "assistant",
            "I look.",
            "Two.",
            (ToolCall("call_a", "weather", '{"city": "Bern"}'), ToolCall("call_b", "now", "{}")),
        ),
        Message("tool", "Sunny", tool_call_id="call_a"),
        Message("user", "And?"),
    )


def test_a_call_that_was_cut_short_is_still_an_object() -> None:
    cut = [
        ToolCallBegin(0, "c", "weather"),
        ToolCallArguments(0, '{"city": "Be'),
        ToolCallEnd(0),
        Finished("length", USAGE),
    ]
    done = Served(messages, cut).anthropic().messages.create(**CREATE, tools=TOOLS)
    assert (of(ToolUseBlock, done.content[0]).input, done.stop_reason) == ({"city": "Be"}, "max_tokens")


def test_a_stop_sequence_is_named() -> None:
    done = (
        Served(messages, [ContentDelta("a"), Finished("stop", USAGE, "END")])
        .anthropic()
        .messages.create(**CREATE, stop_sequences=["END"])
    )
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "END")


def test_errors_reach_the_client_in_the_apis_form() -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        Served(messages, ANSWER).anthropic().messages.create(**{**CREATE, "messages": []})
    body = of(dict, caught.value.body)
    assert body["error"]["type"] == "invalid_request_error" and body["request_id"] == "req"
    failed = [ContentDelta("Hel"), Failed(ApiError(500, "api_error", "the output was NaN"))]
    with (
        pytest.raises(anthropic.APIStatusError, match="the output was NaN"),
        Served(messages, failed).anthropic().messages.stream(**CREATE) as stream,
    ):
        stream.get_final_message()


# what is read


def test_system_blocks_and_tools_are_read() -> None:
    got = ask(
        system=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}],
        tools=[*TOOLS, {"type": "web_search_20250305", "name": "web_search"}],
    )
    assert conversation(got).messages == (Message("system", "a\nb"), Message("user", "hi"))
    assert conversation(got).tools == tuple(Tool(name, "d", TOOL_SCHEMA) for name in ("weather", "now"))
    assert (got.sampling.temperature, ask().sampling.temperature, got.n_predict) == (1.0, 0.6, 99)


def test_choices_and_thinking_are_read() -> None:
    choices = [{"type": "auto"}, {"type": "any"}, {"type": "none"}, {"type": "tool", "name": "now"}]
    assert [ask(tools=TOOLS, tool_choice=choice).tool_choice for choice in choices] == [
        "auto",
        "required",
        "none",
        "function:now",
    ]
    assert (
        ask(tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True}).parallel_tool_calls is False
    )
    assert (ask(thinking={"type": "disabled"}).effort, ask().effort, ask(output_config={"effort": "low"}).effort) == (
        "none",
        None,
        "low",
    )
    assert ask(thinking={"type": "enabled", "budget_tokens": 2000}).reasoning_budget == 2000


def test_what_the_model_cant_read_is_refused_from_the_user_and_named_in_a_result() -> None:
    """An image in a tool's result stays in the history: refusing it would end the conversation for good."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(ApiError, match=r"messages\[0\].content\[0\].type expected text, got 'image'"):
        ask(messages=[{"role": "user", "content": [image]}])
    block = {"type": "tool_result", "tool_use_id": "c", "content": [image]}
    [result] = conversation(ask(messages=[{"role": "user", "content": [block]}])).messages
    assert result == Message("tool", "[image omitted: this model reads text only]", tool_call_id="c")


def test_a_count_needs_no_max_tokens() -> None:
    counted = messages.read_count({"messages": HI, "system": "s"})
    assert counted.messages == (Message("system", "s"), Message("user", "hi"))
    assert messages.counted(7) == {"input_tokens": 7}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens expected"),
        ({"max_tokens": 0}, "max_tokens expected .* got 0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role expected"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, r'expected one of the declared tools \(none\), got "x"'),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens expected"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort expected one of"),
    ],
)
def test_a_bad_request_says_where_wanted_and_got(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        ask(**fields)
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(sorted(messages.MessagesRequest.model_fields)), json_values, max_size=4))
def test_any_body_is_understood_or_refused(fields: dict[str, Any]) -> None:
    try:
        assert conversation(ask(**fields)).messages
    except ApiError as error:
        assert error.status in (400, 413) and "\n" not in error.message


# what is written

deltas = st.one_of(
    st.builds(ReasoningDelta, st.text(min_size=1)),
    st.builds(ContentDelta, st.text(min_size=1)),
    st.just(Progress(1, 2)),
    st.just("call"),
)


@given(st.lists(deltas, max_size=8))
def test_blocks_are_opened_and_closed_one_after_the_other(pieces: list[Any]) -> None:
    events, n_calls = [], 0
    for piece in pieces:
        if piece == "call":
            events += [
                ToolCallBegin(n_calls, f"c{n_calls}", "now"),
                ToolCallArguments(n_calls, "{}"),
                ToolCallEnd(n_calls),
            ]
            n_calls += 1
        else:
            events.append(piece)
    open_block, n_blocks = None, 0
    for sse in written(messages, ask(), [*events, Finished("stop", USAGE)]):
        data = json.loads(sse.data)
        assert data["type"] == sse.event
        match sse.event:
            case "content_block_start":
                assert open_block is None and data["index"] == n_blocks
                open_block, n_blocks = data["index"], n_blocks + 1
            case "content_block_delta":
                assert data["index"] == open_block
            case "content_block_stop":
                assert data["index"] == open_block
                open_block = None
            case "message_stop":
                assert open_block is None
