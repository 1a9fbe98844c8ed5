"""The command as a newcomer types it: every slip is one clear line and an exit code, every answer can be parsed."""

import hashlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from gguf import GGUFValueType as V
from rich.console import Console

from checkpoints import REAL, TINY, write_checkpoint
from command import Done, accept_interrupts, convert_step35
from convert_step35.cli import tables
from convert_step35.gguf.header import Entry, TensorInfo, encode_header
from convert_step35.models import load_models
from convert_step35.planning.plan import Plan
from edited_gguf import edit_gguf

SMALL = replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=1)
COMMAND = [sys.executable, "-m", "convert_step35"]
not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "small", SMALL)


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Path:
    out = checkpoint.with_name("made.gguf")
    assert convert_step35("run", checkpoint, out).exit_code == 0
    return out


def refused(*arguments: object, exit_code: int, message: str) -> None:
    """One line on stderr, nothing on stdout, the exit code; with --json too."""
    for options in ((), ("--json",)):
        done = convert_step35(*arguments, *options)
        assert (done.exit_code, done.out) == (exit_code, ""), done.err
        assert (
            done.err.startswith("convert-step35: error: ") and done.err.endswith("\n") and done.err[:-1].isprintable()
        )
        assert re.search(message, done.err), done.err
        assert len(done.err) < 1000


# Help


def test_without_arguments_it_shows_its_commands_and_examples() -> None:
    done = convert_step35()
    assert (done.exit_code, done.err) == (0, "") and done.out == convert_step35("--help").out
    assert all(f"  {name} " in done.out for name in ("plan", "run", "verify", "inspect", "recipes", "mtp"))
    assert convert_step35("mtp").out == convert_step35("mtp", "--help").out
    assert "convert-step35 run   Step-3.5-Flash step35.gguf --target-size 105GiB" in done.out


@pytest.mark.parametrize("command", ["plan", "run", "verify", "inspect", "recipes", "mtp", "mtp requantize"])
def test_every_command_explains_itself_in_80_columns(command: str) -> None:
    done = convert_step35(*command.split(), "-h")
    assert done.exit_code == 0 and max(map(len, done.out.splitlines())) <= 80


# Answers


