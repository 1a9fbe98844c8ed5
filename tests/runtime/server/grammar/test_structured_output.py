"""Structured output and budgets of reasoning on the bundled model: the same answers whatever is drafted."""

import json
from functools import cache
from itertools import count
from typing import Any

import pytest

from narrowed import present
from real_engine import open_engine
from server_fakes import answer, serve
from step35.chat.collected import Collected
from step35.options import EngineOptions
from step35.server.api import chat_completions
from step35.server.api.collected import collect
from step35.server.policy import Limits
from step35.server.service import Service, Serving
from tiny_model import tiny_gguf

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "n", "ok"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "write", "parameters": SCHEMA}}
BODIES: dict[str, dict[str, Any]] = {
    "schema": {"response_format": FORM, "reasoning_effort": "none"},
    "schema after reasoning": {"response_format": FORM, "reasoning_budget": 24},
    "call": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "reasoning_effort": "none"},
    "call after reasoning": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "reasoning_budget": 24},
    "schema at temperature 1": {"response_format": FORM, "reasoning_budget": 24, "temperature": 1, "seed": 5},
}  # fmt: skip
HELLO = [{"role": "user", "content": "Hello, how are you? Say it as JSON, and say it again."}]


@cache
def answers(draft: str) -> tuple[dict[str, Collected], int]:
    """Returns the answers to all bodies, and how many tokens were drafted for them."""
    options = EngineOptions(
        tiny_gguf("F32"), draft=draft, n_ctx=2048, n_batch=64, n_sessions=2, n_threads=1, kv_type="f32"
    )

    async def talk(service: Service) -> tuple[dict[str, Collected], int]:
        found, n_drafted = {}, 0
        for name, body in BODIES.items():
            request = chat_completions.read({"messages": HELLO, "max_tokens": 200, "temperature": 0, **body})
            job, events = await answer(service, request, name)
            found[name] = collect(events)
            n_drafted += present(job.status.run).turn.stats.n_drafted
        return found, n_drafted

    ticks = count()  # every decode takes as long: what is drafted doesn't depend on the machine, and is much
    return serve(
        Service(Serving("tiny", Limits(1, 8)), lambda: open_engine(options, clock=lambda: float(next(ticks)))), talk
    )


def said(answer: Collected) -> tuple[Any, ...]:
    calls = [(call.name, call.arguments) for call in answer.calls]
    return answer.reasoning, answer.content, calls, answer.reason, answer.usage.n_generated


@pytest.mark.parametrize("draft", ["auto", "3", "ngram"])
def test_structured_output_is_the_same_whatever_is_drafted(draft: str):
    plain, (drafted, n_drafted) = answers("off")[0], answers(draft)
    assert {name: said(entry) for name, entry in drafted.items()} == {
        name: said(entry) for name, entry in plain.items()
    }
    assert n_drafted > 0, "there is something to compare"


@pytest.mark.parametrize("draft", ["off", "auto", "3"])
@pytest.mark.parametrize("name", BODIES)
def test_it_keeps_to_the_schema_once_the_reasoning_has_ended(draft: str, name: str):
    found = answers(draft)[0][name]
    assert found.reason in (("tool_calls", "length") if "call" in name else ("stop", "length"))
    text = found.calls[0].arguments if "call" in name else found.content
    if found.reason != "length":
        body = json.loads(text)
        assert list(body) == ["name", "n", "ok"] and [type(value) for value in body.values()] == [str, int, bool]
    assert found.usage.n_reasoning <= 24 + 4, "the end of the reasoning has a few tokens itself"
