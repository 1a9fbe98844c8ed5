"""Every problem and note that `inspect` knows, each made by tampering with a small sound file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import write_checkpoint
from convert_step35.cli.workspace import open_workspace
from convert_step35.errors import GgufError
from convert_step35.gguf.header import Entry
from convert_step35.gguf.reader import read_gguf
from convert_step35.inspection.inspection import Inspection, group_of, inspect_file
from convert_step35.models import load_models
from convert_step35.planning.plan import ConversionOptions, MtpMode
from convert_step35.writing.report import to_json
from edited_gguf import edit_gguf

MODELS = load_models()


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes files as `run` would lay them out, with holes for data: inspect reads headers only."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", sparse=True)

    def plan(name: str, mtp: str = "keep", split: int | None = None) -> Path:
        folder = tmp_path_factory.mktemp("planned")
        mode = MtpMode(mtp)
        options = ConversionOptions(folder / name, "Q4_K_M", mtp=mode, split_max_bytes=split)
        files = open_workspace(checkpoint, MODELS, mtp=mode).plan(options, MODELS).files
        for file in files:
            with file.path.open("wb") as out:
                out.write(file.header)
                out.truncate(file.n_bytes)
        return files[0].path

    return plan


@pytest.fixture(scope="module")
def sound(planned: Callable[..., Path]) -> Path:
    return planned("sound.gguf")


def inspected(path: Path) -> Inspection:
    found = inspect_file(path, MODELS)
    assert json.loads(to_json(found.as_json()))["files"] == list(found.files)
    assert all(
        line.isprintable() for line in (*found.problems, *found.notes, found.name, found.template, found.file_type)
    )
    return found


# Sound files


def test_a_sound_file_has_neither_problems_nor_notes(sound: Path) -> None:
    found = inspected(sound)
    assert (found.problems, found.notes) == ((), ())
    assert (found.n_trunk_layers, found.n_mtp_declared, found.n_mtp_complete, found.n_tensors) == (6, 3, 3, 142)
    assert (found.name, found.file_type, found.recipe, found.context_length) == (
        "tiny",
        "MOSTLY_Q4_K_M",
        "Q4_K_M",
        262144,
    )
    assert found.n_bytes == sound.stat().st_size


def test_the_type_map_accounts_for_every_tensor_and_byte(sound: Path) -> None:
    found = inspected(sound)
    assert sum(use.n_tensors for use in found.types) == found.n_tensors
    assert sum(use.n_bytes for use in found.types) == sum(
        tensor.n_bytes for tensor in read_gguf(sound).tensors.values()
    )
    assert {use.group for use in found.types} == {
        "routed experts",
        "shared experts",
        "attention",
        "dense layers",
        "embedding and output",
        "MTP heads",
        "norms and router",
    }


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("token_embd.weight", "embedding and output"),
        ("output.weight", "embedding and output"),
        ("output_norm.weight", "norms and router"),
        ("rope_freqs.weight", "norms and router"),
        ("blk.3.exp_probs_b.bias", "norms and router"),
        ("blk.3.ffn_gate_inp.weight", "norms and router"),
        ("blk.3.ffn_gate_exps.weight", "routed experts"),
        ("blk.3.ffn_gate_shexp.weight", "shared experts"),
        ("blk.0.ffn_gate.weight", "dense layers"),
        ("blk.0.attn_gate.weight", "attention"),
        ("blk.6.attn_q.weight", "MTP heads"),
        ("blk.6.nextn.eh_proj.weight", "MTP heads"),
        ("blk.x.attn_q.weight", "other"),
        ("blk", "other"),
    ],
)
def test_a_tensor_has_its_group(name: str, group: str) -> None:
    assert group_of(name, n_trunk=6) == group


def test_a_known_template_is_named_and_another_is_told_by_its_digest(sound: Path, tmp_path: Path) -> None:
    assert inspected(sound).template == "step-3.5-flash"
    other = edit_gguf(sound, tmp_path / "other.gguf", metadata={"tokenizer.chat_template": "{{ messages }}"})
    assert inspected(other).template.startswith("unknown (")


# Problems

PROBLEMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing tensor": ({"without": ("blk.4.ffn_up_exps.weight",)}, ["blk.4.ffn_up_exps.weight is missing"]),
    "missing first norm": ({"without": ("blk.0.attn_norm.weight",)}, ["blk.0.attn_norm.weight is missing"]),
    "missing embedding": ({"without": ("token_embd.weight",)}, ["token_embd.weight is missing"]),
    "missing layer": (
        {"without": ("blk.1.",)},
        ["blk.1.attn_norm.weight is missing", "blk.1.attn_q.weight is missing", "blk.1.attn_k.weight is missing", "... and 9 more tensors"],
    ),
    "misshaped tensor": ({"shapes": {"blk.1.attn_gate.weight": (4, 256)}}, ["blk.1.attn_gate.weight expected shape [8, 256], got [4, 256]"]),
    "tensor of no layer": ({"shapes": {"blk.9.attn_norm.weight": (256,)}}, ["'blk.9.attn_norm.weight' is no part of Step-3.5: llama.cpp refuses the file"]),
    "tensor of no name": ({"shapes": {"blk": ()}}, ["'blk' is no part of Step-3.5: llama.cpp refuses the file"]),
    "one head of three": (
        {"without": ("blk.7.", "blk.8.")},
        ["1 of 3 MTP heads: llama.cpp loads all or none; add the others from the checkpoint's first shards (--mtp only)"],
    ),
    "half a head": ({"without": ("blk.8.nextn.eh_proj.weight",)}, ["blk.8.nextn.eh_proj.weight is missing"]),
    "rope.dimension_count": (
        {"metadata": {"step35.rope.dimension_count": Entry("step35.rope.dimension_count", V.UINT32, 32)}},
        ["rope.dimension_count is written: llama.cpp halves it and both kinds of layers rotate wrongly; convert again"],
    ),
    "softmax router": ({"metadata": {"step35.expert_gating_func": 1}}, ["expert_gating_func expected 2 (sigmoid), got 1: the router picks other experts; convert again"]),
    "MTP layer as full attention": (
        {"metadata": {"step35.attention.sliding_window_pattern": [False, True, True, True] * 2 + [False]}},
        ["an MTP layer is marked as full attention; Step-3.5's are sliding: drafts will be poor, convert again"],
    ),
    "clamps of zero": (
        {"metadata": {"step35.swiglu_clamp_exp": [0.0] * 9}},
        ["no SwiGLU clamps: the last layers' limits are missing and long answers collapse; convert again"],
    ),
    "no clamps": (
        {"metadata": {"step35.swiglu_clamp_exp": None, "step35.swiglu_clamp_shexp": None}},
        ["no SwiGLU clamps: the last layers' limits are missing and long answers collapse; convert again"],
    ),
    "another pre-tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": "llama\x1b[2J"}},
        [r"tokenizer.ggml.pre expected deepseek-v3, got 'llama\x1b[2J': prompts are split into other tokens than in training"],
    ),
    "no template": ({"metadata": {"tokenizer.chat_template": None}}, ["no chat template: chats will be formatted by guesswork"]),
    "template that is no text": (
        {"metadata": {"tokenizer.chat_template": Entry("tokenizer.chat_template", V.UINT8, 1)}},
        ["no chat template: chats will be formatted by guesswork"],
    ),
    "no eos": ({"metadata": {"tokenizer.ggml.eos_token_id": None}}, ["no eos_token_id: llama.cpp takes id 11 instead, and answers end at that token"]),
    "short token types": ({"metadata": {"tokenizer.ggml.token_type": [1, 1]}}, ["tokenizer.ggml.token_type expected 2048 types, got 2; convert again"]),
    "no token types": ({"metadata": {"tokenizer.ggml.token_type": None}}, ["tokenizer.ggml.token_type expected 2048 types, got None; convert again"]),
    "no end of turn": (
        {"metadata": {"tokenizer.ggml.tokens": [str(i) for i in range(2048)]}},
        ["no <|im_end|> token: answers will not end"],
    ),
    "end of turn as text": (
        {"metadata": {"tokenizer.ggml.token_type": [1] * 2048}},
        ["<|im_end|> is not a control token: it will show in answers"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_is_found_and_said_alone(sound: Path, tmp_path: Path, case: str) -> None:
    changes, problems = PROBLEMS[case]
    assert list(inspected(edit_gguf(sound, tmp_path / "edited.gguf", **changes)).problems) == problems


def test_several_problems_are_all_said(sound: Path, tmp_path: Path) -> None:
    both = edit_gguf(
        sound, tmp_path / "both.gguf", without=("blk.0.attn_norm.weight",), metadata={"tokenizer.chat_template": None}
    )
    assert [problem.split(" ")[0] for problem in inspected(both).problems] == ["blk.0.attn_norm.weight", "no"]


def test_a_name_with_terminal_escapes_is_shown_without_them(sound: Path, tmp_path: Path) -> None:
    """A hostile general.name could clear the screen or fake the verdict."""
    changes = {"general.name": "x\x1b[2J\rno problems", "convert_step35.recipe": "y" * 200}
    found = inspected(edit_gguf(sound, tmp_path / "edited.gguf", metadata=changes))
    assert (found.name, found.recipe) == ("x?[2J?no problems", "y" * 80 + "...")


# Notes, and files of parts


def test_a_file_without_mtp_says_so(planned: Callable[..., Path], sound: Path, tmp_path: Path) -> None:
    note = "no MTP heads: runs without drafting; make a side file with convert-step35 run --mtp only"
    dropped = inspected(planned("trunk.gguf", mtp="drop"))
    assert (dropped.notes, dropped.problems, dropped.n_trunk_layers, dropped.n_mtp_declared) == ((note,), (), 6, 0)
    # llama.cpp also loads a trunk that declares heads which it does not hold.
    declared = inspected(edit_gguf(sound, tmp_path / "declared.gguf", without=("blk.6.", "blk.7.", "blk.8.")))
    assert (declared.notes, declared.problems, declared.n_mtp_declared, declared.n_mtp_complete) == ((note,), (), 3, 0)


def test_a_file_of_heads_alone_says_so(planned: Callable[..., Path]) -> None:
    found = inspected(planned("mtp.gguf", mtp="only"))
    assert found.notes == ("MTP heads only: a draft file, to be used beside a trunk file",)
    assert (found.problems, found.n_trunk_layers, found.n_mtp_complete, found.n_tensors) == ((), 0, 3, 55)


def test_a_head_missing_from_a_file_of_heads_is_a_problem(planned: Callable[..., Path], tmp_path: Path) -> None:
    found = inspected(edit_gguf(planned("mtp.gguf", mtp="only"), tmp_path / "two.gguf", without=("blk.7.",)))
    assert found.n_mtp_complete == 2 and [problem.split(":")[0] for problem in found.problems] == ["2 of 3 MTP heads"]


def test_missing_rope_factors_are_a_note(sound: Path, tmp_path: Path) -> None:
    found = inspected(edit_gguf(sound, tmp_path / "edited.gguf", without=("rope_freqs.weight",)))
    assert found.problems == () and found.notes == (
        "no rope_freqs.weight: the full-attention layers rotate without llama3 scaling, which Step-3.5 has",
    )


# Shards


@pytest.fixture
def shards(planned: Callable[..., Path]) -> list[Path]:
    first = planned("split.gguf", split=2 * 2**20)
    return sorted(first.parent.glob("split-*.gguf"))


def test_shards_are_one_model_from_any_of_their_names(shards: list[Path], sound: Path) -> None:
    assert len(shards) >= 3
    for shard in shards:
        found = inspected(shard)
        assert found.files == tuple(path.name for path in shards)
        assert (found.problems, found.types, found.n_bytes) == (
            (),
            inspected(sound).types,
            sum(path.stat().st_size for path in shards),
        )


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    refused(
        shards[0], rf"missing shard: .* expected {len(shards)} shards, got none named {shards[1].name}; download it"
    )


def test_a_renamed_shard_is_refused(shards: list[Path]) -> None:
    n = len(shards)
    shards[1].rename(shards[1].with_name("other.gguf"))
    refused(
        shards[1].with_name("other.gguf"),
        rf"misnamed shard: .*other.gguf expected shard 1 of 1 by its name, got 2 of {n} by its metadata",
    )


def test_swapped_shards_are_refused(shards: list[Path]) -> None:
    spare = shards[0].with_name("spare")
    shards[0].rename(spare)
    shards[1].rename(shards[0])
    spare.rename(shards[1])
    refused(shards[0], rf"{shards[0].name} expected shard 1 of {len(shards)} by its name, got 2 of {len(shards)}")


@pytest.mark.parametrize("name", ["a-00000-of-00003.gguf", "a-00004-of-00003.gguf", "a-00001-of-00000.gguf"])
def test_a_shard_number_out_of_range_is_refused(sound: Path, tmp_path: Path, name: str) -> None:
    path = edit_gguf(sound, tmp_path / name)
    refused(path, r"misnamed shard: .* expected a number of 1 to \d, got \d; name the file as it was")


def test_a_tensor_in_two_shards_is_refused(shards: list[Path], tmp_path: Path) -> None:
    double = edit_gguf(shards[1], tmp_path / "double.gguf", shapes={"token_embd.weight": (1, 1)})
    double.replace(shards[1])
    refused(shards[0], rf"duplicate tensor: 'token_embd.weight' stands in {shards[0].name} and in {shards[1].name}")


# Files that are no such model at all


def refused(path: Path, message: str) -> None:
    with pytest.raises(GgufError, match=message) as caught:
        inspect_file(path, MODELS)
    assert str(caught.value).isascii() and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "llama"}, r"another architecture: .*edited.gguf expected step35, got 'llama'$"),
        ({"general.architecture": "Step35v1"}, r"got 'Step35v1'; it was made for StepFun's own fork"),
        ({"general.architecture": None}, r"expected step35, got None"),
        ({"step35.block_count": None}, r"wrong metadata: .*edited.gguf: step35.block_count expected int, got None; convert the checkpoint again"),
        ({"step35.block_count": 2**32 - 1}, r"step35.block_count expected 1 to 512, got 4294967295"),
        ({"step35.block_count": 8}, r"step35.attention.sliding_window_pattern expected 8 values, got 9;"),
        ({"step35.nextn_predict_layers": 9}, r"step35.nextn_predict_layers expected less than block_count, 9, got 9"),
        ({"step35.leading_dense_block_count": 6}, r"step35.leading_dense_block_count expected less than the trunk's 6 layers, got 6"),
        ({"step35.attention.head_count": Entry("step35.attention.head_count", V.STRING, ("8",) * 9)}, r"head_count expected 9 values of int, got '8'"),
        ({"step35.rope.freq_base": Entry("step35.rope.freq_base", V.UINT32, 5)}, r"step35.rope.freq_base expected float, got 5"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer.ggml.tokens expected a list of texts, got None"),
        ({"tokenizer.ggml.tokens": Entry("tokenizer.ggml.tokens", V.INT32, (1,) * 99)}, r"tokens expected a list of texts, got \[1, 1, .{60,90}\.\.\."),
    ],
)  # fmt: skip
def test_metadata_that_describes_no_model_is_named(
    sound: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    refused(edit_gguf(sound, tmp_path / "edited.gguf", metadata=metadata), message)


def test_one_value_for_all_layers_is_as_good_as_a_list(sound: Path, tmp_path: Path) -> None:
    scalar = Entry("step35.attention.head_count_kv", V.UINT32, 2)
    assert inspected(edit_gguf(sound, tmp_path / "edited.gguf", metadata={scalar.key: scalar})).problems == ()


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_as_an_incomplete_download(sound: Path, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.gguf"
    data = sound.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(path, "incomplete|not a GGUF file")


JUNK = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: (V.UINT32, n)),
    st.integers(-9, 9).map(lambda n: (V.INT32, n)),
    st.floats(width=32).map(lambda x: (V.FLOAT32, x)),
    st.booleans().map(lambda b: (V.BOOL, b)),
    st.text(st.characters(codec="utf-8"), max_size=5).map(lambda text: (V.STRING, text)),
    st.lists(st.integers(0, 9), max_size=9).map(lambda numbers: (V.INT32, tuple(numbers))),
    st.lists(st.booleans(), min_size=9, max_size=9).map(lambda bits: (V.BOOL, tuple(bits))),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=2), max_size=3).map(lambda texts: (V.STRING, tuple(texts))),
)


@pytest.fixture(scope="module")
def bare(sound: Path) -> Path:
    """All metadata and no tensors but one: small enough to be written a hundred times."""
    names = [name for name in read_gguf(sound).tensors if name != "output_norm.weight"]
    return edit_gguf(sound, sound.with_name("bare.gguf"), without=tuple(names))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_mutated_metadata_is_a_clean_error_or_a_verdict(
    bare: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(read_gguf(bare).metadata)), min_size=1, max_size=3, unique=True))
    junk = {key: data.draw(st.none() | JUNK.map(lambda item, key=key: Entry(key, *item))) for key in keys}
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.unlink(missing_ok=True)
    try:
        inspected(edit_gguf(bare, path, metadata=junk))
    except GgufError as exc:
        assert str(exc).isascii() and str(exc).isprintable()