def test_every_command_answers_in_json(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    for arguments in (
        ["plan", checkpoint],
        ["run", checkpoint, tmp_path / "a.gguf"],
        ["verify", made],
        ["inspect", made],
        ["recipes"],
    ):
        done = convert_step35(*arguments, "--json")
        assert (done.exit_code, done.err) == (0, "")
        assert isinstance(done.data, dict) and done.data


def test_the_plan_is_what_the_run_makes(checkpoint: Path, tmp_path: Path) -> None:
    planned = convert_step35("plan", checkpoint, "--type", "q4_k_m", "--json").data
    report = convert_step35("run", checkpoint, tmp_path / "small.gguf", "--type", "Q4_K_M", "--json").data
    assert planned["tensors"] == [{key: entry[key] for key in planned["tensors"][0]} for entry in report["tensors"]]
    assert planned["totals"] == report["totals"] and planned["recipe"] == report["recipe"] == "Q4_K_M"
    assert [file["n_bytes"] for file in planned["files"]] == [(tmp_path / "small.gguf").stat().st_size]
    assert json.loads((tmp_path / "small.gguf.report.json").read_text()) == report


def test_the_default_type_is_q8_0(checkpoint: Path) -> None:
    assert (
        convert_step35("plan", checkpoint, "--json").data
        == convert_step35("plan", checkpoint, "--type", "Q8_0", "--json").data
    )


def test_recipes_names_everything_that_type_takes(checkpoint: Path) -> None:
    known = convert_step35("recipes", "--json").data
    assert [recipe["name"] for recipe in known["recipes"]] == list(load_models().recipes)
    shown = convert_step35("recipes").out
    for name in [*(recipe["name"] for recipe in known["recipes"]), *known["presets"]]:
        assert name in shown.split()


def test_notes_go_to_stderr_and_leave_stdout_to_the_answer(tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", replace(SMALL, num_nextn_predict_layers=0))
    done = convert_step35("run", bare, tmp_path / "out.gguf", "--json")
    assert done.err == "convert-step35: note: the checkpoint has no MTP layers: trunk only, no drafting\n"
    assert done.data["notes"] == ["the checkpoint has no MTP layers: trunk only, no drafting"]


def test_a_file_with_problems_exits_1_and_says_them_on_stdout(made: Path, tmp_path: Path) -> None:
    edited = edit_gguf(made, tmp_path / "edited.gguf", metadata={"tokenizer.chat_template": None})
    for command in ("inspect", "verify"):
        done = convert_step35(command, edited)
        assert (done.exit_code, done.err) == (1, "") and "problem: no chat template" in done.out


def test_an_override_counts_under_every_kind_of_type(checkpoint: Path) -> None:
    """Under BF16 it was written into the file's recipe and ignored."""
    for name in ("BF16", "Q4_K_M", "MOE_Q6_K", "Q3_K"):
        planned = convert_step35(
            "plan", checkpoint, "--type", name, "--tensor-type", "ffn_up_exps=iq4_nl", "--json"
        ).data
        assert {t["type"] for t in planned["tensors"] if "ffn_up_exps" in t["name"]} == {"IQ4_NL"}
        assert planned["recipe"] == f"{name} ffn_up_exps=IQ4_NL"


# Slips in the options

OPTIONS = {
    "unknown type": (["--type", "Q4KM"], 2, r"unknown type: --type expected a name that `convert-step35 recipes` lists, got 'Q4KM'; did you mean Q4_K_M or"),
    "type without likeness": (["--type", "@"], 2, r"lists, got '@'$"),
    "empty type": (["--type", ""], 2, r"unknown type: .* got ''"),
    "empty size": (["--target-size", ""], 2, r"bad size: expected a number with a unit such as 103GiB or 40GB, got ''"),
    "size without unit": (["--target-size", "103"], 2, r"bad size: .* got '103'"),
    "negative size": (["--target-size=-3GiB"], 2, r"bad size: .* got '-3GiB'"),
    "size of 400 digits": (["--target-size", "9" * 400 + "GB"], 2, r"bad size: .* got '9{80}'\.\.\."),
    "size with escapes": (["--target-size", "1\x1b[2JGB"], 2, r"bad size: .* got '1\\x1b\[2JGB'"),
    "bad split size": (["--split-max-size", "many"], 2, r"bad size: .* got 'many'"),
    "both type and size": (["--type", "Q8_0", "--target-size", "9GB"], 2, r"give --type or --target-size, not both; see convert-step35 plan --help"),
    "no regex": (["--tensor-type", "Q4_K"], 2, r"bad --tensor-type: expected REGEX=TYPE, got 'Q4_K'"),
    "empty regex": (["--tensor-type", "=Q4_K"], 2, r"expected REGEX=TYPE, got '=Q4_K'"),
    "broken regex": (["--tensor-type", "[=Q4_K"], 2, r"bad --tensor-type: '\[' is no regular expression: unterminated character set"),
    "huge repeat": (["--tensor-type", "x{99999999999}=Q4_K"], 2, r"is no regular expression"),
    "unknown tensor type": (["--tensor-type", "exps=Q9"], 2, r"unknown tensor type: expected one of F32, F16, .*, got 'Q9'"),
    "regex that matches nothing": (["--tensor-type", "ffn_norm=Q4_K"], 1, r"--tensor-type ffn_norm=Q4_K matches no matrix; names look like blk\.0\.attn_q\.weight and output\.weight"),
    "target too small": (["--target-size", "1MiB"], 1, r"target too small: the smallest recipe, MOE_\w+, needs [\d.]+ GiB, got 0\.00 GiB; --mtp drop saves"),
    "split too small": (["--split-max-size", "1KB"], 1, r"--split-max-size too small: token_embd\.weight alone has \d+ bytes, got 1000"),
    "type without its imatrix": (["--type", "IQ2_XXS"], 1, r"imatrix needed: IQ2_XXS makes blk.* IQ2_XXS \(\d+ such tensors\), which is garbage without one; pass --imatrix"),
    "missing imatrix": (["--imatrix", "none.gguf"], 1, r"cannot open none\.gguf: No such file"),
    "unknown mtp mode": (["--mtp", "some"], 2, r"'--mtp': 'some' is not one of 'keep', 'separate', 'drop', 'only'; see convert-step35 plan --help"),
    "unknown option": (["--tpye", "Q8_0"], 2, r"No such option.*--tpye.*--type.*; see convert-step35 plan --help"),
    "option without value": (["--type"], 2, r"Option '--type' requires an argument|unknown type: .* got '--json'"),
    "second argument": (["more"], 2, r"unexpected extra argument.*more"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_a_slip_in_an_option_is_one_line(checkpoint: Path, case: str) -> None:
    options, exit_code, message = OPTIONS[case]
    refused("plan", checkpoint, *options, exit_code=exit_code, message=message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], r"No such command 'convert'.*; see convert-step35 --help"),
        (["plan"], r"Missing argument 'CHECKPOINT'; see convert-step35 plan --help"),
        (["run", "somewhere"], r"Missing argument 'OUT'; see convert-step35 run --help"),
        (["run", "a", "b.gguf", "--threads", "0"], r"'--threads': 0 is not in the range 1<=x<=1024"),
        (["verify", "a.gguf", "--full"], r"--full needs --against CKPT; see convert-step35 verify --help"),
        (["verify", "a.gguf", "--imatrix", "i.gguf"], r"--imatrix needs --against CKPT"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str) -> None:
    done = convert_step35(*arguments)
    assert (
        (done.exit_code, done.out) == (2, "")
        and re.search(f"^convert-step35: error: .*{message}", done.err)
        and done.err.count("\n") == 1
    )


# Slips in what is read


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """A checkpoint to be spoiled."""
    return write_checkpoint(tmp_path / "spoiled", SMALL, sparse=True)


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    refused(
        "plan",
        tmp_path / "none",
        exit_code=1,
        message=r"no checkpoint: .*/none expected a folder with config.json and safetensors, got nothing; give the checkpoint's folder",
    )


def test_a_file_instead_of_the_folder_is_one_line(made: Path, tmp_path: Path) -> None:
    refused(
        "run",
        made,
        tmp_path / "out.gguf",
        exit_code=1,
        message=r"no checkpoint: .*made\.gguf expected a folder with .*, got a file; give the checkpoint's folder",
    )


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    refused(
        "plan",
        tmp_path,
        exit_code=1,
        message=r"no checkpoint: .* expected config\.json and safetensors in it, got no config\.json",
    )


def test_a_folder_without_weights_is_one_line(spoiled: Path) -> None:
    for path in spoiled.glob("*.safetensors*"):
        path.unlink()
    refused(
        "plan",
        spoiled,
        exit_code=1,
        message=r"no weights: .* expected model\.safetensors\.index\.json or model\.safetensors, got neither",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"invalid JSON: .*config\.json at line 1, column 2"),
        ("config.json", "[]", r"invalid JSON: .*config\.json expected an object, got list"),
        ("config.json", '{"architectures": ["LlamaForCausalLM"]}', r"only Step-3\.5 and 3\.7 convert here"),
        ("tokenizer.json", "{}", r"tokenizer\.json: model expected BPE with a vocab, got None"),
        (
            "generation_config.json",
            '{"top_k": 1e9}',
            r"generation_config\.json: top_k expected a whole number of -1 or more, got 1000000000\.0",
        ),
        (
            "generation_config.json",
            '{"temperature": "hot"}',
            r"generation_config\.json: temperature expected a number of -1 or more, got 'hot'",
        ),
        (
            "model-00002.safetensors",
            "",
            r"damaged .*model-00002\.safetensors expected at least 8 bytes, got 0; download the file again",
        ),
        (
            "model-00002.safetensors",
            "version https://git-lfs.github.com/spec/v1\n",
            r"is a Git LFS pointer; fetch the (real )?file with git lfs pull",
        ),
    ],
)
def test_a_spoiled_file_of_the_checkpoint_is_one_line(spoiled: Path, name: str, content: str, message: str) -> None:
    (spoiled / name).write_text(content)
    refused("plan", spoiled, exit_code=1, message=message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model-00001.safetensors"])
def test_a_folder_in_place_of_a_file_is_one_line(spoiled: Path, name: str) -> None:
    (spoiled / name).unlink()
    (spoiled / name).mkdir()
    refused("plan", spoiled, exit_code=1, message=rf"{name}.*expected a regular file")


@not_root
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001.safetensors", "."])
def test_an_unreadable_file_is_one_line(spoiled: Path, name: str) -> None:
    (spoiled / name).chmod(0)
    try:
        refused("plan", spoiled, exit_code=1, message="Permission denied")
    finally:
        (spoiled / name).chmod(0o700)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("imatrix.datasets", V.UINT32, 3), r"imatrix\.datasets expected a list of names, got 3"),
        (Entry("imatrix.datasets", V.UINT32, (3,)), r"imatrix\.datasets expected a list of names, got \[3\]"),
        (Entry("imatrix.chunk_count", V.STRING, "many"), r"imatrix\.chunk_count expected a count, got 'many'"),
        (Entry("imatrix.chunk_count", V.INT32, -1), r"imatrix\.chunk_count expected a count, got -1"),
    ],
)
def test_an_imatrix_with_odd_keys_is_one_line(checkpoint: Path, tmp_path: Path, entry: Entry, message: str) -> None:
    names = [f"output.weight{suffix}" for suffix in (".in_sum2", ".counts")]
    infos = [
        TensorInfo(names[0], GGMLQuantizationType.F32, (1, 256), 0),
        TensorInfo(names[1], GGMLQuantizationType.F32, (1, 1), 1024),
    ]
    (tmp_path / "i.gguf").write_bytes(encode_header([entry], infos) + bytes(1056))
    refused(
        "plan",
        checkpoint,
        "--imatrix",
        tmp_path / "i.gguf",
        exit_code=1,
        message=rf"damaged imatrix: .*i\.gguf: {message}; make the imatrix again",
    )


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_gguf_is_one_line(tmp_path: Path, command: str) -> None:
    text, empty = tmp_path / "text.gguf", tmp_path / "empty.gguf"
    text.write_text("Hello, world!")
    empty.touch()
    refused(command, tmp_path / "none.gguf", exit_code=1, message=r"cannot open .*none\.gguf: No such file")
    refused(command, tmp_path, exit_code=1, message=r"expected a regular file, got a folder")
    refused(
        command, text, exit_code=1, message=r"not a GGUF file: .*text\.gguf expected to start with b'GGUF', got b'Hell'"
    )
    refused(command, empty, exit_code=1, message=r"empty\.gguf")


