"""The MTP heads at another type: in a conversion, and in a GGUF that exists."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints import TINY, write_checkpoint
from command import Done, convert_step35
from convert_step35.gguf.model import open_model
from convert_step35.gguf.reader import GgufFile, read_gguf
from convert_step35.writing.rewriting import Made, entries_of, rewrite

SMALL = replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=2)
MTP = [sys.executable, "-m", "convert_step35", "mtp", "requantize"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("heads") / "small", SMALL)


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> dict[str, Path]:
    """One file of each kind: whole at BF16 and Q8_0, trunk alone, heads alone."""
    options = {
        "bf16": ["--type", "BF16"],
        "q8": ["--type", "Q8_0"],
        "trunk": ["--mtp", "drop"],
        "heads": ["--type", "BF16", "--mtp", "only"],
    }
    for name, flags in options.items():
        assert convert_step35("run", checkpoint, checkpoint.with_name(f"{name}.gguf"), *flags).exit_code == 0
    return {name: checkpoint.with_name(f"{name}.gguf") for name in options}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def data(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def types(path: Path) -> dict[str, str]:
    return {t.name: t.ggml_type.name for t in read_gguf(path).tensors.values()}


def is_head(name: str) -> bool:
    return name.startswith(("blk.4.", "blk.5.")) and "norm" not in name


# In a conversion


def test_the_heads_get_their_type_in_every_mode(checkpoint: Path) -> None:
    def planned(*options: object) -> dict[str, str]:
        done = convert_step35("plan", checkpoint, "--json", "--mtp-type", "q4_k", *options)
        return {f"{t['file']} {t['name']}": t["type"] for t in done.data["tensors"]}

    for options in (
        ["--type", "Q8_0"],
        ["--type", "MOE_IQ4_XS"],
        ["--type", "Q6_K"],
        ["--type", "BF16", "--mtp", "separate"],
        ["--mtp", "only"],
    ):
        found = planned(*options)
        heads = {name for name in found if is_head(name.split()[1])}
        side = {
            name for name in found if name.endswith(" output.weight") and (name.startswith("mtp-") or "only" in options)
        }
        assert len(heads) == 20 and all(found[name] == "Q4_K" for name in heads | side)
        assert not any(found[name] == "Q4_K" for name in found.keys() - heads - side), options


def test_an_override_comes_before_the_heads_type(checkpoint: Path) -> None:
    options = ["--mtp", "separate", "--type", "BF16", "--mtp-type", "Q4_K", "--tensor-type", "eh_proj=F32"]
    planned = convert_step35("plan", checkpoint, "--json", *options).data
    assert {t["type"] for t in planned["tensors"] if "eh_proj" in t["name"]} == {"F32"}
    assert planned["recipe"] == "BF16 eh_proj=F32 --mtp-type=Q4_K"


def test_f32_can_be_forced_under_a_recipe(checkpoint: Path) -> None:
    """ggml's number of F32 is 0, which was taken for no type."""
    planned = convert_step35(
        "plan", checkpoint, "--json", "--type", "MOE_Q6_K", "--tensor-type", "attn_q=F32", "--mtp-type", "F32"
    ).data
    assert {t["type"] for t in planned["tensors"] if "attn_q." in t["name"] or is_head(t["name"])} == {"F32"}


def test_a_target_size_counts_the_heads_as_they_will_be(checkpoint: Path) -> None:
    whole = convert_step35("plan", checkpoint, "--json", "--type", "MOE_Q8_0", "--mtp-type", "Q4_K").data["totals"][
        "bytes"
    ]
    for size, recipe in ((whole, "MOE_Q8_0"), (whole - 1, "MOE_Q6_K")):
        planned = convert_step35(
            "plan", checkpoint, "--json", "--target-size", f"{size / 1000}KB", "--mtp-type", "Q4_K"
        ).data
        assert planned["recipe"] == f"{recipe} --mtp-type=Q4_K" and planned["totals"]["bytes"] <= size


def test_a_type_for_heads_that_are_not_there_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", replace(SMALL, num_nextn_predict_layers=0))
    for arguments in ([bare], [checkpoint, "--mtp", "drop"]):
        refused(
            convert_step35("plan", *arguments, "--mtp-type", "Q4_K"),
            1,
            r"no MTP heads: --mtp-type Q4_K is for their matrices, and .*; leave it out",
        )
    refused(convert_step35("plan", checkpoint, "--mtp-type", "Q4KM"), 2, "unknown tensor type: .* got 'Q4KM'")
    refused(convert_step35("plan", checkpoint, "--mtp-type", "IQ2_XXS"), 1, "imatrix needed")


# In a file


def refused(done: Done, exit_code: int, message: str) -> None:
    assert (done.exit_code, done.out) == (exit_code, ""), done.err
    assert (
        done.err.startswith("convert-step35: error: ") and done.err.count("\n") == 1 and re.search(message, done.err)
    ), done.err


