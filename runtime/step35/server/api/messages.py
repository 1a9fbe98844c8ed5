"""Anthropic's Messages: a request to what is asked, and events to content blocks. Pure."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field

from step35.chat.events import (
    ContentDelta,
    Finished,
    ReasoningDelta,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.server.api import request_fields, request_limits
from step35.server.api.collected import collect
from step35.server.api.request_fields import OMITTED, Body, Count, SamplingBody
from step35.server.api.wire import Frame, dumps, progress_fields
from step35.server.errors import ApiError, bad_request
from step35.server.events import Event, Failed, Progress, Sse
from step35.server.generation_request import GenerationRequest, JsonOutput

SIGNATURE = "step35"
"""Thinking needs one to be sent back; nobody checks it here."""


class BlockBody(Body):
    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[BlockBody] | None" = None


class MessageBody(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[BlockBody]


class ToolBody(Body):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ChoiceBody(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingBody(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class FormatBody(Body):
    type: str
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class OutputBody(Body):
    effort: str | None = None
    format: FormatBody | None = None


class MetadataBody(Body):
    user_id: str | None = None


class CountRequest(SamplingBody):
    """The body of a count of tokens."""

    messages: list[MessageBody] = Field(min_length=1)
    model: str | None = None
    system: str | list[BlockBody] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ChoiceBody | None = None
    thinking: ThinkingBody | None = None


class MessagesRequest(CountRequest):
    """The body of a message."""

    max_tokens: Count
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    output_config: OutputBody | None = None
    metadata: MetadataBody | None = None


REQUEST_BODY = MessagesRequest


def read(data: dict[str, Any]) -> GenerationRequest:
    """Returns what a request asks; raises ApiError that says what is wrong with it."""
    body = request_fields.parse(MessagesRequest, data)
    conversation = _conversation(body)
    choice, thinking, output = body.tool_choice, body.thinking, body.output_config
    return GenerationRequest(
        prompt=conversation,
        sampling=request_fields.sampling_of(body, has_tools=bool(conversation.tools)),
        n_predict=body.max_tokens,
        stop=request_fields.stops(body.stop_sequences, "stop_sequences"),
        tool_choice=request_fields.check_choice(_choice(choice), conversation.tools),
        output=_output(output),
        effort=_effort(thinking, output),
        reasoning_budget=thinking.budget_tokens if thinking else None,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        stream=bool(body.stream),
        model=body.model or "",
        has_seed=request_fields.has_seed(body),
        cache_key=body.metadata.user_id if body.metadata else None,
    )


def read_count(data: dict[str, Any]) -> Conversation:
    """Returns the conversation whose tokens are to be counted; raises ApiError."""
    return _conversation(request_fields.parse(CountRequest, data))


def counted(n_tokens: int) -> dict[str, Any]:
    """Returns the body that answers a count of tokens."""
    return {"input_tokens": n_tokens}


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns the body of an error's answer."""
    return {"type": "error", "error": {"type": error.kind, "message": error.message}, "request_id": request_id}


def _conversation(body: CountRequest) -> Conversation:
    request_limits.check_count("messages", body.messages, request_limits.MAX_MESSAGES, "messages")
    system = _text(body.system or "", "system")
    messages = [Message("system", system)] if system else []
    for i, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{i}].content")
    declared = [_tool(entry, i) for i, entry in enumerate(body.tools or ()) if entry.type in (None, "custom")]
    return Conversation(tuple(messages), request_fields.check_tools(declared))


def _tool(body: ToolBody, i: int) -> Tool:
    return request_fields.tool(body.name, body.description, body.input_schema, f"tools[{i}]")


def _messages(message: MessageBody, where: str) -> list[Message]:
    """Returns a message's parts: results of tools are messages of their own, before the user's text."""
    if isinstance(message.content, str):
        return [Message(message.role, message.content)]
    if message.role == "assistant":
        return [_assistant(message.content, where)]
    results = [
        Message("tool", _text(block.content or "", where, omits=True), tool_call_id=block.tool_use_id)
        for block in message.content
        if block.type == "tool_result"
    ]
    others = [block for block in message.content if block.type != "tool_result"]
    return results + ([Message(message.role, _text(others, where))] if others or not results else [])


def _assistant(blocks: Sequence[BlockBody], where: str) -> Message:
    thoughts = [block.thinking or "" for block in blocks if block.type == "thinking"]
    calls = [block for block in blocks if block.type == "tool_use"]
    spoken = [block for block in blocks if block.type not in ("thinking", "redacted_thinking", "tool_use")]
    return Message(
        "assistant",
        _text(spoken, where, omits=True),
        "\n".join(thoughts) if thoughts else None,
        tuple(
            ToolCall(call.id or "", call.name or "", json.dumps(call.input or {}, ensure_ascii=False)) for call in calls
        ),
    )


def _text(content: str | Sequence[BlockBody], where: str, omits: bool = False) -> str:
    """Returns the text of blocks, joined by newlines.

    `omits` says in words that a block is left out, where refusing it would end the conversation for good.
    """
    if isinstance(content, str):
        return content
    texts = []
    for i, block in enumerate(content):
        if block.type != "text" and not omits:
            raise bad_request(f"only text is served: {where}[{i}].type expected text, got {block.type[:40]!r}", where)
        texts.append(block.text or "" if block.type == "text" else OMITTED.format(block.type[:40]))
    return "\n".join(texts)


