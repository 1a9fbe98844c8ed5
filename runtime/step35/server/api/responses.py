"""OpenAI's Responses, stateless, as coding agents send it: a request to what is asked, and events to items. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from step35.chat.events import (
    ContentDelta,
    Finished,
    Logprobs,
    ReasoningDelta,
    TokenText,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.server.api import request_fields, request_limits
from step35.server.api.chat_completions import PartBody, text_of
from step35.server.api.collected import collect
from step35.server.api.openai_errors import error_body
from step35.server.api.request_fields import Body, Count, SamplingBody, Whole
from step35.server.api.wire import Frame, dumps, progress_fields
from step35.server.errors import bad_request
from step35.server.events import Event, Failed, Progress, Sse
from step35.server.generation_request import GenerationRequest, JsonOutput

__all__ = ["REQUEST_BODY", "Writer", "error_body", "read", "whole"]


class ItemBody(Body):
    """One item of the input; which fields it has depends on its type."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[PartBody] | None = None
    summary: list[PartBody] | None = None
    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    call_id: str | None = None
    output: str | list[PartBody] | None = None


class ToolBody(Body):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ReasoningBody(Body):
    effort: str | None = None


class FormatBody(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class TextBody(Body):
    format: FormatBody | None = None


class ResponsesRequest(SamplingBody):
    """The body of a response's creation."""

    input: str | list[ItemBody]
    model: str | None = None
    instructions: str | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    reasoning_budget: Count | None = None
    text: TextBody | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=request_limits.MAX_LOGPROBS)
    include: list[str] | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    prompt_cache_key: str | None = None


REQUEST_BODY = ResponsesRequest


def read(data: dict[str, Any]) -> GenerationRequest:
    """Returns what a request asks; raises ApiError that says what is wrong with it."""
    body = request_fields.parse(ResponsesRequest, data)
    _check_served(body)
    functions = [(i, entry) for i, entry in enumerate(body.tools or ()) if entry.type == "function"]
    tools = request_fields.check_tools([_tool(entry, i) for i, entry in functions])
    return GenerationRequest(
        prompt=Conversation(_messages(body), tools),
        sampling=request_fields.sampling_of(body, has_tools=bool(tools)),
        n_predict=body.max_output_tokens or -1,
        n_logprobs=_n_logprobs(body),
        tool_choice=request_fields.check_choice(_choice(body.tool_choice), tools),
        output=_output(body.text),
        effort=request_fields.effort_of(body.reasoning.effort if body.reasoning else None, "reasoning.effort"),
        reasoning_budget=body.reasoning_budget,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        stream=bool(body.stream),
        model=body.model or "",
        has_seed=request_fields.has_seed(body),
        cache_key=body.prompt_cache_key,
    )


