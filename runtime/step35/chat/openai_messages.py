"""Chat messages and tools as llama_cpp's callers write them, in OpenAI's form, to a conversation. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from step35.chat.messages import Conversation, Message, Role, Tool, ToolCall
from step35.errors import SettingsError

ROLES: dict[str, Role] = {role: role for role in get_args(Role)}


def conversation_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Conversation:
    """Returns a conversation; raises SettingsError on what the model's template can't show."""
    return Conversation(tuple(map(_message, messages)), tuple(map(_tool, tools or ())))


def _message(entry: Mapping[str, Any]) -> Message:
    role = ROLES.get(entry["role"])
    if role is None:
        raise SettingsError(f"bad role: expected one of {', '.join(ROLES)}, got {entry['role']!r}")
    return Message(
        role,
        _text(entry.get("content")),
        entry.get("reasoning_content"),
        tuple(map(_tool_call, entry.get("tool_calls") or ())),
        entry.get("tool_call_id"),
        entry.get("name"),
    )


def _text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part["type"] != "text":
            raise SettingsError(f"a message's {part['type']} is not served: expected text alone")
    return "".join(part["text"] for part in content)


def _tool_call(entry: Mapping[str, Any]) -> ToolCall:
    function = entry["function"]
    arguments = function.get("arguments", "")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(entry.get("id", ""), function["name"], text)


def _tool(entry: Mapping[str, Any]) -> Tool:
    function = entry["function"]
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})
