"""The tokenizer of a checkpoint, read from tokenizer.json and tokenizer_config.json as llama.cpp needs it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert_step35.errors import CheckpointError, quoted
from convert_step35.source.regular_file import open_regular, read_exactly
from convert_step35.source.strict_json import read_json

MAX_TOKENIZER_BYTES = 64 * 1024**2
MAX_TEMPLATE_CHARS = 256 * 1024

# DeepSeek-V3's pre-tokenizer, the only one that llama.cpp's `deepseek-v3` stands for.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
PRE_TOKENIZER = "deepseek-v3"
# How byte-level BPE spells the 256 bytes: those that print as themselves, the others from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_LETTERS = tuple(map(chr, (*_PRINTED, *range(0x100, 0x100 + 256 - len(_PRINTED)))))
# Flags of an added token that also match text around it.
_CONTEXT_FLAGS = ("lstrip", "rstrip", "single_word")

# Tokens that llama.cpp ends generation at by their text alone (llama-vocab.cpp, special_eog_ids).
END_OF_TURN = "<|im_end|>"
_END_BY_TEXT = {END_OF_TURN, "<｜end▁of▁sentence｜>"}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A BPE vocabulary of exactly `vocab_size` rows, unused ones included.

    `merges` has one "left right" string each. `special_ids` maps bos, eos, pad, ... to ids; `add_flags` says
    which of them llama.cpp adds to a prompt. `end_ids` are the ids that end generation. `notes` say where llama.cpp
    may split a text into other tokens than tokenizer.json means.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special_ids: dict[str, int]
    add_flags: dict[str, bool]
    end_ids: tuple[int, ...]
    chat_template: str | None
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...], config: dict[str, Any]) -> Tokenizer:
    """Read and check the folder's tokenizer; CheckpointError says what llama.cpp could not represent."""
    data = read_json(folder / "tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES)
    settings = read_json(folder / "tokenizer_config.json", max_bytes=MAX_TOKENIZER_BYTES)
    model = _bpe(data)
    _check_pre_tokenizer(data.get("pre_tokenizer"))
    added = _added_tokens(data)
    tokens, types = _vocabulary(model, added, vocab_size)
    special_ids = _with_eos(_special_ids(settings, added, config, vocab_size), eos_token_ids)
    return Tokenizer(
        tokens=tokens,
        types=types,
        merges=_merges(model),
        special_ids=_with_end_ids(special_ids, eos_token_ids, tokens),
        add_flags=_add_flags(data.get("post_processor"), settings),
        end_ids=tuple(sorted({*eos_token_ids, special_ids["eos"]})),
        chat_template=_chat_template(folder, settings),
        notes=tuple(_notes(data, model, added)),
    )


def _notes(data: dict[str, Any], model: dict[str, Any], added: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What of tokenizer.json llama.cpp's `deepseek-v3` does not do."""
    if (name := _normalizer(data.get("normalizer"))) is not None:
        yield (
            f"tokenizer.json: normalizer {quoted(name)} changes the text before it is split, and llama.cpp does not: "
            "some texts become other tokens"
        )
    if model.get("ignore_merges") is True:
        yield (
            "tokenizer.json: ignore_merges takes whole words from the vocabulary, and llama.cpp merges: "
            "some words become other tokens"
        )
    missing = sum(letter not in model["vocab"] for letter in _BYTE_LETTERS)
    if missing:
        fallback = "byte_fallback would spell them, and " if model.get("byte_fallback") is True else ""
        yield f"tokenizer.json: {missing} of 256 bytes have no token: {fallback}llama.cpp drops them from a text"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield (
                f"tokenizer.json: model.{key} expected none, got {quoted(model[key])}: llama.cpp adds none, "
                "so words become other tokens"
            )
    if tokens := [text for text, entry in added.items() if any(entry.get(key) is True for key in _CONTEXT_FLAGS)]:
        yield (
            f"tokenizer.json: {len(tokens)} added tokens such as {quoted(tokens[0])} have "
            f"{', '.join(_CONTEXT_FLAGS)} set, which llama.cpp does not heed"
        )


def _normalizer(entry: Any) -> str | None:
    """The type of a normalizer that does something."""
    if not isinstance(entry, dict):
        return None
    parts = entry.get("normalizers")
    if entry.get("type") == "Sequence" and isinstance(parts, list):
        return next((name for name in map(_normalizer, parts) if name is not None), None)
    return str(entry.get("type"))


def _bpe(data: dict[str, Any]) -> dict[str, Any]:
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(
            "tokenizer.json: model expected BPE with a vocab, got "
            f"{quoted(model.get('type') if isinstance(model, dict) else model)}"
        )
    if not all(type(i) is int for i in model["vocab"].values()):
        raise CheckpointError("tokenizer.json: model.vocab expected whole numbers as ids")
    return model


def _check_pre_tokenizer(pre: Any) -> None:
    """Recognise DeepSeek-V3's pre-tokenizer by its structure: three isolated splits, then bytes."""
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else None
    if not isinstance(steps, list) or len(steps) != len(_SPLITS) + 1:
        raise _other_pre_tokenizer("", "three splits and ByteLevel", pre)
    for i, pattern in enumerate(_SPLITS):
        if _split_of(steps[i]) != (pattern, "Isolated", False):
            raise _other_pre_tokenizer(f" step {i + 1}", f"an isolated split at {pattern!a}", steps[i])
    if not _is_byte_level(steps[-1]):
        raise _other_pre_tokenizer(f" step {len(steps)}", "ByteLevel without prefix space and regex", steps[-1])


def _other_pre_tokenizer(where: str, want: str, got: Any) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: pre_tokenizer{where} expected DeepSeek-V3's, {want}, got {quoted(got, 400)}; "
        "llama.cpp would split text otherwise, so this checkpoint can't be converted"
    )


def _split_of(step: Any) -> tuple[Any, Any, Any] | None:
    if not isinstance(step, dict) or step.get("type") != "Split" or not isinstance(step.get("pattern"), dict):
        return None
    return _spelled(step["pattern"].get("Regex")), step.get("behavior"), step.get("invert", False)


def _spelled(pattern: Any) -> Any:
    """An expression in one spelling: quotes bare, line ends as escapes."""
    return (
        pattern.replace('\\"', '"').replace("\r", r"\r").replace("\n", r"\n") if isinstance(pattern, str) else pattern
    )


def _is_byte_level(step: Any) -> bool:
    return (
        isinstance(step, dict)
        and step.get("type") == "ByteLevel"
        and step.get("use_regex", True) is False
        and step.get("add_prefix_space") is False
    )


def _added_tokens(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    entries = data.get("added_tokens", [])
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and type(e.get("id")) is int and isinstance(e.get("content"), str) for e in entries
    ):
        raise CheckpointError("tokenizer.json: added_tokens expected entries with id and content")
    added = {entry["content"]: entry for entry in entries}
    if len(added) != len(entries):
        raise CheckpointError(
            "tokenizer.json: added_tokens expected each content once, "
            f"got {len(entries)} entries with {len(added)} contents"
        )
    return added


def _vocabulary(
    model: dict[str, Any], added: dict[str, dict[str, Any]], vocab_size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    by_id: dict[int, str] = {}
    for text, i in [*model["vocab"].items(), *((text, entry["id"]) for text, entry in added.items())]:
        if not 0 <= i < vocab_size:
            raise CheckpointError(f"tokenizer.json: token {quoted(text)} expected an id under {vocab_size}, got {i}")
        if by_id.setdefault(i, text) != text:
            raise CheckpointError(
                f"tokenizer.json: id {i} expected one token, got {quoted(by_id[i])} and {quoted(text)}"
            )
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(vocab_size))
    _refuse_doubles(tokens)
    return tokens, tuple(int(_token_type(by_id.get(i), added)) for i in range(vocab_size))


def _refuse_doubles(tokens: tuple[str, ...]) -> None:
    """llama.cpp aborts where two rows have one text, as it reads it: up to a zero character."""
    ids: dict[str, int] = {}
    for i, text in enumerate(tokens):
        if "\0" in text or ids.setdefault(text, i) != i:
            raise CheckpointError(
                f"tokenizer.json: token {i} expected a text of its own without zero characters, got {quoted(text)}"
            )


def _token_type(text: str | None, added: dict[str, dict[str, Any]]) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if text not in added:
        return TokenType.NORMAL
    is_control = added[text].get("special") is True or _looks_special(text)
    return TokenType.CONTROL if is_control else TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Upstream's rule for control tokens that a checkpoint doesn't mark as special."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))


def _merges(model: dict[str, Any]) -> tuple[str, ...]:
    """Merges as "left right"; in the newer pair form a space inside a part becomes its byte-level letter."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"tokenizer.json: model.merges expected a list of pairs, got {quoted(merges)}")
    return tuple(_merge(i, merge) for i, merge in enumerate(merges))


def _merge(i: int, merge: Any) -> str:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)):
        raise CheckpointError(f"tokenizer.json: model.merges[{i}] expected a pair of strings, got {quoted(merge)}")
    return " ".join(part.replace(" ", "Ġ") for part in parts)


_SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _special_ids(
    settings: dict[str, Any], added: dict[str, dict[str, Any]], config: dict[str, Any], vocab_size: int
) -> dict[str, int]:
    """Ids by name: the text in tokenizer_config.json first, the plain id in config.json for the rest."""
    ids: dict[str, int] = {}
    for name in _SPECIAL_NAMES:
        text = _token_text(settings, name)
        if text in added:
            ids[name] = added[text]["id"]
    for name in _SPECIAL_NAMES:
        value = config.get(f"{name}_token_id", config.get("text_config", {}).get(f"{name}_token_id"))
        if name not in ids and type(value) is int and 0 <= value < vocab_size:
            ids[name] = value
    return ids


def _token_text(settings: dict[str, Any], name: str) -> str | None:
    """The text of a special token, which stands alone or as an object's content."""
    entry = settings.get(f"{name}_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _with_eos(ids: dict[str, int], eos_token_ids: tuple[int, ...]) -> dict[str, int]:
    """The ids with an eos: of config.json's list the first, if tokenizer_config.json names none."""
    if "eos" not in ids and eos_token_ids:
        ids = {**ids, "eos": eos_token_ids[0]}
    missing = [f"{name}_token" for name in ("bos", "eos") if name not in ids]
    if missing:
        # Without the key llama.cpp takes id 11, whatever token that is, and ends every answer at it.
        raise CheckpointError(
            f"tokenizer_config.json: {missing[0]} expected one of tokenizer.json's added_tokens, got none, "
            f"and config.json has no {missing[0]}_id either"
        )
    return ids


def _with_end_ids(ids: dict[str, int], eos_token_ids: tuple[int, ...], tokens: tuple[str, ...]) -> dict[str, int]:
    """Give the end ids that llama.cpp would not find by their text the free keys, eot and eom."""
    hidden = [i for i in eos_token_ids if tokens[i] not in _END_BY_TEXT and i != ids["eos"]]
    # llama.cpp takes the turn's end as eot by its text, unless the key says otherwise.
    free = ["eom"] if any(tokens[i] == END_OF_TURN for i in eos_token_ids) else ["eot", "eom"]
    if len(hidden) > len(free):
        raise CheckpointError(
            f"config.json: eos_token_id expected at most {len(free)} ids beyond those llama.cpp knows by text, "
            f"got {hidden}"
        )
    return {**ids, **dict(zip(free, hidden, strict=False))}


def _add_flags(post_processor: Any, settings: dict[str, Any]) -> dict[str, bool]:
    """Which special tokens are added to a prompt; the post-processor wins over tokenizer_config.json, as upstream."""
    flags: dict[str, bool] = {}
    for step in _post_steps(post_processor):
        if step.get("type") == "ByteLevel":
            flags.setdefault("bos", False)
            flags.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            flags.update(_template_flags(step, settings))
    for name in _SPECIAL_NAMES:
        value = settings.get(f"add_{name}_token")
        if isinstance(value, bool):
            flags.setdefault(name, value)
    return flags


def _post_steps(post_processor: Any) -> list[dict[str, Any]]:
    if not isinstance(post_processor, dict):
        return []
    steps = post_processor.get("processors", [post_processor])
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _template_flags(step: dict[str, Any], settings: dict[str, Any]) -> dict[str, bool]:
    """What a template adds to one text, and between the two of a pair; as gguf-py's SpecialVocab reads it."""
    single, pair = _pieces(step.get("single")), _pieces(step.get("pair"))
    bos, eos, sep = (_token_text(settings, name) for name in ("bos", "eos", "sep"))
    first, last = (single[0].special, single[-1].special) if len(single) > 1 else (None, None)
    flags = {name: got == want for name, got, want in (("bos", first, bos), ("eos", last, eos)) if got is not None}
    ends = {text for text in (sep, eos) if text is not None}
    between = [piece.special for piece in _between(pair, first, last)]
    if between:
        flags["sep"] = (between[0] in ends and last is None) or (len(between) == 2 and between[1] in ends)
    return flags


@dataclass(frozen=True, slots=True)
class _Piece:
    """One piece of a template: the text of a special token, or the letter of a sequence."""

    special: str | None
    sequence: str | None


def _pieces(value: Any) -> list[_Piece]:
    return (
        [_Piece(_id_of(item, "SpecialToken"), _id_of(item, "Sequence")) for item in value]
        if isinstance(value, list)
        else []
    )


def _id_of(item: Any, kind: str) -> str | None:
    entry = item.get(kind) if isinstance(item, dict) else None
    name = entry.get("id") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _between(pair: list[_Piece], first: str | None, last: str | None) -> list[_Piece]:
    """The pieces between A and B, where the template is A ... B inside the single text's own ends."""
    if pair and first is not None and pair[0].special == first:
        pair = pair[1:]
    if pair and last is not None and pair[-1].special == last:
        pair = pair[:-1]
    is_a_to_b = len(pair) > 2 and (pair[0].sequence, pair[-1].sequence) == ("A", "B")
    return pair[1:-1] if is_a_to_b else []


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """tokenizer_config.json's template, or chat_template.jinja beside it."""
    where, template = folder / "tokenizer_config.json", settings.get("chat_template")
    if template is None and (path := folder / "chat_template.jinja").exists():
        where, template = path, _read_text(path)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{where}: chat_template expected one text, got {quoted(template)}; keep the default template only"
        )
    if template is not None and len(template) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"{where}: chat template expected at most {MAX_TEMPLATE_CHARS} characters, got {len(template)}"
        )
    return template


def _read_text(path: Path) -> str:
    file, n_bytes = open_regular(path)
    with file:
        if n_bytes > 4 * MAX_TEMPLATE_CHARS:
            raise CheckpointError(f"{path}: expected at most {4 * MAX_TEMPLATE_CHARS} bytes, got {n_bytes}")
        data = read_exactly(file, n_bytes, path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{path}: expected UTF-8, got byte 0x{data[exc.start]:02x} at {exc.start}") from exc
