"""The real build: our llama.cpp gives what the stock one gives, the runtime loads it, and a second box joins through it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import upstream
from greedy import N_PREDICT, PROMPT
from step35.backend import series
from step35.backend.check import logits_of, stock_folder
from step35.backend.upstream import patches_folder
from step35.errors import SettingsError
from step35.native import builds
from step35.native.chosen_build import VARIABLE
from step35.planning.remote import ask
from tiny_model import tiny_gguf

TESTS = Path(__file__).parents[2] / "support"
DRAFTS = ["off", "1", "2", "3", "auto", "ngram"]
FLOAT_NOISE = 2e-2  # as in test_runtime_lossless
SPLIT_NOISE = 0.3  # of logits with a spread of 2.5: flash attention adds up its halves of the cells in half precision


@pytest.fixture
def chosen(our_backend_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the build as a user has it who has just made it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    shutil.copytree(our_backend_folder, builds.home() / our_backend_folder.name, symlinks=True)
    builds.use(our_backend_folder.name)
    return builds.home() / our_backend_folder.name


def step35(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "step35.cli", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def greedy(folder: Path) -> dict:
    return run_with(folder, "greedy.py", *DRAFTS)


def run_with(folder: Path, script: str, *arguments: str) -> dict:
    """Runs a script of the tests on the tiny model with a backend; returns the JSON of its last line."""
    command = [sys.executable, str(TESTS / script), str(tiny_gguf()), *arguments]
    environment = os.environ | {VARIABLE: str(folder)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ours_and_stock_give_the_same_text_with_drafting_on_and_off(our_backend_folder: Path) -> None:
    ours, stock = greedy(our_backend_folder), greedy(stock_folder())
    assert min(ours["margin"], stock["margin"]) > FLOAT_NOISE  # so no near tie decides
    assert ours["texts"] == stock["texts"]
    assert all(text == ours["texts"]["off"] for text in ours["texts"].values())


def test_the_logits_are_the_stock_builds_to_the_bit(our_backend_folder: Path) -> None:
    """The same sources, flags and compiler: our build is the wheel's, and no patch touches the trunk's arithmetic."""
    assert np.array_equal(logits_of(our_backend_folder), logits_of(stock_folder()))


def test_a_head_returns_hidden_states_of_rows_without_logits(our_backend_folder: Path) -> None:
    """The next head needs every row and only the new one's logits: the stock build runs the output matrix for all."""
    ours, stock = run_with(our_backend_folder, "head_rows.py"), run_with(stock_folder(), "head_rows.py")
    assert ours["all_rows"] and not stock["all_rows"]
    wanted = stock["4"]["hidden"]
    assert [ours[n]["hidden"] for n in ("4", "2", "1", "0")] == [wanted] * 4
    assert [stock[n]["hidden"] for n in ("2", "1")] == [wanted[-2:], wanted[-1:]]
    assert {tuple(ours[n]["best"]) for n in ("4", "2", "1")} == {tuple(stock["4"]["best"])}


def test_a_decode_looks_only_at_its_own_cells(our_backend_folder: Path) -> None:
    """Symptom: with idle conversations a token took twice as long, as every decode looked at all cells in use."""
    ours, stock = (run_with(folder, "attended_cells.py") for folder in (our_backend_folder, stock_folder()))
    assert all(n <= of for n, of in zip(ours["cells"], stock["cells"], strict=True))
    assert sum(ours["cells"]) < 0.6 * sum(stock["cells"])
    (flash, plain), (stock_flash, stock_plain) = ours["logits"], stock["logits"]
    assert plain == stock_plain
    assert np.abs(np.array(flash) - stock_flash).max() < SPLIT_NOISE


def test_cells_between_two_sequences_cost_them_little(our_backend_folder: Path) -> None:
    ours, stock = (run_with(folder, "masked_cells.py") for folder in (our_backend_folder, stock_folder()))
    assert ours["apart"] - ours["beside"] < 0.5 * (stock["apart"] - stock["beside"])


def test_every_command_runs_the_chosen_build_and_doctor_says_so(chosen: Path) -> None:
    done = step35("doctor", "--json")
    findings = {f["what"]: f["found"] for f in json.loads(done.stdout)["findings"]}
    assert findings["backend"].startswith(f"{chosen.name}: cpu, ")
    assert done.returncode == 0


