"""The tokenizer is read as llama.cpp needs it, or refused with the place and the reason."""

import copy
import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import LlamaFileType, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import TINY, config
from convert_step35.errors import CheckpointError
from convert_step35.gguf.header import encode_header
from convert_step35.gguf.metadata import Provenance, build_metadata
from convert_step35.source.architecture import read_architecture
from convert_step35.source.tokenizer import MAX_TEMPLATE_CHARS, Tokenizer, read_tokenizer

N_VOCAB = 300
BOS, EOS, PAD, IM_END, THINK, CALL = range(261, 267)
ADDED = {
    "<｜begin▁of▁sentence｜>": BOS,
    "<｜end▁of▁sentence｜>": EOS,
    "<｜▁pad▁｜>": PAD,
    "<|im_end|>": IM_END,
    "<think>": THINK,
    "<|call_end|>": CALL,
}

DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
# As DeepSeek-V3's own tokenizer.json has it: the quote behind a backslash, the line ends as characters.
WORDS = """[!\\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"""
# As a tokenizer trained with the tokenizers library has it: everything escaped once.
WORDS_ESCAPED = WORDS.replace('\\"', '"').replace("\r", "\\r").replace("\n", "\\n")


def byte_letters() -> list[str]:
    """The 256 letters that stand for the bytes in a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(others))]


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pre_tokenizer(words: str = WORDS) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split(DIGITS), split(CJK), split(words), byte_level]}


def tokenizer_json() -> dict[str, Any]:
    """261 ordinary tokens, six added ones and 33 unused rows."""
    letters = [*byte_letters(), "in", "Ġt", "ĠĠ", "Ġth", "Ġthe"]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": text not in ("<think>", "<|call_end|>")} for text, i in ADDED.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": pre_tokenizer(),
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(letters)},
            "merges": [["i", "n"], ["Ġ", "t"], ["Ġ", "Ġ"], ["Ġt", "h"], ["Ġth", "e"]],
        },
    }


def settings_json() -> dict[str, Any]:
    return {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}",
    }


def read(
    folder: Path,
    data: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    *,
    eos: tuple[int, ...] = (EOS, IM_END),
    model_config: dict[str, Any] | None = None,
) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json() if data is None else data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_json() if settings is None else settings))
    return read_tokenizer(folder, N_VOCAB, eos, model_config or {})


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    data = tokenizer_json()
    parent: Any = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = to
    return data


# Rows, types and merges


def test_every_row_has_its_token_and_its_type(tmp_path: Path) -> None:
    read_back = read(tmp_path)
    assert len(read_back.tokens) == len(read_back.types) == N_VOCAB
    assert read_back.tokens[256:268] == ("in", "Ġt", "ĠĠ", "Ġth", "Ġthe", *ADDED, "[PAD267]")
    types = [TokenType(t) for t in read_back.types]
    assert types[:261] == [TokenType.NORMAL] * 261
    # <think> is an added token that is not special; <|call_end|> is not marked as special but looks so.
    assert types[261:267] == [TokenType.CONTROL] * 4 + [TokenType.USER_DEFINED, TokenType.CONTROL]
    assert types[267:] == [TokenType.UNUSED] * 33


def test_merges_are_the_same_in_both_forms(tmp_path: Path) -> None:
    pairs = read(tmp_path).merges
    assert pairs == ("i n", "Ġ t", "Ġ Ġ", "Ġt h", "Ġth e")
    assert read(tmp_path, changed("model", "merges", to=list(pairs))).merges == pairs


def test_a_space_inside_a_merge_becomes_its_byte_level_letter(tmp_path: Path) -> None:
    assert read(tmp_path, changed("model", "merges", to=[["a ", "b"]])).merges == ("aĠ b",)


# The pre-tokenizer


@pytest.mark.parametrize("words", [WORDS, WORDS_ESCAPED], ids=["deepseek's spelling", "escaped"])
def test_the_pre_tokenizer_is_recognised_in_either_spelling(tmp_path: Path, words: str) -> None:
    assert read(tmp_path, changed("pre_tokenizer", to=pre_tokenizer(words))) == read(tmp_path)


# What llama.cpp does otherwise


def test_a_tokenizer_that_llama_cpp_follows_has_no_notes(tmp_path: Path) -> None:
    assert read(tmp_path).notes == () == read(tmp_path, changed("normalizer", to=None)).notes


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (changed("normalizer", to={"type": "NFC"}), "normalizer 'NFC' changes the text before it is split"),
        (
            changed("normalizer", "normalizers", to=[{"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}]),
            "normalizer 'Lowercase' changes",
        ),
        (changed("model", "ignore_merges", to=True), "ignore_merges takes whole words from the vocabulary"),
        (changed("model", "end_of_word_suffix", to="</w>"), "model.end_of_word_suffix expected none, got '</w>'"),
        (
            changed("added_tokens", 3, "rstrip", to=True),
            "1 added tokens such as '<|im_end|>' have lstrip, rstrip, single_word set",
        ),
    ],
)
def test_what_llama_cpp_does_otherwise_is_noted(tmp_path: Path, data: dict[str, Any], note: str) -> None:
    (found,) = read(tmp_path, data).notes
    assert found.startswith("tokenizer.json: ") and note in found


def test_bytes_without_a_token_are_noted_with_what_was_meant_for_them(tmp_path: Path) -> None:
    data = tokenizer_json()
    del data["model"]["vocab"]["Ā"], data["model"]["vocab"]["é"]
    assert read(tmp_path, data).notes == (
        "tokenizer.json: 2 of 256 bytes have no token: llama.cpp drops them from a text",
    )
    data["model"]["byte_fallback"] = True
    assert "byte_fallback would spell them, and llama.cpp drops them" in read(tmp_path, data).notes[0]


def step(i: int, **changes: Any) -> dict[str, Any]:
    pre = pre_tokenizer()
    pre["pretokenizers"][i] |= changes
    return pre


@pytest.mark.parametrize(
    ("pre", "message"),
    [
        (None, r"pre_tokenizer expected DeepSeek-V3's, three splits and ByteLevel, got None"),
        ({"type": "ByteLevel"}, r"three splits and ByteLevel, got \{'type': 'ByteLevel'\}"),
        ({"type": "Sequence"}, r"three splits and ByteLevel, got"),
        ({"type": "Sequence", "pretokenizers": []}, r"three splits and ByteLevel, got"),
        (
            {"type": "Sequence", "pretokenizers": pre_tokenizer()["pretokenizers"][1:]},
            r"three splits and ByteLevel, got",
        ),
        (
            step(0, pattern={"Regex": r"\p{N}"}),
            r"pre_tokenizer step 1 expected .* an isolated split at .*\{1,3\}', got .*'\\\\p\{N\}'",
        ),
        (step(1, behavior="Removed"), r"pre_tokenizer step 2 expected .*'Removed'"),
        (step(1, invert=True), r"pre_tokenizer step 2 expected .*'invert': True"),
        (step(2, pattern={"String": " "}), r"pre_tokenizer step 3 expected .*'String'"),
        (step(2, pattern=" "), r"pre_tokenizer step 3 expected .*'pattern': ' '"),
        (
            step(3, use_regex=True),
            r"pre_tokenizer step 4 expected .*ByteLevel without prefix space and regex, got .*'use_regex': True",
        ),
        (step(3, add_prefix_space=True), r"pre_tokenizer step 4 expected .*'add_prefix_space': True"),
    ],
)
def test_another_pre_tokenizer_is_refused_by_its_step(tmp_path: Path, pre: Any, message: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"^tokenizer\.json: .*" + message + ".*llama.cpp would split text otherwise"
    ):
        read(tmp_path, changed("pre_tokenizer", to=pre))


# Special ids and the end of generation


def test_special_ids_come_from_the_texts_then_from_config(tmp_path: Path) -> None:
    ids = read(
        tmp_path, model_config={"bos_token_id": 5, "pad_token_id": PAD, "unk_token_id": N_VOCAB, "eos_token_id": [EOS]}
    ).special_ids
    assert ids == {"bos": BOS, "eos": IM_END, "pad": PAD}


def test_special_ids_of_step37_come_from_its_text_part(tmp_path: Path) -> None:
    assert read(tmp_path, model_config={"text_config": {"pad_token_id": PAD}}).special_ids["pad"] == PAD


def test_without_an_eos_token_the_first_id_of_the_list_is_eos(tmp_path: Path) -> None:
    """llama.cpp would take id 11, a comma in the real vocabulary, and end every answer at it."""
    settings = settings_json() | {"eos_token": None}
    assert read(tmp_path, settings=settings, eos=(EOS, IM_END)).special_ids["eos"] == EOS
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer_config\.json: eos_token expected one of tokenizer\.json's added_tokens, got none",
    ):
        read(tmp_path, settings=settings, eos=())


def test_without_a_bos_token_nothing_is_converted(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: bos_token expected .*config\.json has no bos_token_id"
    ):
        read(tmp_path, settings=settings_json() | {"bos_token": "<s>"})


END_IDS = [
    (settings_json()["eos_token"], (EOS, IM_END)),
    ("<｜end▁of▁sentence｜>", (EOS, PAD, IM_END)),
    (None, (EOS, PAD, IM_END)),
    (None, (PAD,)),
    ("<|im_end|>", (CALL, PAD, EOS)),
    ("<think>", (THINK, PAD, CALL, EOS)),
    ("<|im_end|>", ()),
]


@pytest.mark.parametrize(("eos_token", "eos"), END_IDS)
def test_llama_cpp_stops_at_every_end_id_and_at_no_other(tmp_path: Path, eos_token: Any, eos: tuple[int, ...]) -> None:
    tokenizer = read(tmp_path, settings=settings_json() | {"eos_token": eos_token}, eos=eos)
    named = {eos_token: ADDED[eos_token]} if isinstance(eos_token, str) else {}
    assert set(tokenizer.end_ids) == {*eos, *named.values(), *([IM_END] if isinstance(eos_token, dict) else [])}
    # llama.cpp knows these two by their text.
    assert end_ids_in_llama_cpp(tmp_path, tokenizer) == {*tokenizer.end_ids, EOS, IM_END}


def end_ids_in_llama_cpp(folder: Path, tokenizer: Tokenizer) -> set[int]:
    with open_vocabulary(folder, tokenizer) as vocab:
        return {i for i in range(N_VOCAB) if llama_cpp.llama_vocab_is_eog(vocab, i)}


class open_vocabulary:
    """The tokenizer as llama.cpp loads it from a GGUF that holds nothing else."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        arch = read_architecture(config(TINY, eos=[]))
        provenance = Provenance("title", None, "source", "sha256", "recipe", "version")
        entries = build_metadata(
            arch, tokenizer, [], with_mtp=True, ftype=LlamaFileType.GUESSED, generation={}, provenance=provenance
        )
        self.path = folder / "vocabulary.gguf"
        self.path.write_bytes(encode_header(entries, []))

    def __enter__(self) -> Any:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), params)
        assert model, "llama.cpp refused the vocabulary"
        self.model = model
        return llama_cpp.llama_model_get_vocab(model)

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self.model)


