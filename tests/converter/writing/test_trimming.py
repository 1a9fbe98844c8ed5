"""Heads with a trimmed vocabulary: made from a file, run on any llama.cpp, and the text stays the same."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import BUNDLED
from command import Done, convert_step35
from convert_step35.gguf.gguf_model import open_model
from convert_step35.gguf.gguf_reader import read_gguf
from convert_step35.inspection.inspection import inspect_file
from convert_step35.planning.models import load_models
from convert_step35.writing import trimming
from convert_step35.writing.rewriting import entries_of, rewrite
from convert_step35.writing.trimming import TRIMMED_ARCH, nearest_kept
from real_engine import open_engine
from step35.cli import cli
from step35.engine.decode_loop import begin, generate
from step35.engine.engine import Engine
from step35.errors import ModelError
from step35.native import draft_vocabulary
from step35.options import EngineOptions, ModelOptions
from step35.sampling.sampler import Sampling, choose_with_margin
from step35.sampling.token_chooser import Chooser
from tiny_model import tiny_gguf

N_VOCAB, N_KEPT = 2048, 700
TEXT = Path(gguf.quants.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    done = CliRunner().invoke(cli, ["count-tokens", str(tiny_gguf()), str(folder / "text.txt")])
    assert done.exit_code == 0, done.output
    (folder / "counts.json").write_text(done.output)
    return folder / "counts.json"


def trim(source: Path, counts: Path, out: Path, *options: object) -> Done:
    return convert_step35("mtp", "trim", source, out, "--vocab", N_KEPT, "--counts", counts, *options)


@pytest.fixture(scope="module")
def heads(counts: Path) -> Path:
    """The trimmed heads of the bundled checkpoint."""
    out = counts.with_name("heads.gguf")
    assert trim(tiny_gguf(), counts, out).exit_code == 0
    return out


# The file


def test_the_most_frequent_tokens_are_kept_row_by_row(heads: Path, counts: Path) -> None:
    ours, theirs = ({t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (heads, tiny_gguf()))
    tokens = read_gguf(heads).metadata["step35.draft.tokens"]
    n = np.array(json.loads(counts.read_text())["counts"])
    assert len(tokens) == N_KEPT and tokens == sorted(tokens) and n[tokens].sum() == np.sort(n)[-N_KEPT:].sum()
    assert not [name for name in ours if name.startswith(("blk.0.", "output."))]
    for name, rows in ours.items():
        is_trimmed = name == "token_embd.weight" or "shared_head_head" in name
        assert np.array_equal(rows, theirs[name][tokens] if is_trimmed else theirs[name]), name


def test_a_side_file_gives_the_same_heads_as_the_whole_model(heads: Path, counts: Path, tmp_path: Path) -> None:
    assert trim(tiny_gguf(mtp="only"), counts, tmp_path / "heads.gguf").exit_code == 0
    ours, theirs = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(p).tensors} for p in (tmp_path / "heads.gguf", heads)
    )
    assert ours == theirs


def test_counting_takes_the_models_own_tokens(counts: Path) -> None:
    with open_engine(EngineOptions(tiny_gguf(), draft="off", n_ctx=64, n_threads=1)) as engine:
        wanted = np.bincount(engine.tokenize(TEXT, add_bos=False), minlength=N_VOCAB)
    got = json.loads(counts.read_text())
    assert got["n_tokens"] == sum(got["counts"]) and len(got["counts"]) == N_VOCAB
    assert np.abs(np.array(got["counts"]) - wanted).sum() < 0.002 * wanted.sum()  # it is cut at ends of lines


@pytest.mark.parametrize(
    "vocab, text, said",
    [
        (N_VOCAB, None, "--vocab expected 1 to 2047 of the model's tokens, got 2048"),
        (9, '{"counts": [1, 2]}', "counts expected 2048 tokens as in the model, got 2; count with this model"),
        (
            9,
            '{"counts": [1, -2]}',
            "counts expected a list of whole numbers, one a token; make it with step35 count-tokens",
        ),
        (9, json.dumps({"counts": [0] * N_VOCAB}), "nothing was counted in"),
    ],
)
def test_what_cannot_be_trimmed_is_said_in_a_line(
    counts: Path, tmp_path: Path, vocab: int, text: str | None, said: str
) -> None:
    if text:
        (tmp_path / "counts.json").write_text(text)
        counts = tmp_path / "counts.json"
    done = convert_step35("mtp", "trim", tiny_gguf(), tmp_path / "heads.gguf", "--vocab", vocab, "--counts", counts)
    assert done.exit_code and said in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "heads.gguf").exists()


def test_shards_give_the_same_heads_as_one_file(heads: Path, counts: Path, tmp_path: Path) -> None:
    options = ("--type", "Q8_0", "--split-max-size", "4MB")
    assert convert_step35("run", BUNDLED, tmp_path / "s.gguf", *options).exit_code == 0
    shards = sorted(tmp_path.glob("s-0*.gguf"))
    assert len(shards) > 2
    for shard in (shards[0], shards[-1]):
        done = trim(shard, counts, tmp_path / "heads.gguf", "--overwrite")
        assert done.exit_code == 0, done.err
        assert (tmp_path / "heads.gguf").read_bytes() == heads.read_bytes()
    (tmp_path / "link.gguf").hardlink_to(shards[1])
    done = trim(shards[0], counts, tmp_path / "link.gguf", "--overwrite")
    assert done.exit_code == 2 and "OUT expected another file than" in done.err


def test_trimmed_heads_are_not_trimmed_or_compared_as_whole_ones(heads: Path, counts: Path, tmp_path: Path) -> None:
    for done in (trim(heads, counts, tmp_path / "again.gguf"), convert_step35("verify", heads, "--against", BUNDLED)):
        assert done.exit_code == 1 and f"expected step35, got '{TRIMMED_ARCH}'" in done.err, done.err


def test_inspect_shows_trimmed_heads(heads: Path) -> None:
    found = inspect_file(heads, load_models())
    assert (found.problems, found.n_trunk_layers, found.n_mtp_complete) == ((), 0, 3)
    assert found.notes[0].startswith(f"trimmed heads: {N_KEPT} of the model's {N_VOCAB} tokens can be drafted")
    done = convert_step35("inspect", heads)
    assert done.exit_code == 0 and "0 layers, 3 MTP heads" in done.out and "no problems found" in done.out, done.err
    assert convert_step35("verify", heads).exit_code == 0


@pytest.mark.parametrize("array, change", [("tokens", 1), ("tokens", -1), ("stand_ins", N_VOCAB)])
def test_inspect_names_arrays_that_contradict_each_other(heads: Path, tmp_path: Path, array: str, change: int) -> None:
    """The runtime refuses such a file."""
    model = open_model(heads)
    entries = [
        replace(e, value=(e.value[0] + change, *e.value[1:])) if e.key == f"step35.draft.{array}" else e
        for e in entries_of(model.files[0])
    ]
    rewrite(model, tmp_path / "bad.gguf", entries, list(model.tensors.values()))
    problems = inspect_file(tmp_path / "bad.gguf", load_models()).problems
    assert [p.startswith(f"draft.tokens expected {N_KEPT} ascending token ids") for p in problems] == [True]


@given(st.integers(1, 40), st.integers(1, 41), st.integers(0, 2**32 - 1))
def test_a_kept_token_stands_for_itself_and_any_other_for_its_nearest(n_kept: int, n_at_once: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal((40, 8), np.float32)
    kept = np.sort(rng.permutation(40)[:n_kept])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimming, "_N_DIRECTIONS", n_at_once)
        nearest = nearest_kept(lambda: iter(np.array_split(embedding, 3)), kept)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    assert np.array_equal(nearest[kept], np.arange(n_kept))
    assert np.allclose((unit * unit[kept][nearest]).sum(1), (unit @ unit[kept].T).max(1), atol=1e-5)


# The run


def written(options: EngineOptions, sampling: Sampling) -> tuple[list[int], int]:
    """Returns the tokens that follow a prompt, and how many were drafts."""
    with open_engine(options) as engine, engine.open_session() as session:
        turn = begin(session, engine.tokenize(TEXT[:600]), Chooser(sampling), 96)
        tokens = list(generate(turn))
        return tokens, turn.stats.n_accepted


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, top_p=1.0, seed=5)])
def test_the_text_is_that_of_plain_decoding(heads: Path, sampling: Sampling) -> None:
    plain = EngineOptions(tiny_gguf(mtp="drop"), draft="off", n_ctx=1024, n_threads=1)
    tokens, _ = written(plain, sampling)
    drafted, n_accepted = written(replace(plain, mtp=heads, draft="3"), sampling)
    assert drafted == tokens
    assert n_accepted > 20
    assert max(tokens) < N_VOCAB


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0, 1.7]), st.integers(0, 1000))
def test_a_draft_is_what_the_whole_heads_choose_among_the_kept_tokens(
    seed: int, temperature: float, position: int
) -> None:
    """The noise belongs to the model's id of a token, so trimmed drafts agree with the target as whole ones do."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 200).astype(np.float32)
    names = np.sort(rng.permutation(200)[:60]).astype(np.int32)
    masked = np.full(200, -np.inf, np.float32)
    masked[names] = logits[names]
    sampling = Sampling(temperature=temperature, top_p=1.0, seed=seed)
    assert choose_with_margin(logits[names], sampling, position, names) == choose_with_margin(
        masked, sampling, position
    )


