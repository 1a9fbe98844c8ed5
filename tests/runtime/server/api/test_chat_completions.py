"""Chat completions as the openai package sends and reads them."""

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from narrowed import of, present
from served import ANSWER, CALLS, TOOL_SCHEMA, USAGE, Served, conversation, written
from step35.chat.events import ContentDelta, Finished, Logprobs, TokenText, TokenUsage
from step35.chat.messages import Message, Tool, ToolCall
from step35.server.api import chat_completions, request_limits
from step35.server.errors import ApiError
from step35.server.events import Failed, Progress
from step35.server.generation_request import GenerationRequest, JsonOutput

HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": TOOL_SCHEMA}}
    for name in ("weather", "now")
]


def ask(**fields: Any) -> GenerationRequest:
    return chat_completions.read({"model": "m", "messages": HI, **fields})


def refused(message: str, **fields: Any) -> ApiError:
    with pytest.raises(ApiError, match=message) as caught:
        ask(**fields)
    assert "\n" not in caught.value.message
    return caught.value


# the openai package


def test_the_client_reads_an_answer_with_its_reasoning_and_what_was_cached() -> None:
    done = Served(chat_completions, ANSWER).openai().chat.completions.create(model="m", messages=HI)
    choice, usage = done.choices[0], present(done.usage)
    reasoning = present(choice.message.model_extra)["reasoning_content"]
    assert (choice.message.content, reasoning, choice.finish_reason) == ("Hello.", "Let me see.", "stop")
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (100, 20, 120)
    assert present(usage.prompt_tokens_details).cached_tokens == 80
    assert present(usage.completion_tokens_details).reasoning_tokens == 5


