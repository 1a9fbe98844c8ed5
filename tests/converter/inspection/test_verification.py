"""`verify` finds what is wrong with a finished file, and says nothing of a sound one."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import GGUFValueType as V

from checkpoints import TINY, write_checkpoint
from command import convert_step35
from convert_step35.gguf.header import Entry, TensorInfo, encode_header
from convert_step35.gguf.reader import read_gguf
from edited_gguf import edit_gguf

SMALL = replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=1)
EXPERTS = "blk.3.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verification") / "small", SMALL, n_shards=4)


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Path:
    return run(checkpoint, checkpoint.with_name("made.gguf"))


def run(checkpoint: Path, out: Path, *options: object, type_name: str = "Q8_0") -> Path:
    done = convert_step35("run", checkpoint, out, "--type", type_name, *options)
    assert done.exit_code == 0, done.err
    return out


def report_of(path: Path) -> Path:
    return path.with_name(path.name + ".report.json")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The file and its report, to be damaged."""
    for path in (made, report_of(made)):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / made.name


def problems(*arguments: object) -> list[str]:
    """What verify finds, its exit code checked against it."""
    done = convert_step35("verify", *arguments, "--json")
    assert done.err == "" and done.exit_code == (1 if done.data["problems"] else 0)
    assert done.data["ok"] == (not done.data["problems"])
    return done.data["problems"]


def flip(path: Path, name: str, position: int) -> None:
    offset = read_gguf(path).tensors[name].offset + position
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# Sound files


def test_a_sound_file_is_told_so_with_what_was_checked(checkpoint: Path, made: Path) -> None:
    done = convert_step35("verify", made, "--against", checkpoint, "--json")
    n = len(read_gguf(made).tensors)
    assert done.exit_code == 0 and done.err == ""
    assert done.data | {"compared_chunks": 0} == {
        "ok": True,
        "tensors": n,
        "digests": n,
        "compared_chunks": 0,
        "problems": [],
        "notes": [],
    }
    assert done.data["compared_chunks"] > n
    shown = convert_step35("verify", made)
    assert (shown.exit_code, shown.out) == (
        0,
        f"{made}: sound; {n} tensors read, {n} digests compared with the report\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q4_K_M", "MXFP4_MOE"])
def test_every_kind_of_type_is_made_again_to_the_byte(checkpoint: Path, tmp_path: Path, type_name: str) -> None:
    out = run(checkpoint, tmp_path / "out.gguf", type_name=type_name)
    assert problems(out, "--against", checkpoint, "--full") == []


@pytest.mark.slow
def test_files_of_parts_are_verified_against_the_whole_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "a.gguf", "--mtp", "separate")
    run(checkpoint, tmp_path / "b.gguf", "--split-max-size", "2MiB")
    shard = sorted(tmp_path.glob("b-*.gguf"))[1]
    for path in (tmp_path / "a.gguf", tmp_path / "mtp-a.gguf", shard):
        done = convert_step35("verify", path, "--against", checkpoint, "--json")
        assert done.exit_code == 0 and done.data["digests"] == done.data["tensors"] > 0


