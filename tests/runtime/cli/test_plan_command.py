"""`step35 plan` as a user runs it, and its estimates beside what others measured."""

import json
import subprocess
import sys

import pytest

import planned_gguf
from checkpoints import REAL
from step35.planning.context_memory import Run
from step35.planning.machine import known_machines
from step35.planning.memory_usage import Layout
from step35.planning.model_header import read_header
from step35.planning.speed import Deployment, cycle_seconds, step_seconds
from tiny_model import tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return planned_gguf.write(tmp_path_factory.mktemp("plan") / "real.gguf", REAL, "MOE_IQ4_XS")


def step35(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "step35.cli", *map(str, arguments)], capture_output=True, text=True)


def test_a_plan_is_printed_written_and_judged_again(model, tmp_path):
    out = tmp_path / "plan.yaml"
    first = step35("plan", model, "--machine", "rtx4090-24+128", "--ctx", 131072, "--out", out)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "fits"
    assert "op-offload scratch" in first.stdout
    again = step35("plan", model, "--machine", "rtx4090-24+128", "--plan", out)
    assert again.stdout == first.stdout


def test_what_does_not_fit_says_what_to_try_and_exits_1(model):
    done = step35("plan", model, "--machine", "dgx-spark", "--ctx", 262144)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("does not fit; try ctx 2")
    assert "or recipe MOE_" in done.stdout  # that it fits: test_placement


def test_a_plan_file_that_no_longer_fits_says_what_a_new_one_could(model, tmp_path):
    """Symptom: its advice was for other sessions and another context than the file's."""
    out = tmp_path / "plan.yaml"
    step35("plan", model, "--machine", "rtx4090-24+128", "--ctx", 65536, "--out", out)
    out.write_text(out.read_text().replace("kv_type: f16", "kv_type: f32"))
    done = step35("plan", model, "--machine", "rtx4090-24+128", "--plan", out)
    assert done.returncode == 1
    assert "does not fit; try a new plan with ctx 65536" in done.stdout


def test_json_holds_the_same_plan(model):
    done = step35("plan", model, "--machine", "h200-141", "--ctx", 32768, "--json")
    data = json.loads(done.stdout)
    assert data["fits"] is True
    assert data["policy"] == "gpu"
    assert sum(data["usage"]["GPU0"].values()) == data["budgets"][0]["used"] <= data["budgets"][0]["budget"]


def test_generate_runs_what_a_plan_says(tmp_path):
    model, out = tiny_gguf(), tmp_path / "plan.yaml"
    assert step35("plan", model, "--ctx", 2048, "--out", out).returncode == 0
    text = ["-p", "def f(x):", "-n", 8, "--temp", 0]
    planned = step35("generate", model, "--plan", out, *text)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout == step35("generate", model, "-c", 2048, *text).stdout
    both = step35("generate", model, "--plan", out, "-c", 4096, *text)
    assert both.returncode == 2
    assert both.stderr.startswith("step35: error: --plan and --ctx: the plan says it already")
    out.write_text(out.read_text().replace("kv_type: f16", "kv_type: f12"))
    broken = step35("generate", model, "--plan", out, *text)
    assert "plan.yaml line 9: kv_type expected one of" in broken.stderr


