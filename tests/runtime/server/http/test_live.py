"""The real clients against the real server with the bundled model."""

import contextlib
import http.client
import json
import socket
import threading
import urllib.request

import anthropic
import openai
import pytest

from live_server import LiveServer, conversation_log
from narrowed import of, present
from tiny_model import tiny_gguf

KEY = "secret-key"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "list_files",
            "description": "Lists the files of a folder.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        },
    }
]
HELLO = [{"role": "user", "content": "Hello, how are you?"}]
FLAGS = ("--ctx", "4096", "--batch", "64", "--threads", "1", "--parallel", "3", "--name", "tiny", "--kv-type", "f32")


@pytest.fixture(scope="module")
def server():
    with LiveServer(tiny_gguf("F32"), *FLAGS, "--api-key", KEY) as live:
        yield live.ready()


@pytest.fixture(scope="module")
def gpt(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


# OpenAI


def test_models_are_listed(gpt):
    assert [model.id for model in gpt.models.list()] == ["tiny"]
    assert gpt.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="expected tiny, got"):
        gpt.models.retrieve("gpt-6")


def test_a_chat_streamed_and_whole_is_the_same(gpt):
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 60}
    whole = gpt.chat.completions.create(**asked)
    usage = whole.usage
    assert usage.prompt_tokens > 4 and 0 < usage.completion_tokens <= 60
    chunks = list(gpt.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (whole.choices[0].message.content or "")
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 4
    assert {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices} - {None} == {
        whole.choices[0].finish_reason
    }


def test_seeds_repeat_and_no_seed_does_not(gpt):
    def text(**options) -> str:
        answer = gpt.completions.create(model="tiny", prompt="def ", max_tokens=24, temperature=1.0, **options)
        return answer.choices[0].text

    assert text(seed=3) == text(seed=3)
    assert len({text() for _ in range(4)}) > 1


def test_completions_with_logprobs_echo_and_stop(gpt):
    answer = gpt.completions.create(model="tiny", prompt="import os\nimport ", max_tokens=8, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == answer.usage.completion_tokens == len(logprobs.token_logprobs)
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert all(
        max(top.values()) >= own - 1e-6 for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )
    whole = answer.choices[0].text
    stop = whole[2:4]
    cut = gpt.completions.create(
        model="tiny", prompt="import os\nimport ", max_tokens=8, temperature=0, stop=[stop], echo=True
    )
    assert cut.choices[0].text == "import os\nimport " + whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_with_arguments_of_its_schema(gpt, stream):
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": "List the files in src."}], "tools": TOOLS,
        "tool_choice": "required", "max_tokens": 300, "reasoning_effort": "none", "temperature": 0,
    }  # fmt: skip
    if stream:
        with gpt.chat.completions.stream(**asked) as events:
            with contextlib.suppress(openai.LengthFinishReasonError):
                events.until_done()
            message = events.current_completion_snapshot.choices[0]
    else:
        message = gpt.chat.completions.create(**asked).choices[0]
    assert message.finish_reason in ("tool_calls", "length")
    call = message.message.tool_calls[0]
    assert call.function.name == "list_files"
    if message.finish_reason == "tool_calls":
        assert isinstance(json.loads(call.function.arguments)["path"], str)


def test_structured_output_keeps_to_its_schema_and_names_what_it_cant(gpt):
    schema = {
        "type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "temperature": 0, "reasoning_effort": "none"}
    answer = gpt.chat.completions.create(**asked, response_format=form).choices[0]
    if answer.finish_reason == "stop":
        body = json.loads(answer.message.content)
        assert set(body) == {"n", "ok"} and type(body["n"]) is int and type(body["ok"]) is bool
    bad = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "unevaluatedProperties": False}},
    }
    with pytest.raises(openai.BadRequestError, match="unevaluatedProperties"):
        gpt.chat.completions.create(**asked, response_format=bad)


def test_responses_whole_and_streamed(gpt):
    asked = {"model": "tiny", "input": "Hello there", "max_output_tokens": 40, "temperature": 0}
    whole = gpt.responses.create(**asked)
    assert whole.status in ("completed", "incomplete") and whole.usage.output_tokens > 0
    with gpt.responses.stream(**asked) as events:
        kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


def test_embeddings_say_that_they_arent_served(gpt):
    with pytest.raises(openai.APIStatusError, match="embeddings are not supported"):
        gpt.embeddings.create(model="tiny", input="x")


# Anthropic


def test_messages_whole_streamed_and_counted(claude):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "system": "Be brief."}
    count = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
    whole = claude.messages.create(**asked, extra_body={"temperature": 0})
    usage = whole.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count.input_tokens
    assert whole.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]


def test_an_error_comes_in_the_apis_own_form_with_its_id(claude, gpt, server):
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="tiny", messages=[{"role": "user", "content": "x" * 60000}], max_tokens=5)
    body = of(dict, caught.value.body)
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert "prompt is too long" in body["error"]["message"]
    assert present(caught.value.request_id).startswith("req_")
    with pytest.raises(openai.BadRequestError, match="n expected 1, got 3") as caught:
        gpt.chat.completions.create(model="tiny", messages=HELLO, n=3)
    assert present(caught.value.request_id).startswith("req_") and caught.value.param == "n"


# HTTP