def test_a_library_of_ours_says_what_it_is_wherever_it_lies(
    our_backend_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(our_backend_folder, tmp_path / "elsewhere", symlinks=True)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    findings = {f["what"]: f["found"] for f in json.loads(step35("doctor", "--json").stdout)["findings"]}
    pin = upstream.PIN
    said = f"{pin.version} {pin.commit} {our_backend_folder.name}"
    assert findings["backend"] == f"{VARIABLE}={tmp_path / 'elsewhere'}: {said}"


def test_the_real_series_goes_into_the_real_sources_and_twice_is_a_no_op(tmp_path: Path) -> None:
    patches = series.read_series(patches_folder())
    paths = {upstream.PIN.root + path for patch in patches for path in patch.paths}
    if paths:
        with tarfile.open(upstream.sdist()) as archive:
            archive.extractall(tmp_path, (m for m in archive if m.name in paths), filter="data")
    tree = tmp_path / upstream.PIN.root
    assert series.apply(patches, tree) == [patch.name for patch in patches]
    assert series.apply(patches, tree) == []


# a second box


@dataclass(frozen=True, slots=True)
class SecondBox:
    """An rpc-server, and where it listens."""

    endpoint: str
    server: subprocess.Popen[bytes]


@pytest.fixture
def second_box(chosen: Path) -> Iterator[SecondBox]:
    with rpc_server() as box:
        yield box


@contextmanager
def rpc_server() -> Iterator[SecondBox]:
    """An rpc-server on this box, started as a user starts it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "step35.cli", "rpc-server", "--port", str(port), "--threads", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        while not _answers(f"127.0.0.1:{port}"):
            assert server.poll() is None
            time.sleep(0.05)
        yield SecondBox(f"127.0.0.1:{port}", server)
        server.kill()


def _answers(endpoint: str) -> bool:
    try:
        return bool(ask(endpoint))
    except SettingsError:
        return False


def plan_for(box: SecondBox, plan: Path, n_ctx: int = 256) -> Path:
    """Writes a plan that lays all layers on the second box."""
    asked = ["--policy", "rpc", "--rpc", box.endpoint, "--ctx", n_ctx, "-b", 64, "--out", plan]
    done = step35("plan", tiny_gguf(), *asked)
    assert done.returncode == 0, done.stderr
    return plan


@pytest.mark.parametrize("draft", ["off", "auto"])
def test_a_second_box_gives_the_same_text(second_box: SecondBox, tmp_path: Path, draft: str) -> None:
    """Every layer lies there: the text comes over the network, and equals that of this box alone."""
    plan = plan_for(second_box, tmp_path / "plan.yaml")
    run = ["generate", tiny_gguf(), "-p", PROMPT, "-n", N_PREDICT, "--temp", 0, "--draft", draft, "--json"]
    remote, alone = step35(*run, "--plan", plan), step35(*run, "--ctx", 256)
    assert remote.returncode == alone.returncode == 0, remote.stderr
    assert json.loads(remote.stdout)["text"] == json.loads(alone.stdout)["text"]
    assert "weights on" not in remote.stderr and "KV cache on" not in remote.stderr  # all is where it was planned


@pytest.mark.parametrize("side", [False, True], ids=["heads in the file", "heads in a side file"])
def test_two_boxes_hold_exactly_what_was_planned_for_each(second_box: SecondBox, tmp_path: Path, side: bool) -> None:
    """Two rpc-servers stand for two GPUs: llama.cpp cuts the layers where the plan does, and its log tells of each."""
    model, heads = tiny_gguf(mtp="drop" if side else "keep"), ["--mtp-file", tiny_gguf(mtp="only")] if side else []
    with rpc_server() as third:
        rpc = ["--policy", "rpc", "--rpc", second_box.endpoint, "--rpc", third.endpoint]
        plan = ["plan", model, *heads, *rpc, "--ctx", 4096, "-b", 512, "--json", "--out", tmp_path / "plan.yaml"]
        planned = json.loads(step35(*plan).stdout)
        done = step35(
            "generate", model, *heads, "--plan", tmp_path / "plan.yaml", "-p", PROMPT, "-n", 4, "--draft", "3"
        )
    assert done.returncode == 0, done.stderr
    assert all(planned["usage"][gpu]["weights, dense"] for gpu in ("GPU0", "GPU1"))
    # not compared for GPU1: the full layers' mask is counted there, and the tiny model has none of them there
    assert [
        line for line in done.stderr.splitlines() if "counted" in line and "compute buffers on GPU" not in line
    ] == []


def test_a_second_box_that_is_not_there_is_one_line(second_box: SecondBox, tmp_path: Path) -> None:
    plan = plan_for(second_box, tmp_path / "plan.yaml")
    second_box.server.kill()
    second_box.server.wait()
    done = step35("generate", tiny_gguf(), "-p", "x", "-n", 1, "--plan", plan)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"step35: error: unreachable RPC host: {second_box.endpoint}: Connection refused; start "
    )
    assert done.stderr.count("\n") == 1


def test_a_second_box_that_goes_away_is_one_line(second_box: SecondBox, tmp_path: Path) -> None:
    """ggml aborted, and a debugger's backtrace of a hundred lines came instead."""
    plan = plan_for(second_box, tmp_path / "plan.yaml", 8192)
    run = [
        sys.executable,
        "-m",
        "step35.cli",
        "generate",
        tiny_gguf(),
        "-p",
        PROMPT,
        "-n",
        "-1",
        "--temp",
        "0",
        "--plan",
        plan,
    ]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.read(1)
        second_box.server.kill()
        _, err = child.communicate()
    assert child.returncode == 1
    assert err.decode().splitlines()[-1].startswith("step35: error: llama.cpp gave up: Remote RPC server crashed")
    assert "#1" not in err.decode()
