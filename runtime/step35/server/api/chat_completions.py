"""OpenAI's chat completions: a request to what is asked, and events to chunks. Pure."""

from collections.abc import Iterable
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
)
from step35.chat.messages import Conversation, Message, Role, Tool, ToolCall
from step35.server.api import request_fields, request_limits
from step35.server.api.collected import collect
from step35.server.api.openai_errors import error_body
from step35.server.api.request_fields import OMITTED, Body, Count, SamplingBody, Whole
from step35.server.api.wire import Frame, dumps, progress_fields
from step35.server.errors import bad_request
from step35.server.events import Event, Failed, Progress, Sse
from step35.server.generation_request import GenerationRequest, JsonOutput

__all__ = ["REQUEST_BODY", "Writer", "error_body", "read", "whole"]

DONE = Sse(None, "[DONE]")
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class PartBody(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionBody(Body):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCallBody(Body):
    id: str | None = None
    function: FunctionBody


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[PartBody] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None


class DeclaredBody(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(Body):
    type: str = "function"
    function: DeclaredBody | None = None


class SchemaBody(Body):
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class FormatBody(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None


class StreamOptionsBody(Body):
    include_usage: bool | None = None


class ReasoningBody(Body):
    effort: str | None = None
    max_tokens: Count | None = None


class TemplateBody(Body):
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class ChatCompletionsRequest(SamplingBody):
    """The body of a chat completion."""

    messages: list[MessageBody] = Field(min_length=1)
    model: str | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: FormatBody | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=request_limits.MAX_LOGPROBS)
    n: Whole | None = None
    reasoning_effort: str | None = None
    reasoning_budget: Count | None = None
    reasoning: ReasoningBody | None = None
    chat_template_kwargs: TemplateBody | None = None
    functions: Any = None
    prompt_cache_key: str | None = None


REQUEST_BODY = ChatCompletionsRequest


def read(data: dict[str, Any]) -> GenerationRequest:
    """Returns what a request asks; raises ApiError that says what is wrong with it."""
    body = request_fields.parse(ChatCompletionsRequest, data)
    _check_served(body)
    tools = request_fields.check_tools(
        [_tool(entry.function, i) for i, entry in enumerate(body.tools or ()) if entry.function]
    )
    return GenerationRequest(
        prompt=Conversation(_messages(body.messages), tools),
        sampling=request_fields.sampling_of(body, has_tools=bool(tools)),
        n_predict=n_predict(body.max_completion_tokens, body.max_tokens),
        stop=request_fields.stops(body.stop),
        n_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tool_choice=request_fields.check_choice(_choice(body.tool_choice), tools),
        output=_output(body.response_format),
        effort=_effort(body),
        reasoning_budget=body.reasoning_budget or (body.reasoning and body.reasoning.max_tokens),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        stream=bool(body.stream),
        model=body.model or "",
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        has_seed=request_fields.has_seed(body),
        cache_key=body.prompt_cache_key,
    )


def _check_served(body: ChatCompletionsRequest) -> None:
    if body.n not in (None, 1):
        raise bad_request(
            f"more than one choice is not served: n expected 1, got {body.n}; send the request again", "n"
        )
    if body.functions:
        raise bad_request("functions are not served: expected tools, their successor, got functions", "functions")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs without logprobs: expected logprobs true, got false", "top_logprobs")
    request_limits.check_count("messages", body.messages, request_limits.MAX_MESSAGES, "messages")


def n_predict(*given: int | None) -> int:
    """Returns the first limit that is given; none, 0 and less fill the context."""
    first = next((n for n in given if n is not None), -1)
    return first if first > 0 else -1


def _messages(bodies: list[MessageBody]) -> tuple[Message, ...]:
    return tuple(_message(body, f"messages[{i}]") for i, body in enumerate(bodies))


def _message(body: MessageBody, where: str) -> Message:
    role = ROLES[body.role]
    reasoning = body.reasoning_content if body.reasoning_content is not None else body.reasoning
    return Message(
        role,
        text_of(body.content, f"{where}.content", omits=role == "tool"),
        reasoning if role == "assistant" else None,
        tuple(
            ToolCall(call.id or f"call_{i}", call.function.name, request_fields.arguments_text(call.function.arguments))
            for i, call in enumerate(body.tool_calls or ())
        ),
        body.tool_call_id,
        body.name,
    )


def text_of(content: str | list[PartBody] | None, where: str, omits: bool = False) -> str:
    """Returns a message's text; its parts are joined by newlines.

    `omits` says in words that a part is left out: what a tool once returned stays in the history, and refusing it
    would end the conversation for good.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        is_text = part.type in TEXT_PARTS
        if not (is_text or omits):
            raise bad_request(f"only text is served: {where}[{i}].type expected text, got {part.type[:40]!r}", where)
        texts.append(part.text or part.refusal or "" if is_text else OMITTED.format(part.type[:40]))
    return "\n".join(texts)


def _tool(body: DeclaredBody, i: int) -> Tool:
    return request_fields.tool(body.name, body.description, body.parameters, f"tools[{i}]")


def _choice(choice: str | dict[str, Any] | None) -> str:
    """Returns auto, none, required or function:NAME."""
    match choice:
        case None:
            return "auto"
        case "auto" | "none" | "required":
            return choice
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return f"function:{name}"
        case {"type": "allowed_tools"}:
            return "auto"
    raise bad_request("bad tool_choice: expected auto, none, required or a function's name", "tool_choice")


def _output(form: FormatBody | None) -> JsonOutput | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return JsonOutput()
    schema = form.json_schema and form.json_schema.json_schema
    if schema is None:
        raise bad_request(
            "no schema: response_format.json_schema.schema expected a JSON schema, got nothing", "response_format"
        )
    request_limits.check_schema_size(schema, "response_format")
    return JsonOutput(schema)


def _effort(body: ChatCompletionsRequest) -> str | None:
    """Returns the effort, wherever a client may put it; `enable_thinking` false is none."""
    extra, nested = body.chat_template_kwargs, body.reasoning
    if extra and extra.enable_thinking is False:
        return "none"
    said = (body.reasoning_effort, nested and nested.effort, extra and extra.reasoning_effort)
    return request_fields.effort_of(next((effort for effort in said if effort), None))


class Writer:
    """Writes an answer as a stream of chunks."""

    def __init__(self, request: GenerationRequest, request_id: str, created: int) -> None:
        self._request, self._request_id = request, request_id
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": request.model,
        }
        self._logprobs: list[Logprobs] = []
        self._frames = {key: Frame(self._body({key: Frame.HOLE})) for key in ("content", "reasoning_content")}

    def open(self) -> list[Sse]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def event(self, event: Event) -> list[Sse]:
        match event:
            case ReasoningDelta(text):
                return [self._text("reasoning_content", text)]
            case ContentDelta(text):
                return [self._text("content", text)]
            case ToolCallBegin(index, id_, name):
                function = {"name": name, "arguments": ""}
                return [
                    self._chunk({"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]})
                ]
            case ToolCallArguments(index, fragment):
                return [self._chunk({"tool_calls": [{"index": index, "function": {"arguments": fragment}}]})]
            case Logprobs():
                self._logprobs.append(event)
            case Finished(reason, usage):
                return [self._chunk({}, reason), *self._usage(usage)]
            case Failed(error):
                return [Sse(None, dumps(error_body(error, self._request_id)))]
        return []

    def ping(self, progress: Progress | None) -> list[Sse]:
        """An empty delta, with how far the prompt is."""
        return [Sse(None, dumps({**self._body({}), **progress_fields(progress)}))]

    def close(self) -> list[Sse]:
        return [DONE]

    def _text(self, key: str, text: str) -> Sse:
        return self._chunk({key: text}) if self._logprobs else Sse(None, self._frames[key].filled(text))

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> Sse:
        return Sse(None, dumps(self._body(delta, reason)))

    def _body(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and (delta or reason):
            logprobs, self._logprobs = {"content": [_logprobs(entry) for entry in self._logprobs]}, []
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def _usage(self, usage: TokenUsage) -> list[Sse]:
        if not self._request.include_usage:
            return []
        return [Sse(None, dumps({**self._head, "choices": [], "usage": usage_body(usage)}))]


def whole(request: GenerationRequest, request_id: str, created: int, events: Iterable[Event]) -> dict[str, Any]:
    """Returns the body of an answer that isn't streamed; raises the ApiError of one that failed."""
    answer = collect(events)
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.calls
    ]
    message = {
        "role": "assistant",
        "content": answer.content or (None if calls else ""),
        **({"reasoning_content": answer.reasoning} if answer.reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }
    logprobs = {"content": [_logprobs(entry) for entry in answer.logprobs]} if request.n_logprobs is not None else None
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}
    head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "created": created, "model": request.model}
    return {**head, "choices": [choice], "usage": usage_body(answer.usage)}


def usage_body(usage: TokenUsage) -> dict[str, Any]:
    """Returns the counts as chat completions and completions write them."""
    return {
        "prompt_tokens": usage.n_prompt,
        "completion_tokens": usage.n_generated,
        "total_tokens": usage.n_prompt + usage.n_generated,
        "prompt_tokens_details": {"cached_tokens": usage.n_cached},
        "completion_tokens_details": {"reasoning_tokens": usage.n_reasoning},
    }


def _logprobs(entry: Logprobs) -> dict[str, Any]:
    return {**_token(entry.chosen), "top_logprobs": [_token(token) for token in entry.top]}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.piece)}