@pytest.mark.slow
@pytest.mark.parametrize(("source", "options"), [("bf16", []), ("heads", ["--mtp", "only"])])
def test_exact_heads_become_what_the_checkpoint_gives(
    checkpoint: Path, made: dict[str, Path], tmp_path: Path, source: str, options: list[str]
) -> None:
    direct, again = tmp_path / "direct.gguf", tmp_path / "again.gguf"
    assert convert_step35("run", checkpoint, direct, "--type", "BF16", "--mtp-type", "Q4_K", *options).exit_code == 0
    done = convert_step35("mtp", "requantize", made[source], again, "--type", "Q4_K")
    assert (done.exit_code, done.err) == (0, "") and "blk.4.nextn.shared_head_head.weight" in done.out
    assert again.read_bytes() == direct.read_bytes()
    assert convert_step35("verify", again, "--against", checkpoint).exit_code == 0


def test_everything_else_stays_as_it_is(checkpoint: Path, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = convert_step35("mtp", "requantize", made["q8"], out, "--type", "IQ4_XS", "--json")
    assert "note: the heads are Q8_0: quantized again from those values" in done.err
    before, after = read_gguf(made["q8"]), read_gguf(out)
    old, new = data(made["q8"]), data(out)
    changed = {name for name, kind in types(out).items() if kind != before.tensors[name].ggml_type.name}
    assert (
        changed
        == {name for name in before.tensors if is_head(name)}
        == {t["name"] for t in done.data["tensors"] if "was_type" in t}
    )
    assert {after.tensors[name].ggml_type.name for name in changed} == {"IQ4_XS"}
    assert all(new[name] == old[name] for name in before.tensors.keys() - changed)
    keys = {"convert_step35.recipe": "Q8_0 --mtp-type=IQ4_XS", "convert_step35.heads_requantized_from": "Q8_0"}
    assert after.metadata == before.metadata | keys


@pytest.mark.slow
def test_the_report_tells_the_digests_and_the_errors(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = convert_step35("mtp", "requantize", made["q8"], out, "--type", "Q4_K", "--json").data
    assert report == json.loads((tmp_path / "out.gguf.report.json").read_text())
    old, new = (
        {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(float) for t in gguf.GGUFReader(p).tensors}
        for p in (made["q8"], out)
    )
    stored = data(out)
    for entry in report["tensors"]:
        assert entry["sha256"] == hashlib.sha256(stored[entry["name"]]).hexdigest()
        if "was_type" in entry:
            x, q = old[entry["name"]], new[entry["name"]]
            assert entry["nmse"] == pytest.approx(((x - q) ** 2).sum() / (x**2).sum(), rel=1e-4)
    assert f"{len(report['tensors'])} digests compared with the report" in convert_step35("verify", out).out


def test_heads_that_were_lossy_are_not_held_against_the_checkpoint(
    checkpoint: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    out, twice = tmp_path / "out.gguf", tmp_path / "twice.gguf"
    convert_step35("mtp", "requantize", made["q8"], out, "--type", "Q6_K")
    convert_step35("mtp", "requantize", out, twice, "--type", "Q4_K")
    back = convert_step35("mtp", "requantize", twice, tmp_path / "back.gguf", "--type", "Q8_0")
    assert "note: Q8_0 takes more room than that, and brings back nothing of what was lost" in back.err
    done = convert_step35("verify", twice, "--against", checkpoint)
    assert (
        done.exit_code == 0
        and "note: the MTP heads were quantized again from Q8_0, then Q6_K: not compared" in done.out
    )


def test_what_cannot_be_requantized_is_one_line_and_leaves_nothing(
    checkpoint: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out" / "out.gguf"
    work.mkdir()
    out.parent.mkdir()
    assert convert_step35("run", checkpoint, work / "s.gguf", "--split-max-size", "4MB").exit_code == 0
    cut = work / "cut.gguf"
    cut.write_bytes(made["q8"].read_bytes()[:-5000])
    cases: dict[Path, tuple[str, int, str]] = {
        made["trunk"]: ("Q4_K", 1, r"no MTP heads: .*trunk\.gguf holds none; make a file of them .*--mtp only"),
        next(work.glob("s-00002*.gguf")): (
            "Q4_K",
            1,
            r"a shard: .*s-00002-of-\d+\.gguf expected a whole file; .*--mtp only --mtp-type",
        ),
        cut: ("Q4_K", 1, r"damaged GGUF file: .*cut\.gguf expected \d+ bytes, got \d+"),
        work / "none.gguf": ("Q4_K", 1, r"cannot open .*none\.gguf: No such file"),
        checkpoint / "config.json": ("Q4_K", 1, r"not a GGUF file"),
        made["q8"]: ("Q8_0", 1, r"nothing to do: all 20 matrices of the MTP heads in .*q8\.gguf are Q8_0 already"),
        made["bf16"]: ("IQ2_XXS", 1, r"imatrix needed: blk\.4\.attn_q\.weight as IQ2_XXS is garbage without one"),
        made["heads"]: ("Q9", 2, r"unknown tensor type: .* got 'Q9'"),
    }
    for source, (kind, exit_code, message) in cases.items():
        refused(convert_step35("mtp", "requantize", source, out, "--type", kind), exit_code, message)
    assert left(out.parent) == []


def test_out_is_never_the_file_itself_and_an_existing_one_stays(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    refused(
        convert_step35("mtp", "requantize", made["q8"], made["q8"], "--type", "Q4_K", "--overwrite"),
        2,
        "got the same; choose another name",
    )
    out.write_text("mine")
    refused(
        convert_step35("mtp", "requantize", made["q8"], out, "--type", "Q4_K"),
        1,
        r"out\.gguf exists; choose another name or pass --overwrite",
    )
    assert out.read_text() == "mine"
    assert convert_step35("mtp", "requantize", made["q8"], out, "--type", "Q4_K", "--overwrite").exit_code == 0
    assert left(tmp_path) == ["out.gguf", "out.gguf.report.json"]


def test_damage_in_a_head_is_named_and_leaves_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.gguf", tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    content = bytearray(made["bf16"].read_bytes())
    at = read_gguf(made["bf16"]).tensors["blk.5.nextn.eh_proj.weight"].offset
    content[at : at + 2] = np.array([0x7FC0], "<u2").tobytes()
    bad.write_bytes(content)
    refused(
        convert_step35("mtp", "requantize", bad, out, "--type", "Q4_K"),
        1,
        r"damaged GGUF file: .*bad\.gguf: blk\.5\.nextn\.eh_proj\.weight holds NaN or infinity",
    )
    assert left(out.parent) == []


@pytest.mark.slow
def test_a_full_disk_is_refused_and_the_old_file_stays(made: dict[str, Path], tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: both fail when the space is reserved."""
    (tmp_path / "out.gguf").write_text("mine")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = subprocess.run(
        [*MTP, made["q8"], tmp_path / "out.gguf", "--type", "Q4_K", "--overwrite"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 1 and "disk full" in done.stderr.splitlines()[-1]
    assert left(tmp_path) == ["out.gguf"] and (tmp_path / "out.gguf").read_text() == "mine"


@pytest.mark.slow
def test_the_runtimes_command_is_the_converters(made: dict[str, Path], tmp_path: Path) -> None:
    """`step35 mtp` only hands over: options, answers and exit codes are those of `convert-step35 mtp`."""
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", "from step35.cli import main; main()", "mtp", "requantize"]
    done = subprocess.run([*command, made["heads"], out, "--type", "Q4_K", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["files"][0]["name"] == "out.gguf"
    slip = subprocess.run([*command, made["heads"]], capture_output=True, text=True)
    assert (slip.returncode, slip.stderr.count("\n")) == (2, 1)


# Rewriting


def rewritten(path: Path, out: Path, **changes: Any) -> GgufFile:
    model = open_model(path)
    rewrite(model, out, entries_of(model.files[0]), changes.get("tensors", list(model.tensors.values())))
    return read_gguf(out)


def test_rewriting_without_a_change_gives_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    rewritten(made["q8"], tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == made["q8"].read_bytes()


def test_rewriting_keeps_an_alignment_and_every_type_of_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "other")
    writer.add_custom_alignment(256)
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("floats", [0.1, -2.5])
    writer.add_array("bools", [True, False])
    writer.add_array("numbers", [-3, 5])
    writer.add_int8("i8", -5)
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    for i, n in enumerate((3, 100, 1)):
        writer.add_tensor(f"t{i}", np.arange(n, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert file.alignment == 256
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_a_failure_in_the_middle_leaves_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    def broken():
        yield np.zeros(1024, np.uint8)
        raise KeyboardInterrupt

    tensor = Made("x", gguf.GGMLQuantizationType.F32, (512,), 2048, broken)
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        rewritten(made["q8"], tmp_path / "out.gguf", tensors=[tensor])
    assert left(tmp_path) == ["out.gguf"] and (tmp_path / "out.gguf").read_text() == "mine"


@pytest.mark.slow
def test_private_memory_does_not_grow_with_the_heads(tmp_path: Path) -> None:
    """A matrix of 340 MB is requantized with 240 MB of data segment in all."""
    shape = replace(
        TINY,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        hidden_size=9216,
        head_dim=64,
        moe_intermediate_size=256,
        moe_num_experts=1,
        moe_top_k=1,
        intermediate_size=256,
        vocab_size=2048,
    )
    folder = write_checkpoint(tmp_path / "c", shape, sparse=True)
    assert convert_step35("run", folder, tmp_path / "heads.gguf", "--mtp", "only", "--type", "BF16").exit_code == 0

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (240 * 10**6, 240 * 10**6))

    command = [*MTP, tmp_path / "heads.gguf", tmp_path / "out.gguf", "--type", "Q8_0", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert max(entry["n_bytes"] for entry in json.loads(done.stdout)["tensors"]) > 170 * 10**6
