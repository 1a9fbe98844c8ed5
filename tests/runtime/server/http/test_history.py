"""Histories as each API's clients send them back over HTTP: every turn is known again, and nothing is decoded twice."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from live_server import LiveServer, conversation_log
from tiny_model import tiny_gguf

FLAGS = ("--ctx", "8192", "--batch", "64", "--threads", "1", "--parallel", "1", "--kv-type", "f32")
SCHEMA = {"type": "object", "properties": {"path": {"type": "string", "enum": ["a", "b"]}, "n": {"type": "integer"}}, "required": ["path"]}  # fmt: skip
N_TURNS = 5
Take = Callable[[dict[str, Any], int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(tiny_gguf("F32"), *FLAGS) as live:
        yield live.ready()


def respelt(arguments: str) -> str:
    """As a client that parses the JSON and writes it anew, in another order."""
    return json.dumps(dict(reversed(json.loads(arguments).items())), indent=1)


# each returns what a client adds to its history after an answer: the turn and its tool's result


def chat_kept(answer: dict, turn: int) -> list[dict]:
    message = answer["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"{turn}"} for call in message["tool_calls"]]
    return [message, *results]


def chat_dropped_and_respelt(answer: dict, turn: int) -> list[dict]:
    message, *results = chat_kept(answer, turn)
    calls = [
        call | {"function": call["function"] | {"arguments": respelt(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return [{"role": "assistant", "content": message["content"], "tool_calls": calls}, *results]


def responses_kept(answer: dict, turn: int) -> list[dict]:
    calls = [item["call_id"] for item in answer["output"] if item["type"] == "function_call"]
    return answer["output"] + [{"type": "function_call_output", "call_id": call, "output": f"{turn}"} for call in calls]


def responses_dropped(answer: dict, turn: int) -> list[dict]:
    return [item for item in responses_kept(answer, turn) if item["type"] != "reasoning"]


def messages_kept(answer: dict, turn: int) -> list[dict]:
    calls = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call, "content": f"{turn}"} for call in calls]
    return [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": results}]


def messages_dropped(answer: dict, turn: int) -> list[dict]:
    said, results = messages_kept(answer, turn)
    return [said | {"content": [block for block in said["content"] if block["type"] != "thinking"]}, results]


FUNCTION = {"name": "read", "description": "Reads.", "parameters": SCHEMA}
BODIES = {
    "/v1/chat/completions": ("messages", {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "max_tokens": 400}),
    "/v1/responses": ("input", {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", "max_output_tokens": 400}),
    "/v1/messages": ("messages", {"tools": [{"name": "read", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}, "max_tokens": 400}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "take"),
    [
        ("/v1/chat/completions", chat_kept), ("/v1/chat/completions", chat_dropped_and_respelt), ("/v1/responses", responses_kept),
        ("/v1/responses", responses_dropped), ("/v1/messages", messages_kept), ("/v1/messages", messages_dropped),
    ],
)  # fmt: skip
def test_a_tool_loop_is_decoded_once(server: LiveServer, path: str, take: Take):
    key, body = BODIES[path]
    history: list[dict[str, Any]] = [{"role": "user", "content": f"Read a and b, {take.__name__}."}]
    n_before = len(answers(server))
    for turn in range(N_TURNS):
        status, answer = server.post(path, {**body, key: history, "temperature": 0, "reasoning_budget": 30})
        assert status == 200, answer
        history += take(answer, turn)
    server.wait(lambda: len(answers(server)) == n_before + N_TURNS)
    lines = answers(server)[n_before:]
    for turn, (before, line) in enumerate(itertools.pairwise(lines), 1):
        assert line["n_turns_known"] == line["n_turns"] == turn
        assert line["n_cached"] >= before["n_prompt"] + before["n_generated"] - 2, "all but the turn's last tokens"


def answers(server: LiveServer) -> list[dict[str, Any]]:
    return [line for line in conversation_log(server.lines) if "n_generated" in line]
