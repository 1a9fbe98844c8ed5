"""Responses as the openai package and Codex send and read them."""

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import (
    Response,
    ResponseFailedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseStreamEvent,
)
from pydantic import TypeAdapter

from narrowed import of, present
from served import ANSWER, CALLS, TOOL_SCHEMA, USAGE, Served, conversation, written
from step35.chat.events import (
    ContentDelta,
    Finished,
    Logprobs,
    TokenText,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Message, Tool, ToolCall
from step35.server.api import responses
from step35.server.errors import ApiError
from step35.server.events import Failed
from step35.server.generation_request import GenerationRequest, JsonOutput

TOOLS: list[Any] = [
    {"type": "function", "name": name, "description": "d", "strict": False, "parameters": TOOL_SCHEMA}
    for name in ("weather", "now")
]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(**fields: Any) -> GenerationRequest:
    return responses.read({"model": "m", "input": "hi", **fields})


def message(role: str, text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


# the openai package


def test_the_client_reads_an_answer_with_its_reasoning_and_what_was_cached() -> None:
    done = Served(responses, ANSWER).openai().responses.create(model="m", input="hi")
    assert [item.type for item in done.output] == ["reasoning", "message"] and done.output_text == "Hello."
    [part], usage = present(of(ResponseReasoningItem, done.output[0]).content), present(done.usage)
    assert (part.text, done.status) == ("Let me see.", "completed")
    cached, reasoning = usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens
    assert (usage.input_tokens, cached, reasoning) == (100, 80, 5)


@pytest.mark.parametrize("events", [ANSWER, CALLS])
def test_the_clients_own_accumulator_ends_with_what_isnt_streamed(events: list[Any]) -> None:
    client = Served(responses, events).openai()
    with client.responses.stream(model="m", input="hi", tools=TOOLS) as stream:
        streamed = stream.get_final_response()
    whole = client.responses.create(model="m", input="hi", tools=TOOLS)
    assert said(streamed) == said(whole)


def said(response: Response) -> dict[str, Any]:
    """What the server said, without what the client read into it."""
    body = response.to_dict(exclude_none=True)
    items = of(list, body["output"])
    return body | {"output": [{k: v for k, v in item.items() if k != "parsed_arguments"} for item in items]}


@pytest.mark.parametrize(
    "events", [ANSWER, CALLS, [Finished("length", USAGE)], [Failed(ApiError(500, "api_error", "NaN"))]]
)
def test_every_event_is_one_of_the_packages_types_and_numbered(events: list[Any]) -> None:
    sent = [EVENT.validate_python(json.loads(sse.data)) for sse in written(responses, ask(tools=TOOLS), events)]
    assert [event.sequence_number for event in sent] == list(range(len(sent)))
    assert [sse.event for sse in written(responses, ask(tools=TOOLS), events)] == [event.type for event in sent]


def test_the_events_of_a_call_come_in_the_order_that_codex_reads() -> None:
    events = [
        ContentDelta("I look."),
        ToolCallBegin(0, "call_a", "now"),
        ToolCallArguments(0, "{"),
        ToolCallArguments(0, "}"),
        ToolCallEnd(0),
        Finished("tool_calls", USAGE),
    ]
    kinds = [
        present(sse.event).removeprefix("response.")
        for sse in written(responses, ask(), events)
        if sse.event != "response.in_progress"
    ]
    assert kinds == [
        "created", "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip


def test_what_the_client_gets_can_be_sent_back() -> None:
    served = Served(responses, CALLS)
    client = served.openai()
    output = client.responses.create(model="m", input="hi", tools=TOOLS).output
    result: Any = {"type": "function_call_output", "call_id": "call_a", "output": "Sunny"}
    history: list[Any] = [message("user", "hi"), *(item.to_dict() for item in output), result]
    client.responses.create(model="m", input=history, tools=TOOLS)
    assert conversation(served.requests[1]).messages == (
        Message("user", "hi"),
        Message(
            "assistant",
            "I look.",
            "Two.",
            (ToolCall("call_a", "weather", '{"city": "Bern"}'), ToolCall("call_b", "now", "{}")),
        ),
        Message("tool", "Sunny", tool_call_id="call_a"),
    )


def test_an_answer_that_was_cut_is_incomplete_and_its_call_an_object() -> None:
    cut = [
        ToolCallBegin(0, "c", "weather"),
        ToolCallArguments(0, '{"city": "Be'),
        ToolCallEnd(0),
        Finished("length", USAGE),
    ]
    done = Served(responses, cut).openai().responses.create(model="m", input="hi")
    call = of(ResponseFunctionToolCall, done.output[0])
    assert (done.status, present(done.incomplete_details).reason) == ("incomplete", "max_output_tokens")
    assert json.loads(call.arguments) == {"city": "Be"}


def test_errors_and_failures_reach_the_client() -> None:
    with pytest.raises(openai.BadRequestError, match="nothing is stored here; send the whole input"):
        Served(responses, ANSWER).openai().responses.create(model="m", input="hi", previous_response_id="resp_1")
    failed = Served(responses, [ContentDelta("H"), Failed(ApiError(500, "api_error", "the output was NaN"))]).openai()
    last = list(failed.responses.create(model="m", input="hi", stream=True))[-1]
    assert present(of(ResponseFailedEvent, last).response.error).message == "the output was NaN"


def test_logprobs_come_with_the_text() -> None:
    events = [Logprobs(TokenText(b"Hi", -0.5), (TokenText(b"Hi", -0.5),)), ContentDelta("Hi"), Finished("stop", USAGE)]
    client = Served(responses, events).openai()
    answer = of(ResponseOutputMessage, client.responses.create(model="m", input="hi", top_logprobs=1).output[0])
    [got] = present(of(ResponseOutputText, answer.content[0]).logprobs)
    assert (got.token, got.top_logprobs[0].logprob) == ("Hi", -0.5)
    deltas = [
        e
        for e in client.responses.create(model="m", input="hi", top_logprobs=1, stream=True)
        if e.type == "response.output_text.delta"
    ]
    assert deltas[0].logprobs[0].token == "Hi"


# what is read


def test_a_turn_as_codex_sends_it_is_one_conversation() -> None:
    body = {
        "model": "m", "instructions": "You are Codex.", "store": False, "stream": True, "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "key", "reasoning": {"effort": "medium", "summary": "auto"}, "tool_choice": "auto", "parallel_tool_calls": False,
        "tools": [*TOOLS, {"type": "web_search"}, {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}, {"type": "local_shell"}],
        "input": [
            message("developer", "Permissions."), message("user", "Environment."), message("user", "Fix it."),
            {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "short"}], "content": [{"type": "reasoning_text", "text": "long"}], "encrypted_content": None},
            message("assistant", "I look.", "output_text"),
            {"type": "function_call", "name": "weather", "arguments": "{}", "call_id": "c1"},
            {"type": "function_call", "name": "now", "arguments": "{}", "call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
            {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "only a summary"}], "encrypted_content": None},
            {"type": "function_call", "name": "now", "arguments": "{}", "call_id": "c3"},
            {"type": "custom_tool_call", "name": "apply_patch", "input": "x", "call_id": "c4"},
            {"type": "function_call_output", "call_id": "c3", "output": "three"},
        ],
    }  # fmt: skip
    got = responses.read(body)
    assert (got.effort, got.parallel_tool_calls, got.stream, got.cache_key, got.n_predict) == (
        "medium",
        False,
        True,
        "key",
        -1,
    )
    tools = tuple(Tool(name, "d", TOOL_SCHEMA) for name in ("weather", "now"))
    assert conversation(got).tools == tools and got.sampling.temperature == 1.0
    assert conversation(got).messages == (
        Message("system", "You are Codex."), Message("system", "Permissions."), Message("user", "Environment."), Message("user", "Fix it."),
        Message("assistant", "I look.", "long", (ToolCall("c1", "weather", "{}"), ToolCall("c2", "now", "{}"))),
        Message("tool", "one", tool_call_id="c1"), Message("tool", "two", tool_call_id="c2"),
        Message("assistant", "", "only a summary", (ToolCall("c3", "now", "{}"),)), Message("tool", "three", tool_call_id="c3"),
    )  # fmt: skip


