"""What the APIs' requests have in common: checked fields, sampling, tools, and errors of one line."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from step35.chat.messages import Tool
from step35.errors import SettingsError
from step35.sampling.sampler import Sampling
from step35.server.api import request_limits
from step35.server.api.sampling_presets import Preset, shipped_presets
from step35.server.errors import ApiError, bad_request

_B = TypeVar("_B", bound=BaseModel)
_V = TypeVar("_V")
_NAME = re.compile(rf"[^\s<>\"'={{}}]{{1,{request_limits.MAX_NAME}}}")
EFFORTS = {
    "none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high",
}  # fmt: skip
OMITTED = "[{} omitted: this model reads text only]"
_SHOWN = 80


def _whole(value: Any) -> Any:
    """Takes 5.0 for 5: some languages know no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, le=2**31)]


class Body(BaseModel):
    """A part of a request. Fields nobody here reads are let through: clients send many.

    A value of another type is an error, as with OpenAI: a number is no text of digits, and true is no number.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


class SamplingBody(Body):
    """The fields about sampling that the APIs share, beyond OpenAI's what llama.cpp's server has."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None


def parse(model: type[_B], body: Any) -> _B:
    """Returns a request's body as its model; raises ApiError 400 that says what was wanted and got."""
    if not isinstance(body, dict):
        raise bad_request(f"bad request: the body expected a JSON object, got {_shown(body)}")
    request_limits.check_shape(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _one_line(error, body) from None


def _one_line(error: ValidationError, body: Any) -> ApiError:
    """Of the errors, the one that got furthest: for a field of several kinds that is the kind that was meant."""
    worst = max(error.errors(include_url=False, include_context=False), key=lambda entry: len(entry["loc"]))
    is_missing = worst["type"] == "missing"
    path = _path(worst["loc"], body, is_missing)
    want = worst["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = "nothing" if is_missing else _shown(worst["input"])
    return bad_request(f"bad request: {path} expected {want}, got {got}", path)


def _path(loc: Sequence[int | str], body: Any, is_missing: bool) -> str:
    """Returns where an error is, without pydantic's names of a union's branches, which are no keys."""
    path, place = "", body
    for key in loc:
        if isinstance(key, int) and isinstance(place, list):
            path, place = f"{path}[{key}]", place[key] if key < len(place) else None
        elif isinstance(place, dict) and (key in place or is_missing):
            path, place = f"{path}.{key}" if path else str(key), place.get(key)
    return path


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def sampling_of(body: SamplingBody, *, has_tools: bool) -> Sampling:
    """Returns how tokens are chosen: what the client says, else the preset for chat or for work with tools."""
    presets = shipped_presets()
    preset: Preset = presets.agent if has_tools else presets.chat
    if body.logit_bias:
        request_limits.check_count("biases", list(body.logit_bias), request_limits.MAX_BIASES, "logit_bias")
    try:
        return Sampling(
            temperature=_or(body.temperature, preset.temperature),
            top_p=_or(body.top_p, preset.top_p),
            top_k=_or(body.top_k, 0),
            min_p=_or(body.min_p, 0.0),
            seed=_seed(body) or 0,
            repeat_penalty=_or(body.repeat_penalty, _or(body.repetition_penalty, 1.0)),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            logit_bias=body.logit_bias or {},
        )
    except SettingsError as error:
        raise bad_request(str(error)) from error


def _or(value: _V | None, default: _V) -> _V:
    return default if value is None else value


def has_seed(body: SamplingBody) -> bool:
    """Whether the client chose a seed; -1 asks for any, as with llama.cpp."""
    return _seed(body) is not None


def _seed(body: SamplingBody) -> int | None:
    return None if body.seed is None or body.seed == -1 else body.seed % 2**64


def stops(stop: str | Iterable[str] | None, param: str = "stop") -> tuple[str, ...]:
    """Returns the stop strings, none of them empty."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    request_limits.check_count("stop strings", texts, request_limits.MAX_STOPS, param)
    if (longest := max(map(len, texts), default=0)) > request_limits.MAX_STOP_CHARS:
        raise bad_request(
            f"stop string too long: expected at most {request_limits.MAX_STOP_CHARS} characters, got {longest}", param
        )
    return tuple(text for text in texts if text)


def tool(name: str, description: str | None, parameters: dict[str, Any] | None, param: str) -> Tool:
    """Returns a declared tool; its name must be one that can stand in a tag."""
    if not _NAME.fullmatch(name):
        want = f"1 to {request_limits.MAX_NAME} characters without white space, quotes, braces, = and angle brackets"
        raise bad_request(f"bad tool name: {param} expected {want}, got {_shown(name)}", param)
    request_limits.check_schema_size(parameters or {}, param)
    return Tool(name, description or "", parameters or {"type": "object", "properties": {}})


def check_tools(tools: Sequence[Tool], param: str = "tools") -> tuple[Tool, ...]:
    """Refuses too many tools and a name that is given twice."""
    request_limits.check_count("tools", tools, request_limits.MAX_TOOLS, param)
    names = [entry.name for entry in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise bad_request(f"tool declared twice: {param} expected one {twice}, got {names.count(twice)}", param)
    return tuple(tools)


def check_choice(choice: str, tools: Sequence[Tool], param: str = "tool_choice") -> str:
    """Returns the tool choice if there are tools for it."""
    name = choice.removeprefix("function:")
    if choice == "required" and not tools:
        raise bad_request(f"{param} required: expected tools, got none", param)
    if name != choice and name not in {entry.name for entry in tools}:
        known = ", ".join(entry.name for entry in tools[:20]) or "none"
        raise bad_request(
            f"unknown tool: {param} expected one of the declared tools ({known}), got {_shown(name)}", param
        )
    return choice


def effort_of(effort: str | None, param: str = "reasoning_effort") -> str | None:
    """Returns none, low, medium or high; other APIs' finer steps count as the nearest."""
    if effort is not None and effort not in EFFORTS:
        raise bad_request(f"bad effort: {param} expected one of {', '.join(EFFORTS)}, got {_shown(effort)}", param)
    return EFFORTS[effort] if effort else None


def arguments_text(arguments: Any) -> str:
    """Returns a call's arguments as JSON text; some clients send the object itself."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