def test_stock_llama_cpp_refuses_the_file(heads: Path) -> None:
    """It would take the heads' ids for its own."""
    import llama_cpp

    from step35.native import library

    library.start_backend()
    library.forget_errors()
    assert not llama_cpp.llama_model_load_from_file(str(heads).encode(), llama_cpp.llama_model_default_params())
    assert f"unknown model architecture: '{TRIMMED_ARCH}'" in library.reason()


def test_both_packages_name_the_architecture_alike() -> None:
    assert draft_vocabulary.TRIMMED == TRIMMED_ARCH


def test_it_is_no_model_by_itself(heads: Path) -> None:
    with pytest.raises(ModelError, match="holds only MTP heads"):
        Engine(EngineOptions(heads, n_ctx=64))


def test_heads_of_another_checkpoint_are_refused(heads: Path, tmp_path: Path) -> None:
    """The ids would mean other tokens."""
    digest = read_gguf(heads).metadata["step35.draft.vocab_sha256"]
    data = heads.read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(digest.encode(), digest[::-1].encode(), 1))
    with pytest.raises(ModelError, match=f"expected vocab_digest={digest} as in .*, got {digest[::-1]}"):
        Engine(EngineOptions(tiny_gguf(), tmp_path / "other.gguf", n_ctx=64, n_threads=1))


