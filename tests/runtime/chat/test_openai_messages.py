"""OpenAI's messages, as llama_cpp's callers write them, to a conversation."""

import pytest

from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.chat.openai_messages import conversation_of
from step35.errors import SettingsError


def test_messages_and_tools_keep_what_the_template_reads() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "/"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "List "}, {"type": "text", "text": "it."}],
            "name": "ann",
        },
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "a b", "tool_call_id": "c1"},
    ]
    tools = [{"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}]
    assert conversation_of(messages, tools) == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "List it.", name="ann"),
            Message("assistant", "", "Hm.", (ToolCall("c1", "ls", '{"path": "/"}'),)),
            Message("tool", "a b", tool_call_id="c1"),
        ),
        (Tool("ls", "", {"type": "object"}),),
    )


def test_arguments_may_be_an_object() -> None:
    """The template of stock llama_cpp iterates over them, so scripts send them parsed."""
    call = {"function": {"name": "ls", "arguments": {"path": "é"}}}
    (message,) = conversation_of([{"role": "assistant", "tool_calls": [call]}], None).messages
    assert message.tool_calls == (ToolCall("", "ls", '{"path": "é"}'),)


def test_what_the_template_can_t_show_is_refused() -> None:
    with pytest.raises(SettingsError, match="bad role: expected one of system, user, assistant, tool, got 'function'"):
        conversation_of([{"role": "function", "content": "x"}], None)
    with pytest.raises(SettingsError, match="a message's image_url is not served"):
        conversation_of([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], None)