def _choice(choice: ChoiceBody | None) -> str:
    """Returns auto, none, required or function:NAME."""
    if choice is None:
        return "auto"
    if choice.type == "tool":
        return f"function:{choice.name or ''}"
    return "required" if choice.type == "any" else choice.type


def _output(output: OutputBody | None) -> JsonOutput | None:
    if not (output and output.format):
        return None
    schema = output.format.json_schema
    if output.format.type != "json_schema" or schema is None:
        raise bad_request("bad output_config.format: expected a json_schema with a schema", "output_config")
    request_limits.check_schema_size(schema, "output_config")
    return JsonOutput(schema)


def _effort(thinking: ThinkingBody | None, output: OutputBody | None) -> str | None:
    """Returns the effort; without a word about thinking the model reasons, as it does by itself."""
    if thinking and thinking.type == "disabled":
        return "none"
    return request_fields.effort_of(output.effort if output else None, "output_config.effort")


class Writer:
    """Writes an answer as a stream of events, one content block open at a time."""

    def __init__(self, request: GenerationRequest, request_id: str, created: int) -> None:
        self._request, self._request_id = request, request_id
        self._index = -1
        self._block: str | None = None
        self._frame: Frame | None = None
        """Of the open block's deltas, once there was one."""

    def open(self) -> list[Sse]:
        return [_sse("message_start", message=_message(self._request, self._request_id, [], None, None, TokenUsage()))]

    def event(self, event: Event) -> list[Sse]:
        match event:
            case ReasoningDelta(text):
                return self._delta("thinking", {"thinking": "", "signature": ""}, "thinking_delta", "thinking", text)
            case ContentDelta(text):
                return self._delta("text", {"text": ""}, "text_delta", "text", text)
            case ToolCallBegin(_, id_, name):
                return [*self._end(), self._begin("tool_use", {"id": id_, "name": name, "input": {}})]
            case ToolCallArguments(_, fragment):
                return self._delta("tool_use", {}, "input_json_delta", "partial_json", fragment)
            case ToolCallEnd():
                return self._end()
            case Finished(reason, usage, stop_text):
                delta = {"stop_reason": _stop_reason(reason, stop_text), "stop_sequence": stop_text}
                last = _sse("message_delta", delta=delta, usage=_usage(usage))
                return [*self._end(), last, _sse("message_stop")]
            case Failed(error):
                return [Sse("error", dumps(error_body(error, self._request_id)))]
        return []

    def ping(self, progress: Progress | None) -> list[Sse]:
        return [_sse("ping", **progress_fields(progress))]

    def close(self) -> list[Sse]:
        return []

    def _delta(self, block: str, empty: dict[str, Any], kind: str, key: str, text: str) -> list[Sse]:
        opened = [] if self._block == block else [*self._end(), self._begin(block, empty)]
        if self._frame is None:
            delta = {"type": kind, key: Frame.HOLE}
            self._frame = Frame({"type": "content_block_delta", "index": self._index, "delta": delta})
        return [*opened, Sse("content_block_delta", self._frame.filled(text))]

    def _begin(self, block: str, empty: dict[str, Any]) -> Sse:
        self._index, self._block, self._frame = self._index + 1, block, None
        return _sse("content_block_start", index=self._index, content_block={"type": block, **empty})

    def _end(self) -> list[Sse]:
        """Ends the open block, if there is one; thinking is signed."""
        block, self._block = self._block, None
        if block is None:
            return []
        signature = {"type": "signature_delta", "signature": SIGNATURE}
        signed = [_sse("content_block_delta", index=self._index, delta=signature)] if block == "thinking" else []
        return [*signed, _sse("content_block_stop", index=self._index)]


def whole(request: GenerationRequest, request_id: str, created: int, events: Iterable[Event]) -> dict[str, Any]:
    """Returns the body of an answer that isn't streamed; raises the ApiError of one that failed."""
    answer = collect(events)
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": SIGNATURE})
    if answer.content:
        blocks.append({"type": "text", "text": answer.content})
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in answer.calls
    ]
    reason = _stop_reason(answer.reason, answer.stop_text)
    return _message(request, request_id, blocks, reason, answer.stop_text, answer.usage)


def _message(
    request: GenerationRequest,
    request_id: str,
    blocks: list[dict[str, Any]],
    reason: str | None,
    stop_text: str | None,
    usage: TokenUsage,
) -> dict[str, Any]:
    return {
        "id": f"msg_{request_id}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": blocks,
        "stop_reason": reason,
        "stop_sequence": stop_text,
        "usage": _usage(usage),
    }


def _stop_reason(reason: str, stop_text: str | None) -> str:
    if reason == "stop":
        return "end_turn" if stop_text is None else "stop_sequence"
    return {"length": "max_tokens", "tool_calls": "tool_use"}[reason]


def _usage(usage: TokenUsage) -> dict[str, Any]:
    """Returns the counts; here the input's don't hold the cached ones."""
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.n_cached,
        "output_tokens": usage.n_generated,
    }


def _sse(kind: str, **fields: Any) -> Sse:
    return Sse(kind, dumps({"type": kind, **fields}))