@pytest.mark.parametrize(
    "tokens, stand_ins",
    [
        ([], [0]),
        ([0, 0], [0, 1]),
        ([1, 0], [1, 0]),
        ([0, 5], [0, 1, 0]),
        ([0, 2], [0, 1, 2]),
        ([0, 2], [0, 0, 0]),
        ([0], []),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tokens: list[int], stand_ins: list[int]) -> None:
    arrays = (np.array(values, np.int32) for values in (tokens, stand_ins))
    with pytest.raises(ModelError, match="damaged heads: heads.gguf expected ascending step35.draft.tokens"):
        draft_vocabulary.checked(Path("heads.gguf"), *arrays, "")


def test_a_real_load_takes_what_was_counted(heads: Path) -> None:
    options = EngineOptions(tiny_gguf(mtp="drop"), heads, draft="3", n_ctx=512, n_threads=1, load_mode="none")
    with Engine(options) as engine:
        assert engine.demand is not None and not [
            note for note in engine.notes if "expected" in note or "counted" in note
        ], engine.notes


def test_only_the_vocabulary_is_loaded_to_count() -> None:
    from step35.native.model import Model

    model = Model(ModelOptions(tiny_gguf(), vocab_only=True))
    assert (model.n_vocab, model.n_embd) == (N_VOCAB, 0)
    model.close()