def bearer() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def test_without_the_key_nothing_but_health_is_served(server):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x_api_key": "wrong"}):
        for path in ("/status", "/metrics", "/v1/models", "/nonesuch"):
            assert server.get(path, **headers)[0] == 401
    assert server.get("/health") == (200, {"status": "ready"})
    assert server.get("/v1/models", x_api_key=KEY)[0] == 200
    assert server.get("/v1/models", authorization=f"bearer {KEY}")[0] == 200, "the scheme's case says nothing"


def test_a_page_of_another_site_is_kept_out(server):
    assert server.get("/status", origin="http://evil.example", **bearer())[0] == 403
    assert server.get("/status", origin=server.url, **bearer())[0] == 200
    assert server.send("OPTIONS", "/v1/messages", None, origin="http://evil.example")[0] == 403


def test_a_named_origin_may_call_and_a_foreign_hosts_name_is_no_way_in():
    origin = "http://localhost:3000"
    with LiveServer(tiny_gguf("F32"), *FLAGS, "--cors", origin) as live:
        live.ready()
        with urllib.request.urlopen(urllib.request.Request(live.url + "/status", headers={"origin": origin})) as got:
            assert got.headers["access-control-allow-origin"] == origin
        assert live.send("OPTIONS", "/v1/messages", None, origin=origin)[0] == 204
        assert live.get("/status", origin="http://localhost:3001")[0] == 403
        status, body = live.get("/status", host="evil.example")
        assert status == 403 and "unknown host: without --api-key expected an IP address" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
def test_a_refusal_has_the_apis_own_form_and_an_id(server, path):
    """413 and 415 come before the body is read, 404 and 405 before there is a handler."""
    wrong = [
        (404, ("POST", path + "/x", b"{}", {})), (405, ("GET", path, None, {})), (401, ("POST", path, b"{}", {"authorization": "no"})),
        (413, ("POST", path, b"{}", {"content_length": str(1 << 40)})), (415, ("POST", path, b"{}", {"content_encoding": "gzip"})),
    ]  # fmt: skip
    for wanted, (method, where, data, headers) in wrong:
        status, body = server.send(method, where, data, **bearer() | headers)
        assert status == wanted, body
        anthropic_form, openai_form = body.get("type") == "error", {"param", "code"} <= body["error"].keys()
        assert (anthropic_form, openai_form) == ((True, False) if where.startswith("/v1/messages") else (False, True))
        assert (body if anthropic_form else body["error"])["request_id"].startswith("req_")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"messages": NaN}', 400), (b"[" * 100000, 400),
        (b'{"messages": []}', 400), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": 5}]}', 400), (b'{"messages": [{"role": "user"}], "temperature": -1}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999999": 1}}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}', 400),
    ],
)  # fmt: skip
def test_nonsense_is_the_clients_fault(server, body, status):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        got, answer = server.post(path, body, **bearer())
        assert got == status, (path, answer)
        assert "error" in answer


def test_other_methods_and_paths_are_told_so(server):
    assert server.get("/v1/chat/completions", **bearer())[0] == 405
    assert server.get("/nonesuch", **bearer())[0] == 404
    assert server.post("/health", {}, **bearer())[0] == 405


def test_tokens_go_there_and_back(server):
    _, body = server.post("/tokenize", {"content": "Hello <|im_end|> wörld"}, **bearer())
    _, back = server.post("/detokenize", {"tokens": body["tokens"]}, **bearer())
    assert back["content"] == "Hello <|im_end|> wörld"
    assert server.post("/detokenize", {"tokens": [-1]}, **bearer())[0] == 400


def test_a_letter_repeated_for_pages_crashes_no_tokenizer(server):
    for text in ("x" * 100_000, " " * 100_000, "=" * 100_000, "é" * 100_000):
        status, body = server.post("/tokenize", {"content": text}, **bearer())
        assert status == 200
        assert server.post("/detokenize", {"tokens": body["tokens"]}, **bearer())[1]["content"] == text


def test_status_metrics_and_description(server):
    status = server.get("/status", **bearer())[1]
    assert status["state"] == "ready" and len(status["sessions"]) == 5
    metrics = server.get("/metrics", **bearer())[1]
    assert "step35_generated_tokens_total" in metrics and "step35_context_cells 4096" in metrics
    paths = server.get("/openapi.json", **bearer())[1]["paths"]
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/health"} <= set(paths)


def test_a_client_that_leaves_ends_its_request_and_nobody_elses(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    body = {"prompt": "def f(", "max_tokens": 3000, "temperature": 1.0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **bearer()})
    response = connection.getresponse()
    assert response.status == 200
    response.read(200)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    server.wait(lambda: not server.get("/status", **bearer())[1]["requests"])
    server.wait(lambda: any(line.get("left") for line in conversation_log(server.lines)))


def test_identical_retries_get_one_answer(server):
    body = {"prompt": "class Point:\n    def", "max_tokens": 150, "temperature": 0, "seed": 1}
    answers: list[dict] = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body, **bearer())[1]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def test_the_log_has_one_line_a_request_and_no_text(server):
    _, body = server.post("/v1/completions", {"prompt": "swordfish", "max_tokens": 3}, **bearer())
    own = body["id"].removeprefix("cmpl-")
    [line] = server.wait(lambda: [line for line in conversation_log(server.lines) if line["id"] == own])
    assert (line["path"], line["status"], line["n_generated"]) == ("/v1/completions", 200, 3)
    assert "swordfish" not in "\n".join(server.lines)