def _check_served(body: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise bad_request(f"{name} is not served: nothing is stored here; send the whole input each time", name)
    if body.background:
        raise bad_request("background is not served: expected false, got true; stream instead", "background")


def _n_logprobs(body: ResponsesRequest) -> int | None:
    is_wanted = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
    return (body.top_logprobs or 0) if is_wanted else None


def _tool(body: ToolBody, i: int) -> Tool:
    return request_fields.tool(body.name or "", body.description, body.parameters, f"tools[{i}]")


def _choice(choice: str | dict[str, Any] | None) -> str:
    """Returns auto, none, required or function:NAME; a choice among tools that aren't served is auto."""
    match choice:
        case "none" | "required":
            return choice
        case {"type": "function", "name": str(name)}:
            return f"function:{name}"
        case None | "auto" | {"type": str()}:
            return "auto"
    raise bad_request("bad tool_choice: expected auto, none, required or a function's name", "tool_choice")


def _output(text: TextBody | None) -> JsonOutput | None:
    form = text and text.format
    if not form or form.type == "text":
        return None
    if form.type == "json_object":
        return JsonOutput()
    if form.json_schema is None:
        raise bad_request("no schema: text.format.schema expected a JSON schema, got nothing", "text")
    request_limits.check_schema_size(form.json_schema, "text")
    return JsonOutput(form.json_schema)


# input items to messages


@dataclass(slots=True)
class _Turn:
    """An assistant's turn while its items come: reasoning, then text, then calls."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def has_answer(self) -> bool:
        return bool(self.content or self.calls)

    def message(self) -> list[Message]:
        if not (self.reasoning or self.has_answer):
            return []
        reasoning = "\n".join(self.reasoning) if self.reasoning else None
        return [Message("assistant", "\n".join(self.content), reasoning, tuple(self.calls))]


def _messages(body: ResponsesRequest) -> tuple[Message, ...]:
    messages = [Message("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return (*messages, Message("user", body.input))
    request_limits.check_count("input items", body.input, request_limits.MAX_MESSAGES, "input")
    turn = _Turn()
    for i, item in enumerate(body.input):
        if _begins_turn(item, turn):
            messages += turn.message()
            turn = _Turn()
        messages += _take(item, turn, f"input[{i}]")
    messages += turn.message()
    if not messages:
        raise bad_request("empty input: input expected a message, got none", "input")
    return tuple(messages)


def _begins_turn(item: ItemBody, turn: _Turn) -> bool:
    """Whether an item can't belong to the assistant's turn so far."""
    match item.type:
        case "message":
            return item.role != "assistant" or bool(turn.calls)
        case "reasoning":
            return turn.has_answer
        case "function_call_output":
            return True
    return False


def _take(item: ItemBody, turn: _Turn, where: str) -> list[Message]:
    """Adds an item to the assistant's turn, or returns it as a message; items of unknown types are left out."""
    match item.type:
        case "message" if item.role == "assistant":
            turn.content.append(text_of(item.content, f"{where}.content"))
        case "message":
            if item.role is None:
                raise bad_request(f"bad request: {where}.role expected a role, got nothing", where)
            role = "user" if item.role == "user" else "system"
            return [Message(role, text_of(item.content, f"{where}.content"))]
        case "reasoning":
            parts = item.content if isinstance(item.content, list) and item.content else item.summary or ()
            turn.reasoning += [part.text for part in parts if part.text]
        case "function_call":
            call_id, name = item.call_id or f"call_{len(turn.calls)}", item.name or ""
            turn.calls.append(ToolCall(call_id, name, request_fields.arguments_text(item.arguments)))
        case "function_call_output":
            return [Message("tool", text_of(item.output, f"{where}.output", omits=True), tool_call_id=item.call_id)]
        case "item_reference":
            raise bad_request(
                f"item_reference is not served: {where} refers to what isn't stored; send the item", where
            )
    return []


# events to items


@dataclass(slots=True)
class _Item:
    """The output item that is open: its text so far, and where it is."""

    kind: str
    body: dict[str, Any]
    index: int
    pieces: list[str] = field(default_factory=list)
    frame: Frame | None = None
    """Of its deltas, but for their type and number, once there was one."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Writer:
    """Writes an answer as a stream of numbered events, one output item open at a time."""

    def __init__(self, request: GenerationRequest, request_id: str, created: int) -> None:
        self._request, self._request_id, self._created = request, request_id, created
        self._n_sent = 0
        self._done: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self._logprobs: list[dict[str, Any]] = []
        self._new_logprobs: list[dict[str, Any]] = []

    def open(self) -> list[Sse]:
        begun = self._response("in_progress")
        return [self._sse("response.created", response=begun), self._sse("response.in_progress", response=begun)]

    def ping(self, progress: Progress | None) -> list[Sse]:
        response = self._response("in_progress")
        return [self._sse("response.in_progress", response=response, **progress_fields(progress))]

    def event(self, event: Event) -> list[Sse]:
        match event:
            case ReasoningDelta(text):
                return self._text("reasoning", "response.reasoning_text.delta", text)
            case ContentDelta(text):
                logprobs, self._new_logprobs = self._new_logprobs, []
                return self._text("message", "response.output_text.delta", text, logprobs=logprobs)
            case ToolCallBegin(_, id_, name):
                ended = self._end()
                return [*ended, *self._begin("function_call", call_id=id_, name=name, arguments="")]
            case ToolCallArguments(_, fragment):
                return [self._delta("response.function_call_arguments.delta", fragment)]
            case ToolCallEnd():
                return self._end()
            case Logprobs():
                self._new_logprobs.append(_logprobs(event))
                self._logprobs.append(self._new_logprobs[-1])
            case Finished(reason, usage):
                return self._finish(reason, usage)
            case Failed(error):
                failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
                return [self._sse("response.failed", response=failed)]
        return []

    def close(self) -> list[Sse]:
        return []

    def _finish(self, reason: str, usage: TokenUsage) -> list[Sse]:
        is_cut = reason == "length"
        ended = self._end("incomplete" if is_cut else "completed")
        status = "incomplete" if is_cut else "completed"
        return [*ended, self._sse(f"response.{status}", response=self._response(status, usage))]

    def _response(self, status: str, usage: TokenUsage | None = None) -> dict[str, Any]:
        return _response(self._request, self._request_id, self._created, status, list(self._done), usage)

    def _text(self, kind: str, event: str, text: str, **extra: Any) -> list[Sse]:
        opened = [] if self._item and self._item.kind == kind else [*self._end(), *self._begin(kind)]
        return [*opened, self._delta(event, text, content_index=0, **extra)]

    def _delta(self, event: str, text: str, **extra: Any) -> Sse:
        item = self._item
        assert item
        item.pieces.append(text)
        if extra.get("logprobs"):
            return self._sse(event, **self._place(), delta=text, **extra)
        if item.frame is None:
            item.frame = Frame({**self._place(), "delta": Frame.HOLE, **extra})
        number, self._n_sent = self._n_sent, self._n_sent + 1
        return Sse(event, f'{{"type":"{event}","sequence_number":{number},{item.frame.filled(text)[1:]}')

    def _place(self) -> dict[str, Any]:
        assert self._item
        return {"item_id": self._item.body["id"], "output_index": self._item.index}

    def _begin(self, kind: str, **fields: Any) -> list[Sse]:
        index = len(self._done)
        body = _item(kind, self._request_id, index, status="in_progress", **fields)
        self._item = _Item(kind, body, index)
        added = [self._sse("response.output_item.added", output_index=index, item=body)]
        if kind != "function_call":
            part = _part(kind, "", [])
            added.append(self._sse("response.content_part.added", **self._place(), content_index=0, part=part))
        return added

    def _end(self, status: str = "completed") -> list[Sse]:
        """Ends the open item, if there is one."""
        item = self._item
        if item is None:
            return []
        body, done = self._ended(item, status)
        self._done.append(body)
        done.append(self._sse("response.output_item.done", output_index=item.index, item=body))
        self._item = None
        return done

    def _ended(self, item: _Item, status: str) -> tuple[dict[str, Any], list[Sse]]:
        place = self._place()
        if item.kind == "function_call":
            body = item.body | {"arguments": item.text, "status": status}
            named = {"name": item.body["name"], "arguments": item.text}
            return body, [self._sse("response.function_call_arguments.done", **place, **named)]
        is_message = item.kind == "message"
        logprobs = self._logprobs if is_message else []
        part = _part(item.kind, item.text, logprobs)
        event = "response.output_text.done" if is_message else "response.reasoning_text.done"
        extra = {"logprobs": logprobs} if is_message else {}
        return item.body | {"content": [part], "status": status}, [
            self._sse(event, **place, content_index=0, text=item.text, **extra),
            self._sse("response.content_part.done", **place, content_index=0, part=part),
        ]

    def _sse(self, kind: str, **fields: Any) -> Sse:
        number, self._n_sent = self._n_sent, self._n_sent + 1
        return Sse(kind, dumps({"type": kind, "sequence_number": number, **fields}))


def whole(request: GenerationRequest, request_id: str, created: int, events: Iterable[Event]) -> dict[str, Any]:
    """Returns the body of an answer that isn't streamed; raises the ApiError of one that failed."""
    answer = collect(events)
    status = "incomplete" if answer.reason == "length" else "completed"
    items: list[dict[str, Any]] = []
    for kind, text in (("reasoning", answer.reasoning), ("message", answer.content)):
        if text:
            part = _part(kind, text, [_logprobs(entry) for entry in answer.logprobs] if kind == "message" else [])
            items.append(_item(kind, request_id, len(items), status=status, content=[part]))
    for call in answer.calls:
        fields = {"call_id": call.id, "name": call.name, "arguments": call.arguments, "status": status}
        items.append(_item("function_call", request_id, len(items), **fields))
    return _response(request, request_id, created, status, items, answer.usage)


def _item(kind: str, request_id: str, index: int, **fields: Any) -> dict[str, Any]:
    prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
    own = {"reasoning": {"summary": [], "content": []}, "message": {"role": "assistant", "content": []}}.get(kind, {})
    return {"id": f"{prefix}_{request_id}_{index}", "type": kind, **own, **fields}


def _part(kind: str, text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _response(
    request: GenerationRequest,
    request_id: str,
    created: int,
    status: str,
    items: list[dict[str, Any]],
    usage: TokenUsage | None,
) -> dict[str, Any]:
    tools = request.prompt.tools if isinstance(request.prompt, Conversation) else ()
    name = request.tool_choice.removeprefix("function:")
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "model": request.model,
        "output": items,
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": request.effort, "summary": None},
        "store": False,
        "temperature": request.sampling.temperature,
        "tool_choice": request.tool_choice if name == request.tool_choice else {"type": "function", "name": name},
        "tools": [_tool_body(tool) for tool in tools],
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
        "usage": _usage(usage) if usage else None,
    }


def _tool_body(tool: Tool) -> dict[str, Any]:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", **fields, "strict": False}


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.n_prompt,
        "input_tokens_details": {"cached_tokens": usage.n_cached, "cache_write_tokens": 0},
        "output_tokens": usage.n_generated,
        "output_tokens_details": {"reasoning_tokens": usage.n_reasoning},
        "total_tokens": usage.n_prompt + usage.n_generated,
    }


def _logprobs(entry: Logprobs) -> dict[str, Any]:
    return {**_token(entry.chosen), "top_logprobs": [_token(token) for token in entry.top]}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.piece), "logprob": token.logprob}
