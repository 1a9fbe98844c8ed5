"""The server as a process: killed, restarted, drained, overrun and refused."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from live_server import LiveServer, conversation_log
from tiny_model import tiny_gguf

FLAGS = ("--ctx", "2048", "--batch", "64", "--threads", "1", "--kv-type", "f32")
END_TOKENS = (1, 2, 2033)
ENDLESS = {
    "prompt": "def ", "max_tokens": 1900, "temperature": 1.0, "logit_bias": dict.fromkeys(END_TOKENS, -100)
}  # fmt: skip


def step35(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "step35.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def chat(server: LiveServer, messages: list[dict], n: int = 24) -> tuple[str, dict]:
    body = {"messages": messages, "max_tokens": n, "temperature": 0, "reasoning_effort": "none"}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_kill_9_in_the_middle_and_the_conversation_goes_on_alike(tmp_path):
    messages = [{"role": "system", "content": "Rules: " + "be kind. " * 60}, {"role": "user", "content": "Hello!"}]
    with LiveServer(tiny_gguf("F32"), *FLAGS, "--session-dir", str(tmp_path)) as server:
        server.ready()
        text, usage = chat(server, messages)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And you?"}]
        server.wait(lambda: list(tmp_path.glob("*.session")))
        threading.Thread(target=lambda: _ignore(lambda: chat(server, messages, 500)), daemon=True).start()
        server.wait(lambda: server.get("/status")[1]["requests"])
        server.kill()
    with LiveServer(tiny_gguf("F32"), *FLAGS, "--session-dir", str(tmp_path)) as server:
        server.ready()
        back, usage_back = chat(server, messages)
        assert usage_back["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"]
        assert server.stop() == 0
    with LiveServer(tiny_gguf("F32"), *FLAGS) as cold:
        cold.ready()
        assert chat(cold, messages)[0] == back


def _ignore(call) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
        call()


def stream(server: LiveServer, body: dict) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream": True}), {"content-type": "application/json"}
    )
    return connection, connection.getresponse()


def test_an_overrun_is_429_a_drain_ends_answers_cleanly_and_exits_0():
    with LiveServer(tiny_gguf(), *FLAGS, "--parallel", "1", "--queue", "1", "--drain", "0.5") as server:
        server.ready()
        open_streams = [stream(server, ENDLESS) for _ in range(2)]
        status, body = server.post("/v1/completions", ENDLESS)
        assert status == 429 and "too many requests" in body["error"]["message"]
        open_streams[0][1].read(100)
        server.process.send_signal(signal.SIGTERM)
        texts = [response.read().decode() for _, response in open_streams]
        assert '"finish_reason":"length"' in texts[0] and texts[0].endswith("data: [DONE]\n\n")
        assert "shutting down" in texts[1] or '"finish_reason":"length"' in texts[1]
        assert server._end(30) == 0
        for connection, _ in open_streams:
            connection.close()


def test_a_second_signal_ends_at_once():
    with LiveServer(tiny_gguf(), *FLAGS, "--drain", "100") as server:
        server.ready()
        connection, response = stream(server, ENDLESS)
        response.read(50)
        server.process.send_signal(signal.SIGINT)
        server.wait(lambda: any("draining" in line for line in server.lines))
        assert server.get("/health") == (503, {"status": "draining"})
        assert server.post("/v1/completions", ENDLESS)[0] == 503
        server.process.send_signal(signal.SIGINT)
        assert server._end(10) == 130
        connection.close()


def test_the_port_is_open_before_the_model_is_loaded_and_the_start_is_told_in_few_lines():
    with LiveServer(tiny_gguf(), *FLAGS) as server:
        status, body = server.get("/health")
        assert (status, body["status"]) in ((503, "loading"), (200, "ready"))
        if status == 503:
            assert server.post("/v1/completions", ENDLESS)[0] in (503, 200)
        server.ready()
        assert server.stop() == 0
        told = [line for line in server.lines if line.startswith("step35: ")]
        assert len(told) <= 6 and re.match(r"step35: http://127\.0\.0\.1:\d+ \(loading", told[0])
        assert not conversation_log(server.lines) or conversation_log(server.lines)[0]["path"] != "/health"


@pytest.mark.parametrize("option", ["--record", "--trace"])
def test_requests_and_answers_are_recorded_where_a_folder_is_named(tmp_path: Path, option: str):
    """The option's old name works as before, with a note."""
    folder = tmp_path / "new"
    with LiveServer(tiny_gguf(), *FLAGS, option, str(folder)) as server:
        server.ready()
        _, answer = server.post("/v1/completions", {"prompt": "swordfish", "max_tokens": 3, "temperature": 0})
        files = server.wait(lambda: sorted(folder.iterdir())[1:] and sorted(folder.iterdir()))
        assert ("step35: --trace is now called --record" in server.lines) == (option == "--trace")
    own = answer["id"].removeprefix("cmpl-")
    assert [path.name for path in files] == [f"{own}-answer.txt", f"{own}-request.json"]
    assert json.loads(files[1].read_text())["prompt"] == "swordfish"
    assert repr(answer["choices"][0]["text"]) in files[0].read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--host", "0.0.0.0"), 2, "give --api-key, too"),
        (("--host", "999.1.1.1"), 2, "give --api-key, too"),
        (("--host", "192.0.2.1", "--api-key", "x"), 1, r"can't listen on http://192\.0\.2\.1:8035"),
        (("--parallel", "0"), 2, "--parallel"),
    ],
)
def test_what_cant_be_served_is_refused_in_one_line(options, code, message):
    done = step35("serve", tiny_gguf(), *options)
    assert done.returncode == code
    assert re.search(message, done.stderr)
    assert done.stderr.startswith("step35: error: ") and done.stderr.count("\n") == 1


def test_a_file_that_is_no_model_ends_the_server_with_the_reason(tmp_path):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF but not really")
    done = step35("serve", path, "--port", "0")
    assert done.returncode == 1 and "step35: error: " in done.stderr
