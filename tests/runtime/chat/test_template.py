"""The chat template: what the model reads, and that a hostile template can't hold the server."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from step35.chat.errors import BadConversation
from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.chat.template import ChatTemplate
from step35.server.errors import api_error

SOURCE = (Path(__file__).parents[2] / "data" / "tiny-step35" / "chat_template.jinja").read_text(encoding="utf-8")
BOS, EOS = "<bos>", "<eos>"
TEMPLATE = ChatTemplate(SOURCE, BOS, EOS)
WEATHER = Tool("weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})


def render(*messages: Message, tools: tuple[Tool, ...] = (), **options: Any) -> str:
    return TEMPLATE.render(Conversation(messages, tools), **options)


def agent_turns() -> tuple[Message, ...]:
    return (
        Message("system", "Be brief."),
        Message("user", "Weather in Bern?"),
        Message(
            "assistant",
            "",
            "Ask the tool.",
            (ToolCall("call_1", "weather", '{"city": "Bern", "days": [1, 2]}'),),
        ),
        Message("tool", "Sunny.", tool_call_id="call_1"),
    )


def test_a_tool_loop_keeps_its_reasoning_and_gets_results_in_their_own_turn() -> None:
    text = render(*agent_turns(), tools=(WEATHER,))
    assert text.startswith(f"{BOS}<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert json.dumps({"type": "function", "function": {"name": "weather"}})[:-2] in text
    call = "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>"
    assert f"<|im_start|>assistant\n<think>\nAsk the tool.\n</think>\n{call}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>tool_response\n<tool_response>Sunny.</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_the_next_user_message_makes_the_template_drop_older_reasoning() -> None:
    text = render(*agent_turns(), Message("assistant", "Sunny.", "Say it."), Message("user", "Thanks"))
    assert "Ask the tool." not in text and "Say it." not in text and "Sunny.<|im_end|>" in text


def test_contents_lose_the_white_space_around_them() -> None:
    """Left-over white space drives this model into reasoning loops."""
    text = render(Message("user", "\n  hi \n\n"), Message("assistant", " yes\n", "\nhm\n"), add_generation_prompt=False)
    assert text == f"{BOS}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\nyes<|im_end|>\n"


def test_effort_none_closes_the_reasoning_as_an_empty_one_is_written_in_the_history() -> None:
    prompt = render(Message("user", "hi"), effort="none")
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    history = render(Message("user", "hi"), Message("assistant", "yes", ""), add_generation_prompt=False)
    assert history.startswith(prompt + "yes")


def test_a_call_that_was_cut_short_can_stay_in_the_history() -> None:
    for arguments in ('{"city": "Be', "[1]", '"x"'):
        text = render(Message("user", "hi"), Message("assistant", "", "", (ToolCall("c", "weather", arguments),)))
        assert f"<parameter=arguments>\n{arguments}\n</parameter>" in text
    assert "<parameter" not in render(
        Message("user", "hi"), Message("assistant", "", "", (ToolCall("c", "weather", ""),))
    )


words = st.text("ab <>é\n", max_size=8)
messages = st.lists(
    st.one_of(
        st.builds(Message, st.sampled_from(["system", "user", "tool"]), words),
        st.builds(Message, st.just("assistant"), words, st.one_of(st.none(), words)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40)
@given(messages, st.booleans())
def test_it_writes_what_transformers_writes(turns: list[Message], with_tools: bool) -> None:
    tools = (WEATHER,) if with_tools else ()
    chat = [
        {
            "role": m.role,
            "content": m.content.strip(" \n"),
            **({"reasoning_content": m.reasoning.strip(" \n")} if m.reasoning is not None else {}),
        }
        for m in turns
    ]
    schema: list[Any] = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
        for t in tools
    ]
    wanted, _ = render_jinja_template(
        [chat], schema or None, chat_template=SOURCE, add_generation_prompt=True, bos_token=BOS, eos_token=EOS
    )
    assert render(*turns, tools=tools) == wanted[0]


HOSTILE = {
    "endless loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a doubling text": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a doubling sum": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a huge product": "{{ 'x' * 10000000000 }}",
    "a huge product, turned round": "{{ 10000000000 * 'x' }}",
    "a huge power": "{{ 9 ** 9 ** 9 }}",
    "a huge width": "{{ '%10000000000d' % 1 }}",
    "a huge padding": "{{ 'x'.ljust(10000000000) }}",
    "a huge filter": "{{ 'x'|center(10000000000) }}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changing what it was given": "{{ messages.append(1) }}",
    "its own refusal": "{{ raise_exception('roles must alternate') }}",
    "no template": "{% if %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_one_clear_error_in_good_time(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadConversation, match="the chat template failed") as caught:
        ChatTemplate(source, BOS, EOS, max_seconds=0.2).render(Conversation((Message("user", "hi"),)))
    assert api_error(caught.value).status == 400 and time.monotonic() - began < 5


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(BadConversation, match="at most 262144 characters, got 262145"):
        ChatTemplate("x" * (256 * 1024 + 1), BOS, EOS)
