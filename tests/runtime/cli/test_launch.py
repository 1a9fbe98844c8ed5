"""`step35 launch`: each client's settings as the client reads them, and a tool call there and back."""

import json
import os
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from live_server import LiveServer
from step35.chat.events import ContentDelta, Finished, TokenUsage, ToolCallArguments, ToolCallBegin
from step35.cli.agents import CLIENTS, TOOL, RoundTrip, Server
from step35.errors import Step35Error
from step35.server.api import chat_completions, messages, responses
from step35.server.events import Event
from tiny_model import tiny_gguf

KEY = "secret-key"
SERVER = Server("http://127.0.0.1:8035", 'tiny "q8"', 4096)
APIS = {"codex": responses, "claude": messages, "opencode": chat_completions}


def launch(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "step35.cli", "launch", *map(str, arguments)]
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("STEP35_API_KEY", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


# settings


def test_codex_gets_a_profile_with_a_provider_of_the_responses_api() -> None:
    settings = CLIENTS["codex"].settings(SERVER)
    profile = tomllib.loads(settings.text)
    assert (profile["model"], profile["model_context_window"]) == (SERVER.model, 4096)
    provider = profile["model_providers"][profile["model_provider"]]
    assert (provider["base_url"], provider["wire_api"]) == (
        "http://127.0.0.1:8035/v1",
        "responses",
    ) and "env_key" not in provider
    assert settings.path.name == f"{settings.command.split()[-1]}.config.toml"


def test_claude_code_gets_one_model_for_every_size_and_no_changing_header() -> None:
    environment = json.loads(CLIENTS["claude"].settings(SERVER).text)["env"]
    assert environment["ANTHROPIC_BASE_URL"] == SERVER.url and environment["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    assert {value for name, value in environment.items() if name.endswith("MODEL")} == {SERVER.model}


def test_opencode_gets_a_provider_with_its_model() -> None:
    config = json.loads(CLIENTS["opencode"].settings(SERVER).text)
    provider, _, model = config["model"].partition("/")
    assert config["provider"][provider]["models"][model]["limit"]["context"] == 4096


@pytest.mark.parametrize("client", ["codex", "opencode"])
def test_a_key_is_named_and_not_written_where_the_client_can_look_it_up(client: str) -> None:
    settings = CLIENTS[client].settings(Server(SERVER.url, "m", 4096, KEY))
    assert (
        KEY not in settings.text
        and "STEP35_API_KEY" in settings.text
        and settings.command.startswith("STEP35_API_KEY=... ")
    )


# the round trip, without a model


class Model:
    """A server of one API whose model calls the tool, or says something else."""

    def __init__(self, client: str, events: list[Event]) -> None:
        self.api, self.events, self.asks = APIS[client], events, []

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        ask = self.api.read(body)
        self.asks.append(ask)
        events = self.events if len(self.asks) == 1 else [ContentDelta("21."), Finished("stop", TokenUsage(50, 40, 2))]
        return self.api.whole(ask, "req", 1, events)


def calling(arguments: str) -> list[Event]:
    return [
        ToolCallBegin(0, "call_a", TOOL),
        ToolCallArguments(0, arguments),
        Finished("tool_calls", TokenUsage(30, 0, 9)),
    ]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_result_goes_back_after_the_call_that_asked_for_it(client: str) -> None:
    model = Model(client, calling('{"unit": "celsius"}'))
    assert CLIENTS[client].round_trip(SERVER, model.post) == RoundTrip({"unit": "celsius"}, 50, 40)
    first, second = model.asks
    assert (first.tool_choice, first.effort, second.tool_choice) == ("required", "none", "auto")
    asked, called, result = second.prompt.messages
    assert (asked, second.prompt.tools) == (*first.prompt.messages, first.prompt.tools)
    assert called.tool_calls[0].id == result.tool_call_id == "call_a" and result.content == "21 degrees"


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "events", [[ContentDelta("No."), Finished("stop", TokenUsage())], calling('{"unit": "kelvin"}'), calling("{}")]
)
def test_anything_but_the_call_is_an_error_that_shows_what_came(client: str, events: list[Event]) -> None:
    with pytest.raises(Step35Error, match="no tool call: expected one call of read_thermometer with a unit, got "):
        CLIENTS[client].round_trip(SERVER, Model(client, events).post)


# the command, with the bundled model


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(
        tiny_gguf(), "--ctx", "4096", "--batch", "256", "--threads", "1", "--name", "tiny", "--api-key", KEY
    ) as live:
        yield live.ready()


@pytest.mark.parametrize("client", CLIENTS)
def test_the_command_checks_the_server_and_writes_a_file_for_its_owner_alone(
    client: str, server: LiveServer, tmp_path: Path
) -> None:
    done = launch(tmp_path, client, "--url", f"{server.url}/v1", "--api-key", KEY)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    checked, wrote, start = done.stderr.splitlines()
    assert "a tool call and back works" in checked and "start it with: " in start
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert wrote.endswith(str(path)) and stat.S_IMODE(path.stat().st_mode) == 0o600 and "tiny" in path.read_text()


def test_print_writes_nothing(server: LiveServer, tmp_path: Path) -> None:
    done = launch(tmp_path, "claude", "--url", server.url, "--api-key", KEY, "--print", "--no-check")
    assert json.loads(done.stdout)["env"]["ANTHROPIC_AUTH_TOKEN"] == KEY and list(tmp_path.iterdir()) == []


def test_a_server_that_refuses_or_isnt_there_is_one_clear_line(server: LiveServer, tmp_path: Path) -> None:
    for arguments, message in (
        (("--url", server.url, "--api-key", "wrong"), "the server refused: "),
        (("--url", "http://127.0.0.1:9"), "no server: http://127.0.0.1:9/v1/models: "),
    ):
        done = launch(tmp_path, "codex", *arguments)
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(f"step35: error: {message}"), (
            done.stderr
        )
        assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_it_waits_for_a_server_that_is_still_loading(tmp_path: Path) -> None:
    entries = iter([{"id": "m"}, {"id": "m"}, {"id": "m", "context_length": 4096}])

    class Loading(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [next(entries)]}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Loading) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        done = launch(tmp_path, "opencode", "--url", f"http://127.0.0.1:{http.server_port}", "--no-check", "--print")
        http.shutdown()
    assert json.loads(done.stdout)["model"] == "step35/m" and "is loading its model; waiting for it" in done.stderr