def test_answers_one_after_the_other_stay_turns_of_their_own() -> None:
    reasoning: dict[str, Any] = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]}
    items = [
        message("user", "a"),
        reasoning,
        message("assistant", "b"),
        reasoning,
        message("assistant", "c"),
        {"role": "user", "content": "d"},
    ]
    assert conversation(ask(input=items)).messages[1:] == (
        Message("assistant", "b", "r"),
        Message("assistant", "c", "r"),
        Message("user", "d"),
    )


def test_an_image_that_a_tool_returned_is_named_and_not_refused() -> None:
    """It stays in the history: refusing it would end the conversation for good."""
    output = [{"type": "input_image", "image_url": "data:"}, {"type": "input_text", "text": "a cat"}]
    request = ask(input=[{"type": "function_call_output", "call_id": "c", "output": output}])
    [result] = conversation(request).messages
    assert result.content == "[input_image omitted: this model reads text only]\na cat"


def test_choices_and_formats_are_read() -> None:
    choices: list[Any] = ["auto", "none", "required", {"type": "function", "name": "now"}, {"type": "web_search"}]
    assert [ask(tools=TOOLS, tool_choice=c).tool_choice for c in choices] == [
        "auto",
        "none",
        "required",
        "function:now",
        "auto",
    ]
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    assert (
        ask(text={"format": form}).output == JsonOutput({"type": "object"})
        and ask(text={"format": {"type": "json_object"}}).output == JsonOutput()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input expected a message, got none"),
        ({"input": None}, "input expected"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\] refers to what isn't stored"),
        ({"input": [{"content": "x"}]}, r"input\[0\].role expected a role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            r"input\[0\].content\[0\].type expected text, got 'input_image'",
        ),
        ({"conversation": "c"}, "conversation is not served"),
        ({"background": True}, "background is not served"),
        ({"text": {"format": {"type": "json_schema"}}}, "expected a JSON schema, got nothing"),
        ({"tools": [{"type": "function"}]}, r'tools\[0\] expected 1 to 128 characters .* got ""'),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort expected one of"),
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
@given(st.dictionaries(st.sampled_from(sorted(responses.ResponsesRequest.model_fields)), json_values, max_size=4))
def test_any_body_is_understood_or_refused(fields: dict[str, Any]) -> None:
    try:
        got = ask(**fields)
    except ApiError as error:
        assert error.status in (400, 413) and "\n" not in error.message
    else:
        assert conversation(got).messages
        assert Response.model_validate(responses.whole(got, "req", 1, [Finished("stop", USAGE)]))