def test_llama_cpp_reads_the_special_tokens_and_splits_like_the_merges_say(tmp_path: Path) -> None:
    with open_vocabulary(tmp_path, read(tmp_path)) as vocab:
        assert llama_cpp.llama_vocab_bos(vocab) == BOS and llama_cpp.llama_vocab_get_add_bos(vocab)
        text = b"<think> the in<|im_end|>"
        ids = (llama_cpp.llama_token * 16)()
        n = llama_cpp.llama_tokenize(vocab, text, len(text), ids, 16, True, True)
        letter = byte_letters().index
        assert ids[:n] == [BOS, THINK, 260, letter("Ġ"), 256, IM_END]


def test_more_hidden_end_ids_than_llama_cpp_has_keys_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"eos_token_id expected at most 1 ids beyond .*, got \[{PAD}, {CALL}\]"):
        read(tmp_path, eos=(IM_END, PAD, CALL))


# Adding BOS and EOS


def template(*pieces: str, pair: tuple[str, ...] = ()) -> dict[str, Any]:
    """A TemplateProcessing of special tokens and of the sequences A and B."""

    def written(names: tuple[str, ...]) -> list[dict[str, Any]]:
        return [{"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": 0}} for name in names]

    return {"type": "TemplateProcessing", "single": written(pieces), "pair": written(pair)}


BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": False}
BEGIN = "<｜begin▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("post_processor", "settings", "flags"),
    [
        (None, {}, {"bos": True}),
        (None, {"add_bos_token": None}, {}),
        (None, {"add_eos_token": False}, {"bos": True, "eos": False}),
        (BYTE_LEVEL, {}, {"bos": False, "eos": False}),
        (template(BEGIN, "A"), {"add_bos_token": False}, {"bos": True}),
        (template("A", "<|im_end|>"), {"add_bos_token": None}, {"eos": True}),
        (template("<think>", "A", "<think>"), {}, {"bos": False, "eos": False}),
        (template("A"), {}, {"bos": True}),
        # transformers' own template of a tokenizer with add_bos_token.
        (template(BEGIN, "A", pair=(BEGIN, "A", BEGIN, "B")), {}, {"bos": True, "sep": False}),
        (template(BEGIN, "A", pair=(BEGIN, "A", "<|im_end|>", "B")), {}, {"bos": True, "sep": True}),
        (
            template("A", "<|im_end|>", pair=("A", "<|im_end|>", "B", "<|im_end|>")),
            {},
            {"bos": True, "eos": True, "sep": False},
        ),
        (template(BEGIN, "A", pair=(BEGIN, "A", "B")), {}, {"bos": True}),
        (template(BEGIN, "A", pair=(BEGIN, "B", "<|im_end|>", "A")), {}, {"bos": True}),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template(BEGIN, "A")]}, {}, {"bos": True, "eos": False}),
        ({"type": "Sequence", "processors": "nothing"}, {}, {"bos": True}),
        (
            {"type": "TemplateProcessing", "single": [{"SpecialToken": 3}, "x"], "pair": [{"Sequence": {"id": []}}, 1]},
            {},
            {"bos": True},
        ),
    ],
)
def test_the_post_processor_says_what_is_added_and_then_the_settings(
    tmp_path: Path, post_processor: Any, settings: dict, flags: dict
) -> None:
    assert read(tmp_path, changed("post_processor", to=post_processor), settings_json() | settings).add_flags == flags


