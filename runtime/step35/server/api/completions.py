"""OpenAI's completions: a text is continued as it is, without a template. Pure."""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from pydantic import Field

from step35.chat.events import ContentDelta, Finished, Logprobs
from step35.server.api import request_fields, request_limits
from step35.server.api.chat_completions import DONE, StreamOptionsBody, usage_body
from step35.server.api.collected import collect
from step35.server.api.openai_errors import error_body
from step35.server.api.request_fields import SamplingBody, Whole
from step35.server.api.wire import Frame, dumps, progress_fields
from step35.server.errors import bad_request
from step35.server.events import Event, Failed, Progress, Sse
from step35.server.generation_request import GenerationRequest

__all__ = ["REQUEST_BODY", "Writer", "error_body", "read", "whole"]

DEFAULT_TOKENS = 16


class CompletionsRequest(SamplingBody):
    """The body of a completion."""

    prompt: str | list[int] | list[str] | list[list[int]]
    model: str | None = None
    max_tokens: Whole | None = DEFAULT_TOKENS
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    logprobs: Whole | None = Field(None, ge=0, le=request_limits.MAX_LOGPROBS)
    echo: bool | None = None
    n: Whole | None = None
    best_of: Whole | None = None
    suffix: str | None = None
    prompt_cache_key: str | None = None


REQUEST_BODY = CompletionsRequest


def read(data: dict[str, Any]) -> GenerationRequest:
    """Returns what a request asks; raises ApiError that says what is wrong with it."""
    body = request_fields.parse(CompletionsRequest, data)
    _check_served(body)
    return GenerationRequest(
        prompt=_prompt(body.prompt),
        sampling=request_fields.sampling_of(body, has_tools=False),
        n_predict=-1 if body.max_tokens is None or body.max_tokens < 0 else body.max_tokens,
        stop=request_fields.stops(body.stop),
        n_logprobs=body.logprobs,
        tool_choice="none",
        stream=bool(body.stream),
        model=body.model or "",
        echo=bool(body.echo),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        has_seed=request_fields.has_seed(body),
        cache_key=body.prompt_cache_key,
    )


def _check_served(body: CompletionsRequest) -> None:
    for name in ("n", "best_of"):
        if (n := getattr(body, name)) not in (None, 1):
            raise bad_request(
                f"more than one choice is not served: {name} expected 1, got {n}; send the request again", name
            )
    if body.suffix:
        raise bad_request("suffix is not served: this model doesn't fill in the middle", "suffix")
    if body.echo and body.logprobs is not None:
        raise bad_request("echo with logprobs is not served: a prompt's log-probabilities aren't kept", "echo")


def _prompt(prompt: str | list[Any]) -> str | tuple[int, ...]:
    """Returns the one prompt, as text or token ids."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) != 1:
            raise bad_request(f"more than one prompt is not served: prompt expected 1, got {len(prompt)}", "prompt")
        prompt = prompt[0]
    if not prompt:
        raise bad_request("empty prompt: prompt expected a text or token ids, got none", "prompt")
    return prompt if isinstance(prompt, str) else tuple(prompt)


class Writer:
    """Writes a completion as a stream of chunks. A prompt's echo comes from the caller, as content."""

    def __init__(self, request: GenerationRequest, request_id: str, created: int) -> None:
        self._request, self._request_id = request, request_id
        self._head = _head(request, request_id, created)
        self._logprobs: list[Logprobs] = []
        self._n_chars = 0
        self._frame = Frame(self._body(Frame.HOLE, None, None))

    def open(self) -> list[Sse]:
        return []

    def event(self, event: Event) -> list[Sse]:
        match event:
            case ContentDelta(text):
                return [self._chunk(text) if self._logprobs else Sse(None, self._frame.filled(text))]
            case Logprobs():
                self._logprobs.append(event)
            case Finished(reason, usage):
                last = {**self._head, "choices": [], "usage": usage_body(usage)}
                return [self._chunk("", reason), *([Sse(None, dumps(last))] if self._request.include_usage else [])]
            case Failed(error):
                return [Sse(None, dumps(error_body(error, self._request_id)))]
        return []

    def ping(self, progress: Progress | None) -> list[Sse]:
        """An empty text, with how far the prompt is."""
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
        return [Sse(None, dumps({**self._head, "choices": [choice], **progress_fields(progress)}))]

    def close(self) -> list[Sse]:
        return [DONE]

    def _chunk(self, text: str, reason: str | None = None) -> Sse:
        logprobs = _logprobs(self._logprobs, self._n_chars) if self._logprobs else None
        self._n_chars += sum(len(entry.chosen.text) for entry in self._logprobs)
        self._logprobs = []
        return Sse(None, dumps(self._body(text, logprobs, reason)))

    def _body(self, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": _reason(reason)}
        return {**self._head, "choices": [choice]}


def whole(request: GenerationRequest, request_id: str, created: int, events: Iterable[Event]) -> dict[str, Any]:
    """Returns the body of a completion that isn't streamed; raises the ApiError of one that failed."""
    answer = collect(events)
    logprobs = _logprobs(answer.logprobs, 0) if request.n_logprobs is not None else None
    choice = {"index": 0, "text": answer.content, "logprobs": logprobs, "finish_reason": _reason(answer.reason)}
    return {**_head(request, request_id, created), "choices": [choice], "usage": usage_body(answer.usage)}


def _head(request: GenerationRequest, request_id: str, created: int) -> dict[str, Any]:
    return {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": request.model}


def _reason(reason: str | None) -> str | None:
    return "stop" if reason == "tool_calls" else reason


def _logprobs(entries: list[Logprobs], offset: int) -> dict[str, list[Any]]:
    texts = [entry.chosen.text for entry in entries]
    return {
        "tokens": texts,
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        "top_logprobs": [{token.text: token.logprob for token in entry.top} for entry in entries],
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
    }
