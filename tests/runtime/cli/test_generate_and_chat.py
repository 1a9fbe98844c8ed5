"""The `step35` command: what goes to stdout, what to stderr, and with which exit code it ends."""

import json
import signal
import subprocess
import sys
import time

import pytest

from command import accept_interrupts
from tiny_model import tiny_gguf

STEP35 = [sys.executable, "-m", "step35.cli"]


def step35(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*STEP35, *map(str, arguments)], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def test_generate_prints_the_text_and_a_summary_apart():
    done = step35("generate", tiny_gguf(), "-p", "import os\n", "-n", 16, "--temp", 0, "-t", 1, "--draft", 3)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "prefill" in done.stderr
    assert "accepted" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_json_holds_the_same_text_and_the_counts(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("import os\n", encoding="utf-8")
    arguments = ("-n", 16, "--temp", 0, "-t", 1, "--draft", 3)
    text = step35("generate", tiny_gguf(), "-f", prompt, *arguments).stdout
    answer = json.loads(step35("generate", tiny_gguf(), "-f", prompt, *arguments, "--json").stdout)
    assert answer["text"] + "\n" == text
    assert answer["n_drafted"] == sum(answer["drafted_per_head"])
    assert {"prefill_tps", "decode_tps", "n_accepted", "mean_depth", "finish"} <= answer.keys()


def test_a_file_without_heads_says_so_and_runs():
    done = step35("generate", tiny_gguf(mtp="drop"), "-p", "x", "-n", 4, "-t", 1)
    assert done.returncode == 0
    assert "has no MTP heads: running without them" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate"], 2, "Missing argument"),
        (["generate", "none.gguf"], 2, "give the text with either -p TEXT or -f FILE"),
        (["generate", "none.gguf", "-p", "x", "--draft", "4"], 2, "'4' is not one of"),
        (["generate", "none.gguf", "-p", "x"], 1, "no model file: none.gguf"),
        (["generate", "none.gguf", "-p", "x", "--temp", "-1"], 1, "temperature expected 0.0 to 100.0, got -1.0"),
        (["bench", "none.gguf", "--frontiers", "a"], 2, "expected numbers such as 0,2048"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(arguments, code, message):
    done = step35(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("step35: error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback():
    done = step35("--debug", "generate", "none.gguf", "-p", "x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_prompt_longer_than_the_context_is_refused():
    done = step35("generate", tiny_gguf(), "-p", "x y " * 100, "-c", 64, "-t", 1)
    assert done.returncode == 1
    assert "prompt too long: the context holds 64 tokens" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_cleanly(number):
    command = [*STEP35, "generate", str(tiny_gguf()), "-p", "x", "-n", "100000", "-c", "200000", "-t", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=accept_interrupts
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.read(20)
            time.sleep(0.2)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in stderr


def test_chat_answers_and_comes_back_to_a_saved_conversation(tmp_path):
    saved = tmp_path / "talk"
    script = f"hello\n/save {saved}\n/reset\n/load {saved}\nhello again\n/load {tmp_path}/none\n"
    done = step35("chat", tiny_gguf(), "-t", 1, "--temp", 0, "-c", 256, stdin=script)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert saved.stat().st_size > 1000
    assert "No such file" in done.stderr


def test_bench_writes_a_line_for_each_frontier_and_way(tmp_path):
    out = tmp_path / "bench.csv"
    options = ("--frontiers", "0,100", "-n", 8, "-c", 512, "-t", 1, "--draft", "2")
    done = step35("bench", tiny_gguf(), *options, "--csv", out)
    assert done.returncode == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("draft,n_context,prefill_tps,decode_tps")
    assert [line.split(",")[:2] for line in lines[1:]] == [["off", "0"], ["off", "100"], ["2", "0"], ["2", "100"]]