def test_a_missing_checkpoint_is_noticed_before_the_file_is_read(made: Path, tmp_path: Path) -> None:
    holes = edit_gguf(made, tmp_path / "holes.gguf", shapes={"blk": (2**40,)})
    refused("verify", holes, "--against", tmp_path / "none", exit_code=1, message=r"no checkpoint: .*/none expected")


# Slips in what is written


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out", "out.bin", "out.GGUF", ".gguf", "out.gguf.partial", "out-00001-of-00003.gguf"])
def test_a_name_that_is_no_gguf_is_a_wrong_usage(checkpoint: Path, tmp_path: Path, name: str) -> None:
    refused(
        "run",
        checkpoint,
        tmp_path / name,
        exit_code=2,
        message=rf"OUT expected a name that .*, got .*{re.escape(name)}.*; see convert-step35 run --help",
    )
    assert left(tmp_path) == []


def test_a_missing_folder_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    refused(
        "run", checkpoint, tmp_path / "no" / "out.gguf", exit_code=1, message=r"no such folder: .*/no; create it first"
    )


def test_a_folder_with_the_name_of_the_output_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").mkdir()
    refused(
        "run",
        checkpoint,
        tmp_path / "out.gguf",
        "--overwrite",
        exit_code=1,
        message=r"out\.gguf is a folder; choose another name",
    )
    assert left(tmp_path) == ["out.gguf"]


