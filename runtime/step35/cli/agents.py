"""Agents in front of this server: their settings, and a tool call there and back in the API that each speaks. Pure."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step35.errors import Step35Error

KEY_NAME = "STEP35_API_KEY"
PATIENCE_MS = 3_600_000
"""How long a client waits for the next event; a ping comes every few seconds."""
QUESTION = "What is the temperature outside? Ask the thermometer."
TOOL = "read_thermometer"
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    "required": ["unit"],
}
ABOUT = "Reads the thermometer outside."
READING = "21 degrees"
MAX_TOKENS = 256

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Posts a body to a path of the server and returns the answer's."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server as a client needs to know it."""

    url: str
    model: str
    n_ctx: int
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """A file of the client's settings, its path from the home folder, and how to start the client with it."""

    path: Path
    text: str
    command: str


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A call of a tool and the turn after its result: that turn's prompt, and what of it was cached."""

    arguments: dict[str, Any]
    n_prompt: int
    n_cached: int


def codex_settings(server: Server) -> Settings:
    """Codex: a profile of its own, which `--profile` lays over config.toml."""
    top = {"model": server.model, "model_provider": "step35", "model_context_window": server.n_ctx}
    provider = {
        "name": "step35", "base_url": f"{server.url}/v1", "wire_api": "responses",
        "stream_idle_timeout_ms": PATIENCE_MS, **({"env_key": KEY_NAME} if server.api_key else {}),
    }  # fmt: skip
    text = f"{_toml(top)}\n[model_providers.step35]\n{_toml(provider)}"
    key = f"{KEY_NAME}=... " if server.api_key else ""
    return Settings(Path(".codex/step35.config.toml"), text, f"{key}codex --profile step35")


def claude_settings(server: Server) -> Settings:
    """Claude Code: a settings file whose environment names the server and one model for every size."""
    sizes = (f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU"))
    models = ("ANTHROPIC_MODEL", *sizes, "CLAUDE_CODE_SUBAGENT_MODEL")
    environment = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.api_key or "none",
        **dict.fromkeys(models, server.model),
        "API_TIMEOUT_MS": str(PATIENCE_MS),
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    path = Path(".claude/step35.json")
    return Settings(path, _json({"env": environment}), f"claude --settings {_from_home(path)}")


def opencode_settings(server: Server) -> Settings:
    """opencode: a configuration beside the user's own, which OPENCODE_CONFIG adds."""
    model = {
        "name": server.model,
        "tool_call": True,
        "reasoning": True,
        "limit": {"context": server.n_ctx, "output": server.n_ctx // 4},
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "step35",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": f"{{env:{KEY_NAME}}}" if server.api_key else "none"},
        "models": {server.model: model},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"step35/{server.model}",
        "provider": {"step35": provider},
    }
    path = Path(".config/opencode/step35.json")
    key = f"{KEY_NAME}=... " if server.api_key else ""
    return Settings(path, _json(config), f"{key}OPENCODE_CONFIG={_from_home(path)} opencode")


def _toml(entries: dict[str, Any]) -> str:
    """Returns strings and numbers as TOML; its strings are JSON's."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _from_home(path: Path) -> str:
    return "~/" + shlex.quote(str(path))


# a tool call and back


def responses_round_trip(server: Server, post: Post) -> RoundTrip:
    """As Codex does it."""
    tool = {"type": "function", "name": TOOL, "description": ABOUT, "parameters": SCHEMA}
    body = {
        "model": server.model, "input": [{"role": "user", "content": QUESTION}], "tools": [tool],
        "reasoning": {"effort": "none"}, "max_output_tokens": MAX_TOKENS,
    }  # fmt: skip
    answer = post("/v1/responses", body | {"tool_choice": "required", "parallel_tool_calls": False})
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    arguments = _arguments([(call["name"], call["arguments"]) for call in calls], answer["output"])
    result = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": READING}
    usage = post("/v1/responses", body | {"input": [*body["input"], *answer["output"], result]})["usage"]
    return RoundTrip(arguments, usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"])


def messages_round_trip(server: Server, post: Post) -> RoundTrip:
    """As Claude Code does it."""
    tool = {"name": TOOL, "description": ABOUT, "input_schema": SCHEMA}
    asked = {"role": "user", "content": QUESTION}
    body = {
        "model": server.model,
        "messages": [asked],
        "tools": [tool],
        "thinking": {"type": "disabled"},
        "max_tokens": MAX_TOKENS,
    }
    answer = post("/v1/messages", body | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    arguments = _arguments([(call["name"], json.dumps(call["input"])) for call in calls], answer["content"])
    result = {"type": "tool_result", "tool_use_id": calls[0]["id"], "content": READING}
    turns = [asked, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    usage = post("/v1/messages", body | {"messages": turns})["usage"]
    n_cached = usage["cache_read_input_tokens"]
    return RoundTrip(arguments, usage["input_tokens"] + n_cached, n_cached)


def chat_round_trip(server: Server, post: Post) -> RoundTrip:
    """As opencode does it."""
    tool = {"type": "function", "function": {"name": TOOL, "description": ABOUT, "parameters": SCHEMA}}
    asked = {"role": "user", "content": QUESTION}
    body = {
        "model": server.model,
        "messages": [asked],
        "tools": [tool],
        "reasoning_effort": "none",
        "max_tokens": MAX_TOKENS,
    }
    answer = post("/v1/chat/completions", body | {"tool_choice": "required", "parallel_tool_calls": False})
    message = answer["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    arguments = _arguments([(call["function"]["name"], call["function"]["arguments"]) for call in calls], message)
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": READING}
    usage = post("/v1/chat/completions", body | {"messages": [asked, message, result]})["usage"]
    return RoundTrip(arguments, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


def _arguments(calls: list[tuple[str, str]], answer: Any) -> dict[str, Any]:
    """Returns the one call's arguments; raises Step35Error if that isn't what came."""
    arguments = json.loads(calls[0][1]) if len(calls) == 1 and calls[0][0] == TOOL else {}
    if arguments.get("unit") not in SCHEMA["properties"]["unit"]["enum"]:
        want = f"one call of {TOOL} with a unit"
        raise Step35Error(f"no tool call: expected {want}, got {json.dumps(answer)[:300]}; look into the server's log")
    return arguments


@dataclass(frozen=True, slots=True)
class Client:
    """An agent's command line program."""

    title: str
    settings: Callable[[Server], Settings]
    round_trip: Callable[[Server, Post], RoundTrip]


CLIENTS = {
    "codex": Client("Codex", codex_settings, responses_round_trip),
    "claude": Client("Claude Code", claude_settings, messages_round_trip),
    "opencode": Client("opencode", opencode_settings, chat_round_trip),
}
