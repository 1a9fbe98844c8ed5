"""The bench's load and nonsense, in short: no answer wrong, lost or mixed up, and no body is the server's fault."""

import pytest

import server as bench
from live_server import LiveServer
from tiny_model import tiny_gguf


@pytest.fixture(scope="module")
def live():
    flags = ("--threads", "1", "--ctx", "4096", "--batch", "64", "--parallel", "4", "--kv-type", "f32")
    with LiveServer(tiny_gguf("F32"), *flags) as server:
        yield server.ready()


def test_every_answer_under_load_is_that_of_a_serial_run(live, capsys):
    requests = bench.make_requests(24, seed=1)
    wanted = [bench.ask(live.url, path, body) for path, body in requests]
    bench.run_load(live, requests, wanted, clients=4, leave_share=0.2)
    assert "'right'" in capsys.readouterr().out
    assert live.get("/status")[1]["requests"] == []


def test_broken_bodies_get_4xx_and_nothing_breaks(live):
    statuses = bench.run_nonsense(live, 300)
    assert all(status < 500 for status in statuses), statuses
    assert statuses[400] > 100
    assert live.get("/health")[0] == 200


def test_no_request_that_schemathesis_makes_from_the_description_is_the_servers_fault():
    pytest.importorskip("schemathesis")
    with LiveServer(tiny_gguf(), "--threads", "1", "--ctx", "256", "--batch", "64", "--draft", "off") as server:
        server.ready()
        assert bench.run_schemathesis(server.url, n_examples=15, phases="fuzzing") == 0
        assert server.get("/health")[0] == 200