def test_heads_in_a_side_file_are_planned_and_run(tmp_path):
    trunk, heads, out = tiny_gguf(mtp="drop"), tiny_gguf(mtp="only"), tmp_path / "plan.yaml"
    planned = step35("plan", trunk, "--mtp-file", heads, "--ctx", 1024, "--out", out)
    assert planned.returncode == 0, planned.stderr
    assert "3 MTP heads" in planned.stdout
    run = step35(
        "generate", trunk, "--mtp-file", heads, "--draft", 2, "--plan", out, "-p", "def f(x):", "-n", 8, "--json"
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["n_drafted"] > 0
    wrong = step35("plan", trunk, "--mtp-file", trunk, "--ctx", 1024)
    assert wrong.stderr.startswith("step35: error: no MTP heads: ")
    alone = step35("plan", heads, "--ctx", 1024)
    assert alone.stderr.startswith("step35: error: no trunk: ")


def test_the_old_spellings_are_taken_with_a_note_and_hidden():
    """`--mtp` is a mode in convert-step35, and `--trace` a folder in serve."""
    trunk, heads = tiny_gguf(mtp="drop"), tiny_gguf(mtp="only")
    for command in (["--mtp", heads, trunk], [trunk, "--mtp-file", heads]):
        done = step35("plan", "--machine", "cpu-192", "--ctx", 1024, *command)
        assert "3 MTP heads" in done.stdout, done.stderr
        assert done.stderr == ("step35: --mtp is now called --mtp-file\n" if "--mtp" in command else "")
    traced = step35("plan", trunk, "--machine", "cpu-192", "--ctx", 1024, "--trace", "none.json")
    assert traced.stderr.startswith("step35: --trace is now called --routing\nstep35: error: can't read none.json")
    words = [word for command in ("plan", "generate", "tune") for word in step35(command, "--help").stdout.split()]
    assert {"--mtp-file", "--routing"} <= {*words} and not {"--mtp", "--trace"} & {*words}


def test_a_model_larger_than_a_memory_limit_is_refused_before_it_is_loaded(model):
    """Symptom: a batch system's limit, or the kernel, kills the process half-way through loading 100 GiB."""
    command = f"ulimit -v {8 * 2**20}; exec {sys.executable} -m step35.cli generate {model} -p x -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("step35: error: doesn't fit: RAM expected to need at most ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--machine", "toaster"], 1, "unknown machine: expected one of dgx-spark"),
        (["--machine", "h100-80", "--gpu-budget", "22"], 2, "expected a number with a unit such as 22GiB"),
        (["--machine", "h100-80", "--policy", "fast"], 1, "bad policy: expected one of auto, unified"),
        (["--machine", "h100-80", "--plan", "/nonexistent.yaml"], 1, "No such file"),
        (["--machine", "h100-80", "--plan", sys.executable], 1, "expected a text in UTF-8"),
        (["--machine", "h100-80", "--routing", sys.executable], 1, "expected a text in UTF-8"),
        (
            ["--machine", "h100-80", "--plan", "/x.yaml", "--kv-type", "q8_0"],
            2,
            "--plan and --kv-type: the plan says it",
        ),
    ],
)
def test_bad_input_is_one_line(model, arguments, code, message):
    done = step35("plan", model, *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("step35: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


CONTEXTS = (2048, 8192, 16384, 32768, 65536, 262144)
PUBLISHED = {
    ("dgx-spark", "q8_0"): (20.27, 20.25, 19.24, 17.75, 15.42, 8.39),
    ("mac-studio-128", "f16"): (45.96, 43.90, 41.27, 38.22, 31.52, 8.88),
}


def one_gpu(tmp_path_factory, recipe, name, kv_type):
    header = read_header(planned_gguf.write(tmp_path_factory.mktemp("published") / "m.gguf", REAL, recipe))
    layers = header.shape.layers
    layout = Layout(("GPU0",) * len(layers), tuple(("GPU0",) * 3 if layer.is_moe else () for layer in layers), "GPU0")
    return Deployment(header, known_machines()[name], Run(262144, 1024, kv_type=kv_type), layout)


@pytest.mark.parametrize(("name", "kv_type"), PUBLISHED)
def test_plain_decode_is_estimated_within_a_fifth(tmp_path_factory, name, kv_type):
    """StepFun's docs/step3.5-flash.md: Q4_K_S, everything on the one GPU."""
    box = one_gpu(tmp_path_factory, "Q4_K_S", name, kv_type)
    for n_past, measured in zip(CONTEXTS, PUBLISHED[name, kv_type], strict=True):
        assert 1 / step_seconds(box, n_past, 1) == pytest.approx(measured, rel=0.2)


def test_what_drafting_gains_far_into_a_context_is_near_what_was_posted(tmp_path_factory):
    """llama.cpp's pull request 20981, IQ4_XS at 32768 tokens, with the acceptance posted there.

    Symptom: 1.7 and not 1.2 of plain, as if the verified tokens shared all of attention's time.
    """
    box = one_gpu(tmp_path_factory, "IQ4_XS", "mac-studio-128", "f16")
    plain = step_seconds(box, 32768, 1)
    for depth, (accepted, gain) in enumerate([(0.889, 1.29), (0.758, 1.21), (0.687, 1.13)], 1):
        estimate = (1 + depth * accepted) * plain / cycle_seconds(box, 32768, depth)
        assert estimate == pytest.approx(gain, rel=0.1)