@not_root
def test_a_read_only_folder_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        refused("run", checkpoint, tmp_path / "out.gguf", exit_code=1, message=r"out\.gguf\S*: Permission denied")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_in_place_of_the_report_is_noticed_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.report.json").mkdir()
    refused(
        "run",
        checkpoint,
        tmp_path / "out.gguf",
        exit_code=1,
        message=r"out\.gguf\.report\.json is a folder; choose another name",
    )
    assert left(tmp_path) == ["out.gguf.report.json"]


def test_an_existing_file_stays_unless_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    refused("run", checkpoint, out, exit_code=1, message=r"out\.gguf exists; choose another name or pass --overwrite")
    assert out.read_text() == "mine" and left(tmp_path) == ["out.gguf"]
    assert convert_step35("run", checkpoint, out, "--overwrite").exit_code == 0
    assert out.read_bytes()[:4] == b"GGUF" and left(tmp_path) == ["out.gguf", "out.gguf.report.json"]


def test_an_existing_side_file_stays_too(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mtp-out.gguf").write_text("mine")
    refused("run", checkpoint, tmp_path / "out.gguf", "--mtp", "separate", exit_code=1, message=r"mtp-out\.gguf exists")
    assert left(tmp_path) == ["mtp-out.gguf"]


def test_restart_removes_what_a_run_with_other_options_left(checkpoint: Path, tmp_path: Path) -> None:
    """A hundred gigabytes of shards that no other command would ever remove."""
    stale = ["out.gguf.partial", "mtp-out.gguf.partial", "out-00002-of-00003.gguf.partial", "out.gguf.journal"]
    for name in (*stale, "other.gguf.partial"):
        (tmp_path / name).write_text("stale")
    assert convert_step35("run", checkpoint, tmp_path / "out.gguf", "--restart").exit_code == 0
    assert left(tmp_path) == ["other.gguf.partial", "out.gguf", "out.gguf.report.json"]


def test_debug_shows_the_traceback_before_the_same_line(tmp_path: Path) -> None:
    plain = convert_step35("plan", tmp_path)
    for arguments in (("--debug", "plan", tmp_path), ("plan", tmp_path, "--debug")):
        done = convert_step35(*arguments)
        assert done.exit_code == 1 and done.err.startswith("Traceback") and done.err.endswith(plain.err)


def test_after_two_dashes_debug_is_a_name() -> None:
    done = convert_step35("inspect", "--", "--debug")
    assert done.err == "convert-step35: error: cannot open --debug: No such file or directory\n"


# Names


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["with spaces", "ünï-チェックポイント", "-dash", "quote'\"$(x)", "[red]markup", "wide\N{IDEOGRAPHIC SPACE}space"],
)
def test_any_name_of_folder_and_file_will_do(tmp_path: Path, name: str) -> None:
    folder, out = write_checkpoint(tmp_path / name, SMALL, sparse=True), tmp_path / f"{name}.gguf"
    assert f"  {name}.gguf  " in convert_step35("plan", folder).out
    done = convert_step35("run", folder, out, "--type", "MXFP4_MOE")
    assert (done.exit_code, done.err) == (0, "") and f"wrote {out}  " in done.out
    assert convert_step35("inspect", out, "--json").data["name"] == name
    assert convert_step35("verify", out).out.startswith(f"{out}: sound; ")