# The chat template


def test_the_chat_template_is_the_settings_then_the_file_beside_them(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ 'fïle' }}", encoding="utf-8")
    assert read(tmp_path).chat_template == "{{ bos_token }}"
    assert read(tmp_path, settings=settings_json() | {"chat_template": None}).chat_template == "{{ 'fïle' }}"
    (tmp_path / "chat_template.jinja").unlink()
    assert read(tmp_path, settings=settings_json() | {"chat_template": None}).chat_template is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{{", r"chat_template\.jinja: expected UTF-8, got byte 0xff at 0"),
        (
            b"x" * (MAX_TEMPLATE_CHARS + 1),
            rf"chat_template\.jinja: chat template expected at most {MAX_TEMPLATE_CHARS} characters, got {MAX_TEMPLATE_CHARS + 1}",
        ),
        (
            b"x" * (4 * MAX_TEMPLATE_CHARS + 1),
            rf"chat_template\.jinja: expected at most {4 * MAX_TEMPLATE_CHARS} bytes, got {4 * MAX_TEMPLATE_CHARS + 1}",
        ),
    ],
    ids=["not UTF-8", "long", "too long to read"],
)
def test_a_damaged_or_huge_template_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, settings=settings_json() | {"chat_template": None})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x" * (MAX_TEMPLATE_CHARS + 1), r"tokenizer_config\.json: chat template expected at most"),
        (
            [{"name": "default", "template": "x"}],
            r"tokenizer_config\.json: chat_template expected one text, got \[\{'name': 'default'",
        ),
    ],
    ids=["long", "several"],
)
def test_a_template_that_is_huge_or_no_text_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, settings=settings_json() | {"chat_template": value})