def test_the_client_reads_a_stream_with_pings_and_usage() -> None:
    client = Served(chat_completions, ANSWER).openai()
    chunks = list(
        client.chat.completions.create(model="m", messages=HI, stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hello."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert present(chunks[-1].usage).total_tokens == 120 and all(chunk.usage is None for chunk in chunks[:-1])
    assert {"processed": 80, "total": 100} in [getattr(chunk, "prompt_progress", None) for chunk in chunks]


def test_without_include_usage_no_chunk_has_it() -> None:
    chunks = list(
        Served(chat_completions, ANSWER).openai().chat.completions.create(model="m", messages=HI, stream=True)
    )
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_clients_own_accumulator_reads_parallel_tool_calls() -> None:
    served = Served(chat_completions, CALLS)
    with served.openai().chat.completions.stream(model="m", messages=HI, tools=TOOLS) as stream:
        done = stream.get_final_completion()
    calls = [
        (call.id, call.function.name, call.function.arguments) for call in present(done.choices[0].message.tool_calls)
    ]
    assert calls == [("call_a", "weather", '{"city": "Bern"}'), ("call_b", "now", "{}")]
    assert done.choices[0].finish_reason == "tool_calls" and done.choices[0].message.content == "I look."
    whole = served.openai().chat.completions.create(model="m", messages=HI, tools=TOOLS)
    whole_calls = [of(ChatCompletionMessageFunctionToolCall, c) for c in present(whole.choices[0].message.tool_calls)]
    assert [(call.id, call.function.name, call.function.arguments) for call in whole_calls] == calls


def test_what_the_client_gets_can_be_sent_back() -> None:
    served = Served(chat_completions, CALLS)
    message = served.openai().chat.completions.create(model="m", messages=HI, tools=TOOLS).choices[0].message
    result: Any = {
        "role": "tool",
        "tool_call_id": "call_a",
        "content": [{"type": "text", "text": "Sunny"}, {"type": "text", "text": "20 C"}],
    }
    history: list[Any] = [*HI, message, result]
    served.openai().chat.completions.create(model="m", messages=history, tools=TOOLS)
    assert conversation(served.requests[1]).messages[1:] == (
        Message(
            "assistant",
            "I look.",
            "Two.",
            (ToolCall("call_a", "weather", '{"city": "Bern"}'), ToolCall("call_b", "now", "{}")),
        ),
        Message("tool", "Sunny\n20 C", tool_call_id="call_a"),
    )


def test_an_error_reaches_the_client_with_its_field() -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        Served(chat_completions, ANSWER).openai().chat.completions.create(model="m", messages=HI, n=2)
    assert caught.value.param == "n" and "n expected 1, got 2" in caught.value.message
    assert of(dict, caught.value.body)["request_id"] == "req" and caught.value.type == "invalid_request_error"


def test_a_failure_in_the_stream_is_an_error_for_the_client() -> None:
    failed = [ContentDelta("Hel"), Failed(ApiError(500, "api_error", "the output was NaN"))]
    client = Served(chat_completions, failed).openai()
    with pytest.raises(openai.APIError, match="the output was NaN"):
        list(client.chat.completions.create(model="m", messages=HI, stream=True))
    with pytest.raises(openai.InternalServerError, match="the output was NaN"):
        client.chat.completions.create(model="m", messages=HI)


def test_logprobs_come_with_the_text_they_led_to() -> None:
    entry = Logprobs(TokenText(b"Hi", -0.5), (TokenText(b"Hi", -0.5), TokenText("é".encode()[:1], -1.5)))
    events = [entry, ContentDelta("Hi"), Finished("stop", USAGE)]
    client = Served(chat_completions, events).openai()
    options: dict[str, Any] = {"model": "m", "messages": HI, "logprobs": True, "top_logprobs": 2}
    [got] = present(present(client.chat.completions.create(**options).choices[0].logprobs).content)
    assert (got.token, got.logprob, got.bytes) == ("Hi", -0.5, [72, 105])
    assert [(top.token, top.bytes) for top in got.top_logprobs] == [("Hi", [72, 105]), ("\ufffd", [0xC3])]
    [chunk] = [chunk for chunk in client.chat.completions.create(**options, stream=True) if chunk.choices[0].logprobs]
    assert chunk.choices[0].delta.content == "Hi" and present(chunk.choices[0].logprobs).content == [got]


# what is read


def test_the_defaults_are_models_yamls_for_chat_and_for_work_with_tools() -> None:
    chat, agent = ask().sampling, ask(tools=TOOLS).sampling
    assert (chat.temperature, chat.top_p, agent.temperature, agent.top_p) == (0.6, 0.95, 1.0, 0.95)
    said = ask(tools=TOOLS, temperature=0, top_p=0.5, top_k=7, min_p=0.1, seed=-1, logit_bias={"5": -100})
    assert (said.sampling.temperature, said.sampling.top_p, said.sampling.top_k, said.sampling.min_p) == (
        0,
        0.5,
        7,
        0.1,
    )
    assert said.sampling.logit_bias == {5: -100} and not said.has_seed and ask(seed=0).has_seed


def test_limits_and_choices_are_read() -> None:
    assert (ask().n_predict, ask(max_tokens=5).n_predict, ask(max_tokens=5, max_completion_tokens=7).n_predict) == (
        -1,
        5,
        7,
    )
    assert (ask(stop="a").stop, ask(stop=["a", "", "b"]).stop) == (("a",), ("a", "b"))
    named = {"type": "function", "function": {"name": "now"}}
    assert [ask(tools=TOOLS, tool_choice=c).tool_choice for c in (None, "none", "required", named)] == [
        "auto",
        "none",
        "required",
        "function:now",
    ]
    assert ask(tools=TOOLS, parallel_tool_calls=False).parallel_tool_calls is False
    assert ask(logprobs=True).n_logprobs == 0 and ask().n_logprobs is None


def test_effort_is_read_wherever_a_client_puts_it() -> None:
    said = [
        {"reasoning_effort": "low"},
        {"reasoning": {"effort": "medium"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "xhigh"},
        {},
    ]
    assert [ask(**fields).effort for fields in said] == ["low", "medium", "none", "high", None]
    assert ask(reasoning={"max_tokens": 99}).reasoning_budget == ask(reasoning_budget=99).reasoning_budget == 99


def test_an_image_that_a_tool_returned_is_named_and_not_refused() -> None:
    request = ask(messages=[{"role": "tool", "content": [{"type": "image_url", "image_url": {}}]}])
    [result] = conversation(request).messages
    assert result.content == "[image_url omitted: this model reads text only]"


def test_structured_output_is_read() -> None:
    assert (
        ask(response_format={"type": "text"}).output is None
        and ask(response_format={"type": "json_object"}).output == JsonOutput()
    )
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}}
    assert ask(response_format=form).output == JsonOutput({"type": "object"})


def test_messages_are_read_as_clients_spell_them() -> None:
    request = ask(messages=[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [{"function": {"name": "now", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "noon", "unknown": 1},
    ])  # fmt: skip
    got = conversation(request).messages
    assert got[:2] == (Message("system", "Be brief."), Message("user", "a\nb"))
    assert got[2:] == (Message("assistant", "", "r", (ToolCall("call_0", "now", '{"a": 1}'),)), Message("tool", "noon"))
    with_search = conversation(ask(tools=[*TOOLS, {"type": "web_search"}]))
    assert with_search.tools == tuple(Tool(n, "d", TOOL_SCHEMA) for n in ("weather", "now"))


REFUSED = [
    ({"messages": []}, r"messages expected .*at least 1 item.*, got \[\]"),
    ({"messages": "hi"}, r'messages expected a valid list, got "hi"'),
    ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role expected 'system',.* got \"bot\""),
    ({"messages": [{"content": "x"}]}, r"messages\[0\].role expected .*, got nothing"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, r"messages\[0\].content\[0\].type expected .*, got nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content\[0\].type expected text, got 'image_url'"),
    ({"temperature": "hot"}, r'temperature expected a valid number.*, got "hot"'),
    ({"temperature": 101}, r"temperature expected 0.0 to 100.0, got 101.0"),
    ({"temperature": float("nan")}, r"temperature expected a finite number, got NaN"),
    ({"top_p": -1}, r"top_p expected 0.0 to 1.0, got -1.0"),
    ({"n": 2}, r"n expected 1, got 2"),
    ({"functions": [{}]}, r"expected tools"),
    ({"top_logprobs": 2}, r"expected logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, r"top_logprobs expected .*20, got 21"),
    ({"stop": ["a"] * 17}, r"too many stop strings: expected at most 16, got 17"),
    ({"stop": "a" * 257}, r"expected at most 256 characters, got 257"),
    ({"tool_choice": "required"}, r"expected tools, got none"),
    ({"tool_choice": "perhaps"}, r"expected auto, none, required"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, r'one of the declared tools \(none\), got "x"'),
    ({"tools": [TOOLS[0], TOOLS[0]]}, r"expected one weather, got 2"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r'tools\[0\] expected 1 to 128 characters .*, got "a b"'),
    ({"response_format": {"type": "xml"}}, r"response_format.type expected 'text', 'json_object' or 'json_schema', got \"xml\""),
    ({"response_format": {"type": "json_schema"}}, r"expected a JSON schema, got nothing"),
    ({"reasoning_effort": "huge"}, r"expected one of none, .*, got \"huge\""),
    ({"seed": 1.5}, r"seed expected a valid integer.*, got 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_bad_request_is_400_or_413_that_says_where_wanted_and_got(fields: dict[str, Any], message: str) -> None:
    assert refused(message, **fields).status in (400, 413)


def test_a_request_that_is_too_much_is_refused_with_the_numbers() -> None:
    deep: Any = {}
    for _ in range(request_limits.MAX_DEPTH + 1):
        deep = {"a": deep}
    assert refused("at most 64 levels", metadata=deep).status == 400
    assert refused("at most 8192, got 8193", messages=HI * 8193).status == 413
    assert refused("at most 500000 values", metadata=[0] * 500_001).status == 413
    big = {"type": "object", "enum": list(range(20_000))}
    assert (
        refused(
            "JSON schema too large: expected at most 20000 values",
            response_format={"type": "json_schema", "json_schema": {"schema": big}},
        ).status
        == 413
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(sorted(chat_completions.ChatCompletionsRequest.model_fields)), json_values, max_size=4
    ),
    st.booleans(),
)
def test_any_body_is_understood_or_refused(fields: dict[str, Any], keep_messages: bool) -> None:
    try:
        got = chat_completions.read({"messages": HI, **fields} if keep_messages else fields)
    except ApiError as error:
        assert error.status in (400, 413) and "\n" not in error.message and len(error.message) < 1000
    else:
        assert conversation(got).messages


# what is written


def test_a_ping_holds_the_progress_and_no_text() -> None:
    writer = chat_completions.Writer(ask(), "req", 1)
    [sse] = writer.ping(Progress(3, 9))
    chunk = json.loads(sse.data)
    assert chunk["choices"][0]["delta"] == {} and chunk["prompt_progress"] == {"processed": 3, "total": 9}


@given(st.text())
def test_a_chunk_is_one_line_and_holds_the_text_exactly(text: str) -> None:
    for sse in written(chat_completions, ask(), [ContentDelta(text), Finished("length", TokenUsage())])[:-1]:
        assert "\n" not in sse.data and "\r" not in sse.data
        delta = json.loads(sse.data)["choices"][0]["delta"]
        assert delta.get("content", "") in ("", text)