def test_a_folder_whose_name_is_not_utf8_converts(tmp_path: Path) -> None:
    """The metadata must be UTF-8, and the terminal may refuse to print the name."""
    name, out = os.fsdecode(b"bytes-\xff"), tmp_path / "out.gguf"
    folder = write_checkpoint(tmp_path / name, SMALL, sparse=True)
    assert convert_step35("run", folder, out, "--type", "MXFP4_MOE").exit_code == 0
    assert convert_step35("inspect", out, "--json").data["name"] == "bytes-\N{REPLACEMENT CHARACTER}"
    assert r"  bytes-\udcff.gguf  " in convert_step35("plan", folder).out


@pytest.mark.parametrize("name", [os.fsdecode(b"bytes-\xff.gguf"), "two\nlines.gguf", "\x1b[2J.gguf"])
def test_an_output_name_that_no_terminal_can_show_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    refused(
        "run",
        checkpoint,
        tmp_path / name,
        exit_code=2,
        message="OUT expected a name of UTF-8 without control characters, got '/",
    )


# Terminals, pipes and signals


def test_a_pipe_gets_no_progress_no_colours_and_no_folded_lines(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / ("long" * 50), SMALL, sparse=True)
    out = tmp_path / ("name" * 50 + ".gguf")
    done = subprocess.run(
        [*COMMAND, "run", folder, out], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert (
        (done.returncode, done.stderr) == (0, "")
        and done.stdout.startswith(f"wrote {out}  ")
        and "\x1b" not in done.stdout
    )


def test_a_pipe_that_closes_early_is_no_traceback(checkpoint: Path) -> None:
    with subprocess.Popen([*COMMAND, "plan", checkpoint], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def on_terminal(*arguments: object, columns: int = 80) -> str:
    """What a command shows on a terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ):
        os.close(theirs)
        shown = b""
        # The terminal of a finished process ends in EIO.
        while data := _read(ours):
            shown += data
    os.close(ours)
    return shown.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def lines(shown: str) -> list[str]:
    """The lines as the eye sees them."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n").splitlines()


def test_a_terminal_gets_a_progress_bar_that_goes_away(checkpoint: Path, tmp_path: Path) -> None:
    shown = on_terminal("run", checkpoint, tmp_path / "out.gguf")
    assert "converting" in shown and "GiB" in shown and shown.index("\x1b[?25l") < shown.index("\x1b[?25h")
    assert lines(shown)[-1].startswith("F32")


def test_verify_shows_how_far_it_is(checkpoint: Path, made: Path) -> None:
    shown = on_terminal("verify", made, "--against", checkpoint)
    assert "reading" in shown and "comparing" in shown and "GiB" in shown
    assert any(line.startswith(f"{made}: sound") for line in lines(shown))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers of the real shapes over holes."""
    return write_checkpoint(tmp_path_factory.mktemp("real") / "Step-3.5-Flash", REAL, sparse=True, n_shards=44)


@pytest.mark.slow
def test_the_real_plan_fits_80_columns_without_a_folded_row(real: Path) -> None:
    shown = lines(on_terminal("plan", real, "--type", "BF16"))
    assert max(map(len, shown)) <= 80
    rows = [line.split() for line in shown if line.startswith(("blk.", "token_embd", "output", "rope_freqs"))]
    assert len(rows) == 805 and all(row[-2] in ("BF16", "F32") and row[-1].replace(",", "").isdigit() for row in rows)


@pytest.mark.slow
def test_the_tables_fit_80_columns(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    assert max(map(len, convert_step35("recipes").out.partition("\n\n")[0].splitlines())) <= 80
    for arguments in (
        ["recipes"],
        ["inspect", made],
        ["verify", made],
        ["run", checkpoint, tmp_path / "a.gguf", "--type", "Q4_K_M"],
    ):
        assert max(map(len, lines(on_terminal(*arguments)))) <= 80, arguments


def test_what_was_made_of_the_real_model_fits_80_columns_whatever_quantized_it() -> None:
    """With 16 lanes the table was 81 columns wide, and the last letter of a name fell into a line of its own."""
    name = "blk.44.ffn_down_shexp.weight"
    tensor = {"name": name, "type": "IQ3_XXS", "nmse": 1.234e-3, "n_bytes": 105_000_000_000}
    report = {"quantizers": {"IQ3_XXS": "native, 16 lanes"}, "tensors": [tensor] * 805}
    report["totals"] = {"bytes_by_type": {"IQ3_XXS": 199 * 10**9}, "tensors": 805, "bits_per_weight": 4.25}
    shown = io.StringIO()
    Console(width=80, file=shown).print(tables.report_summary(Plan("MOE_IQ2_XS_IQ3_XXS", (), ()), report))
    assert [len(line.split()) for line in shown.getvalue().splitlines()[1:]] == [9, 8]


@pytest.mark.slow
def test_every_mtp_mode_plans_the_real_model(real: Path) -> None:
    """`--mtp only` asked for the dtype of experts that it had not read."""
    tensors = {
        mode: len(convert_step35("plan", real, "--mtp", mode, "--json").data["tensors"])
        for mode in ("keep", "separate", "drop", "only")
    }
    assert tensors == {"keep": 805, "separate": 754 + 55, "drop": 754, "only": 55}
    assert convert_step35("plan", real, "--mtp", "only").out.startswith("Step-3.5-Flash: 45 layers and 3 MTP heads")


def test_a_target_size_picks_the_best_recipe_that_fits(real: Path) -> None:
    planned = convert_step35("plan", real, "--target-size", "105GiB", "--json").data
    assert planned["recipe"] == "MOE_IQ4_XS" and planned["totals"]["bytes"] <= 105 * 2**30


def interrupted(command: list[Any], partial: Path) -> Done:
    """Run a command and send it SIGINT as soon as a partial file holds some tensor data."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), preexec_fn=accept_interrupts, **pipes) as process:
        while process.poll() is None and not (partial.exists() and partial.read_bytes()[2**19 :].strip(b"\0")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    return Done(process.returncode, out, err)


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    command = [*COMMAND, "run", checkpoint, out, "--type", "IQ4_XS", "--threads", "1"]
    stopped = interrupted(command, tmp_path / "out.gguf.partial")
    assert (stopped.exit_code, stopped.out) == (130, "")
    assert stopped.err.strip() == "convert-step35: stopped; the same command goes on from here"
    assert left(tmp_path) == ["out.gguf.journal", "out.gguf.partial"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert convert_step35("run", checkpoint, whole, "--type", "IQ4_XS").exit_code == 0
    assert [hashlib.sha256(path.read_bytes()).digest() for path in (out, whole)] == [
        hashlib.sha256(whole.read_bytes()).digest()
    ] * 2