# Refusals


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("model", to=None), r"model expected BPE with a vocab, got None"),
        (changed("model", "type", to="Unigram"), r"model expected BPE with a vocab, got 'Unigram'"),
        (changed("model", "vocab", to=[]), r"model expected BPE with a vocab"),
        (changed("model", "vocab", "in", to="256"), r"model\.vocab expected whole numbers"),
        (changed("model", "vocab", "in", to=300), r"token 'in' expected an id under 300, got 300"),
        (changed("model", "vocab", "in", to=-1), r"token 'in' expected an id under 300, got -1"),
        (changed("model", "vocab", "in", to=257), r"id 257 expected one token, got 'in' and '\\u0120t'"),
        (
            changed("model", "vocab", "<think>", to=270),
            r"token 270 expected a text of its own without zero characters, got '<think>'",
        ),
        (
            changed("model", "vocab", "[PAD280]", to=270),
            r"token 280 expected a text of its own without zero characters, got '\[PAD280\]'",
        ),
        (changed("model", "vocab", "a\0b", to=270), r"token 270 expected .* got 'a\\x00b'"),
        (changed("model", "merges", to=None), r"model\.merges expected a list of pairs, got None"),
        (changed("model", "merges", to={"a b": 1}), r"model\.merges expected a list of pairs, got \{'a b': 1\}"),
        (
            changed("model", "merges", 1, to=["a", "b", "c"]),
            r"model\.merges\[1\] expected a pair of strings, got \['a', 'b', 'c'\]",
        ),
        (changed("model", "merges", 1, to=["a", 1]), r"model\.merges\[1\] expected a pair of strings, got \['a', 1\]"),
        (changed("model", "merges", 1, to="ab"), r"model\.merges\[1\] expected a pair of strings, got 'ab'"),
        (
            changed("model", "merges", 1, to=["a", ""]),
            r"model\.merges\[1\] expected a pair of strings, got \['a', ''\]",
        ),
        (changed("added_tokens", to={}), r"added_tokens expected entries with id and content"),
        (changed("added_tokens", 0, to={"id": 261}), r"added_tokens expected entries with id and content"),
        (
            changed("added_tokens", 0, "content", to="<think>"),
            r"added_tokens expected each content once, got 6 entries with 5 contents",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused_with_the_place(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: " + message):
        read(tmp_path, data)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    read(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"cannot open .*{name}: No such file"):
        read_tokenizer(tmp_path, N_VOCAB, (EOS,), {})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 400),
    st.floats(0, 300),
    st.text(max_size=6),
    st.builds(list),
    st.builds(dict),
    st.builds(lambda: [["a"]]),
)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both files with one or two values replaced or removed, wherever they stand."""
    files = copy.deepcopy(
        {"tokenizer": tokenizer_json() | {"post_processor": template(BEGIN, "A")}, "settings": settings_json()}
    )
    for _ in range(draw(st.integers(1, 2))):
        parent: Any = files
        key = draw(st.sampled_from(sorted(files)))
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 5)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        parent[key] = draw(JUNK)
    return files["tokenizer"], files["settings"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(mutations())
def test_a_mutated_tokenizer_is_a_clean_error_or_a_whole_vocabulary(
    tmp_path_factory: pytest.TempPathFactory, files: tuple[Any, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        tokenizer = read(folder, *files)
    except CheckpointError as exc:
        assert str(exc).isascii() and str(exc).isprintable()
        return
    assert len(set(tokenizer.tokens)) == len(tokenizer.types) == N_VOCAB
    assert {"bos", "eos"} <= tokenizer.special_ids.keys()
    assert all(0 <= i < N_VOCAB for i in (*tokenizer.special_ids.values(), *tokenizer.end_ids))