def test_an_mtp_file_needs_only_the_shards_it_came_from(checkpoint: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(checkpoint, some)
    index = json.loads((some / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        shard
        for name, shard in index.items()
        if not name.startswith("model.layers.") or name.startswith("model.layers.4.")
    }
    for shard in set(index.values()) - needed:
        (some / shard).unlink()
    assert set(index.values()) - needed
    assert problems(run(some, tmp_path / "mtp.gguf", "--mtp", "only"), "--against", some) == []


# Damage


def test_a_flipped_byte_is_found_by_the_report(copy: Path) -> None:
    flip(copy, EXPERTS, 70_000)
    (problem,) = problems(copy)
    assert problem.startswith(f"{EXPERTS} differs from the report: sha256 expected '") and problem.endswith(
        "; the file was changed or damaged"
    )


def test_a_flipped_byte_is_found_by_the_checkpoint(checkpoint: Path, copy: Path) -> None:
    report_of(copy).unlink()
    flip(copy, EXPERTS, 8)
    assert problems(copy, "--against", checkpoint) == [f"{EXPERTS} is not what the checkpoint gives as Q8_0"]


def test_full_compares_the_chunks_that_a_sample_skips(checkpoint: Path, copy: Path) -> None:
    """Of eight experts the sample takes four, the second not among them."""
    report_of(copy).unlink()
    flip(copy, EXPERTS, read_gguf(copy).tensors[EXPERTS].n_bytes // 8 + 8)
    assert problems(copy, "--against", checkpoint) == []
    assert problems(copy, "--against", checkpoint, "--full") == [f"{EXPERTS} is not what the checkpoint gives as Q8_0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        (
            "step35.attention.layer_norm_rms_epsilon",
            1e-6,
            "step35.attention.layer_norm_rms_epsilon expected 1e-05, got 9.99",
        ),
        ("step35.expert_gating_func", None, "step35.expert_gating_func expected 2, got None"),
        (
            "step35.swiglu_clamp_shexp",
            [0.0, 0.0, 16.0, 8.0, 0.0],
            "step35.swiglu_clamp_shexp expected 16.0 at 3, got 8.0",
        ),
        ("tokenizer.chat_template", "{{ evil }}", "tokenizer.chat_template expected "),
        ("tokenizer.ggml.eos_token_id", 11, "tokenizer.ggml.eos_token_id expected "),
        ("general.quantization_version", 1, "general.quantization_version expected 2, got 1"),
    ],
)
def test_changed_metadata_is_named_with_wanted_and_got(
    checkpoint: Path, made: Path, tmp_path: Path, key: str, value: object, problem: str
) -> None:
    edited = edit_gguf(made, tmp_path / "edited.gguf", metadata={key: value})
    (found,) = problems(edited, "--against", checkpoint)
    assert found.startswith(problem) and found.isprintable() and len(found) < 250


def test_a_key_that_the_checkpoint_does_not_give_is_a_problem(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    entry = Entry("tokenizer.ggml.suppress_tokens", V.INT32, (1,))
    edited = edit_gguf(made, tmp_path / "edited.gguf", metadata={entry.key: entry})
    assert problems(edited, "--against", checkpoint) == [
        "tokenizer.ggml.suppress_tokens expected nothing, got [1]: the checkpoint gives no such key"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("type_name", "position"), [("Q8_0", 0), ("Q4_K", 0), ("F32", 4)])
def test_nan_in_a_scale_or_a_value_is_found(checkpoint: Path, tmp_path: Path, type_name: str, position: int) -> None:
    path = run(checkpoint, tmp_path / "out.gguf", type_name=type_name)
    report_of(path).unlink()
    with path.open("r+b") as file:
        file.seek(read_gguf(path).tensors[EXPERTS].offset + position)
        file.write(np.float32(np.nan).tobytes() if type_name == "F32" else np.float16(np.nan).tobytes())
    assert problems(path) == [f"{EXPERTS} holds NaN or infinity; convert again"]


def test_the_problems_of_inspect_are_problems_of_verify(made: Path, tmp_path: Path) -> None:
    edited = edit_gguf(
        made, tmp_path / "edited.gguf", without=("blk.0.attn_q.weight",), metadata={"tokenizer.chat_template": None}
    )
    assert problems(edited) == [
        "blk.0.attn_q.weight is missing",
        "no chat template: chats will be formatted by guesswork",
    ]


def test_a_tensor_without_dimensions_is_read_like_any_other(made: Path, tmp_path: Path) -> None:
    assert problems(edit_gguf(made, tmp_path / "edited.gguf", shapes={"blk": ()})) == [
        "'blk' is no part of Step-3.5: llama.cpp refuses the file"
    ]


# The report


def test_without_a_report_the_rest_is_still_checked(copy: Path) -> None:
    report_of(copy).unlink()
    done = convert_step35("verify", copy)
    assert (done.exit_code, done.err) == (0, "") and done.out.endswith(
        "tensors read, no report beside it to compare with\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"tensors": 3}',
        '{"tensors": [3]}',
        '{"tensors": [{"file": "made.gguf"}]}',
        '{"tensors": [{"file": []}]}',
    ],
)
def test_a_damaged_report_is_named(copy: Path, text: str) -> None:
    report_of(copy).write_text(text)
    done = convert_step35("verify", copy)
    assert (done.exit_code, done.out) == (1, "")
    assert (
        done.err
        == f"convert-step35: error: damaged report: {report_of(copy)} expected the JSON that convert-step35 writes; remove it, or convert again\n"
    )


def test_the_report_of_another_file_does_not_matter(copy: Path) -> None:
    copy.with_name("a.gguf.report.json").write_text("damaged")
    assert problems(copy) == []


# Another checkpoint


def test_another_checkpoint_of_the_shape_gives_other_bytes(made: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "small", SMALL, seed=1)
    found = problems(made, "--against", other)
    assert {problem.split(" is not what the checkpoint gives as ")[0] for problem in found} == read_gguf(
        made
    ).tensors.keys() - {"rope_freqs.weight"}
    shown = convert_step35("verify", made, "--against", other).out.splitlines()
    assert "NOT sound" in shown[0] and len(shown) == 14
    assert shown[-1] == f"... and {len(found) - 12} more problems; --json has all"


def test_another_checkpoint_of_another_shape_is_told_by_keys_and_shapes(made: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "wide", replace(SMALL, hidden_size=512, num_hidden_layers=5), sparse=True)
    found = problems(made, "--against", other)
    assert "step35.embedding_length expected 512, got 256" in found
    assert "output_norm.weight expected the checkpoint's shape [512], got [256]; is this another checkpoint?" in found
    assert "blk.5.nextn.eh_proj.weight is missing, and the checkpoint has it" in found


def test_a_checkpoint_without_mtp_can_not_vouch_for_heads(made: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "small", SMALL, mtp_weights=False)
    done = convert_step35("verify", made, "--against", other)
    assert (done.exit_code, done.out) == (1, "")
    assert (
        done.err
        == f"convert-step35: error: no MTP weights: {other} holds none, and {made} has MTP heads; give the checkpoint that it was made of\n"
    )


def test_a_checkpoint_that_has_gone_bad_is_an_error(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    with (bad / "model-00001.safetensors").open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(b"\xff\x7f" * 256)
    done = convert_step35("verify", made, "--against", bad)
    assert (
        (done.exit_code, done.out) == (1, "")
        and "holds NaN or infinity" in done.err
        and len(done.err.splitlines()) == 1
    )


# Types that can't be made again as they are


def write_imatrix(path: Path, names: Iterable[str]) -> Path:
    """llama-imatrix's GGUF form with lognormal sums, one count for each expert of a stack."""
    infos, data, offset = [], [], 0
    for name in names:
        n = 8 if "_exps" in name else 1
        sums = np.random.default_rng(n).lognormal(size=(n, 256)).astype(np.float32)
        for suffix, values in ((".in_sum2", sums), (".counts", np.full((n, 1), 2, np.float32))):
            infos.append(TensorInfo(name + suffix, GGMLQuantizationType.F32, values.shape, offset))
            data.append(values.tobytes().ljust(-(-values.nbytes // 32) * 32, b"\0"))
            offset += len(data[-1])
    path.write_bytes(encode_header([], infos) + b"".join(data))
    return path


def test_a_file_made_with_an_imatrix_asks_for_it(checkpoint: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "i.gguf", [EXPERTS])
    out = run(checkpoint, tmp_path / "out.gguf", "--imatrix", imatrix, "--tensor-type", "ffn_up_exps=Q4_K")
    hint = (
        f"{EXPERTS} is not what the checkpoint gives as Q4_K; it was quantized with an imatrix, pass it with --imatrix"
    )
    assert problems(out, "--against", checkpoint) == [hint]
    assert problems(out, "--against", checkpoint, "--imatrix", imatrix) == []


@pytest.mark.slow
def test_a_type_that_needs_an_imatrix_is_not_compared_without(checkpoint: Path, tmp_path: Path) -> None:
    """Quantizing to IQ2_XXS without weights aborts the process in ggml."""
    imatrix = write_imatrix(tmp_path / "i.gguf", [EXPERTS])
    out = run(checkpoint, tmp_path / "out.gguf", "--imatrix", imatrix, "--tensor-type", "ffn_up_exps=IQ2_XXS")
    hint = f"{EXPERTS} was quantized to IQ2_XXS with an imatrix: not compared; pass it with --imatrix"
    assert problems(out, "--against", checkpoint) == [hint]
    assert problems(out, "--against", checkpoint, "--imatrix", imatrix) == []


def test_a_type_that_is_never_made_here_is_not_compared(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    edited = edit_gguf(made, tmp_path / "edited.gguf", types={"output_norm.weight": GGMLQuantizationType.I32})
    assert problems(edited, "--against", checkpoint) == [
        "output_norm.weight has the type I32, which this command can't make: not compared"
    ]
