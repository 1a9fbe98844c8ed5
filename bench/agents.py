"""The agents' own programs against this server's dialects: a scripted model calls their shell and reads the result.

    npm install --prefix /tmp/agents @openai/codex @anthropic-ai/claude-code opencode-ai
    python bench/agents.py /tmp/agents/node_modules/.bin

No engine runs: the requests are read and the answers written by step35.server, the settings are those of
`step35 launch`, and only the model is a script. Prints a line an agent; exits 1 if one got lost.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

from step35.chat.events import (
    ContentDelta,
    Finished,
    ReasoningDelta,
    TokenUsage,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from step35.chat.messages import Conversation
from step35.cli.agents import CLIENTS, Server
from step35.server.api import chat_completions, messages, responses
from step35.server.api.protocol import ApiModule
from step35.server.errors import ApiError
from step35.server.events import Event, Progress, Sse
from step35.server.generation_request import GenerationRequest

APIS: dict[str, ApiModule] = {
    "/v1/responses": responses,
    "/v1/messages": messages,
    "/v1/chat/completions": chat_completions,
}
SHELLS = {"exec_command": "cmd", "shell_command": "command", "Bash": "command", "bash": "command"}
COMMAND, RESULT = "echo answer-$((40 + 2))", "answer-42"
THOUGHT = "The shell can tell."
COMMANDS = {
    "codex": [
        "codex",
        "exec",
        "--profile",
        "step35",
        "--skip-git-repo-check",
        "--dangerously-bypass-approvals-and-sandbox",
    ],
    "claude": ["claude", "--settings", ".claude/step35.json", "--allowedTools", "Bash", "-p"],
    "opencode": ["opencode", "run"],
}
LIMIT_S = 240


class Script:
    """The model: calls the shell, answers with what it said; side requests get one word."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.n_called = self.n_answered = self.n_reasoning_kept = 0
        self._ids = count()

    def events(self, request: GenerationRequest) -> list[Event]:
        assert isinstance(request.prompt, Conversation)
        last, usage = request.prompt.messages[-1], TokenUsage(1000, 900, 20, 5)
        shell = next((tool.name for tool in request.prompt.tools if tool.name in SHELLS), None)
        results = [
            message for message in request.prompt.messages if message.role == "tool" and RESULT in message.content
        ]
        if results:
            self.n_answered += 1
            self.n_reasoning_kept += any(message.reasoning == THOUGHT for message in request.prompt.messages)
            return [ContentDelta(f"The shell says {RESULT}."), Finished("stop", usage)]
        if shell is None or last.role == "tool":
            return [ContentDelta("Greeting"), Finished("stop", usage)]
        self.n_called += 1
        return [Progress(900, 1000), ReasoningDelta(THOUGHT), *self._call(shell), Finished("tool_calls", usage)]

    def _call(self, shell: str) -> list[Event]:
        arguments = json.dumps({SHELLS[shell]: COMMAND, "description": "Adds"})
        pieces = [ToolCallArguments(0, arguments[i : i + 7]) for i in range(0, len(arguments), 7)]
        return [ToolCallBegin(0, f"call_{next(self._ids)}", shell), *pieces, ToolCallEnd(0)]


def handler(script: Script) -> type[BaseHTTPRequestHandler]:
    """Returns a handler that reads and writes as the server does."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self._send(
                200,
                {"object": "list", "data": [{"id": "step35", "object": "model", "created": 1, "owned_by": "step35"}]},
            )

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            path = self.path.partition("?")[0]
            if path.endswith("/count_tokens"):
                return self._send(200, messages.counted(1000))
            api = APIS[path]
            try:
                request = api.read(json.loads(data))
                self._answer(api, request)
            except ApiError as error:
                script.errors.append(error.message)
                self._send(error.status, api.error_body(error, "req"))

        def _answer(self, api: ApiModule, request: GenerationRequest) -> None:
            events = script.events(request)
            if not request.stream:
                return self._send(200, api.whole(request, "req", 1, events))
            writer = api.Writer(request, "req", 1)
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for sse in [
                *writer.open(),
                *writer.ping(None),
                *(sse for event in events for sse in writer.event(event)),
                *writer.close(),
            ]:
                self.wfile.write(_line(sse))

        def _send(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _line(sse: Sse) -> bytes:
    return ((f"event: {sse.event}\n" if sse.event else "") + f"data: {sse.data}\n\n").encode()


def run(client: str, folder: Path, script: Script) -> str:
    """Runs an agent in a home of its own; returns what it printed."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(script))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="step35-agents-") as home:
        settings = CLIENTS[client].settings(Server(f"http://127.0.0.1:{http.server_port}", "step35", 131072))
        path = Path(home) / settings.path
        path.parent.mkdir(parents=True)
        path.write_text(settings.text, encoding="utf-8")
        environment = {**os.environ, "HOME": home, "OPENCODE_CONFIG": str(path), "NO_COLOR": "1"}
        command = [
            str(folder / COMMANDS[client][0]),
            *COMMANDS[client][1:],
            "What is 40 + 2? Ask the shell.",
        ]
        done = subprocess.run(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    http.shutdown()
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the programs are, such as node_modules/.bin")
    parser.add_argument("clients", nargs="*", default=[*COMMANDS], help=f"of {', '.join(COMMANDS)}; default all")
    arguments = parser.parse_args()
    lost = [client for client in arguments.clients if not check(client, arguments.folder)]
    sys.exit(1 if lost else 0)


def check(client: str, folder: Path) -> bool:
    """Runs an agent and prints how it went; returns whether the shell's result reached its user."""
    script = Script()
    try:
        said = run(client, folder, script)
    except subprocess.TimeoutExpired as error:
        said = f"no end after {LIMIT_S} s: {(error.stdout or b'')[-500:]!r}"
    is_right = f"The shell says {RESULT}." in said and not script.errors
    counts = f"called {script.n_called}, answered {script.n_answered}, reasoning sent back {script.n_reasoning_kept}"
    print(f"{client}: {'right' if is_right else 'LOST'}; {counts}; errors: {script.errors or 'none'}")
    if not is_right:
        print(said[-3000:])
    return is_right


if __name__ == "__main__":
    main()
