"""Says what a GGUF file holds and what is wrong with it."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import ExpertGatingFuncType, LlamaFileType, TokenType

from convert_step35.errors import printable, quoted
from convert_step35.gguf.metadata import ARCH
from convert_step35.gguf.model import (
    GgufModel,
    architecture_of,
    has_trunk,
    is_trimmed_heads,
    open_model,
    require_step35,
)
from convert_step35.gguf.reader import GgufTensor
from convert_step35.models import Models
from convert_step35.source.architecture import Architecture
from convert_step35.source.mapping import MappedTensor, map_tensors
from convert_step35.source.tokenizer import END_OF_TURN, PRE_TOKENIZER

_TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class TypeUse:
    """How many tensors and bytes of one group have one type."""

    group: str
    type: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` shows. `problems` are why the file does not work as it should; `notes` are not faults."""

    files: tuple[str, ...]
    name: str
    file_type: str
    recipe: str | None
    n_bytes: int
    n_tensors: int
    n_trunk_layers: int
    n_mtp_declared: int
    n_mtp_complete: int
    context_length: int
    template: str
    types: tuple[TypeUse, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_file(path: Path, models: Models) -> Inspection:
    """Read the headers of a GGUF and check them; GgufError where they can't be read as a Step-3.5 model at all."""
    model = open_model(path)
    if not is_trimmed_heads(model):
        require_step35(model)
    arch = architecture_of(model)
    recipe = model.metadata.get("convert_step35.recipe")
    return Inspection(
        files=tuple(file.path.name for file in model.files),
        name=printable(model.metadata.get("general.name", "")),
        file_type=_file_type(model.metadata.get("general.file_type")),
        recipe=printable(recipe) if recipe is not None else None,
        n_bytes=model.n_bytes,
        n_tensors=len(model.tensors),
        n_trunk_layers=arch.n_trunk if has_trunk(model, arch) else 0,
        n_mtp_declared=arch.n_mtp,
        n_mtp_complete=sum(not _wrong_tensors(model, arch, {i}) for i in _heads(arch)),
        context_length=arch.context_length,
        template=_template(model, models),
        types=_types(model, arch),
        problems=tuple(_problems(model, arch)),
        notes=tuple(_notes(model, arch)),
    )


def _heads(arch: Architecture) -> range:
    """The layers of the MTP heads that the metadata declares."""
    return range(arch.n_trunk, len(arch.layers))


def _present_heads(model: GgufModel, arch: Architecture) -> list[int]:
    return [i for i in _heads(arch) if model.has_layer(i)]


def _problems(model: GgufModel, arch: Architecture) -> Iterator[str]:
    yield from _tensor_problems(model, arch)
    if f"{ARCH}.rope.dimension_count" in model.metadata:
        yield (
            "rope.dimension_count is written: llama.cpp halves it and both kinds of layers rotate wrongly; "
            "convert again"
        )
    if (
        gating := model.metadata.get(f"{ARCH}.expert_gating_func", ExpertGatingFuncType.SIGMOID)
    ) != ExpertGatingFuncType.SIGMOID:
        yield (
            f"expert_gating_func expected {ExpertGatingFuncType.SIGMOID:d} (sigmoid), got {quoted(gating)}: "
            "the router picks other experts; convert again"
        )
    if any(layer.is_mtp and not layer.is_sliding for layer in arch.layers):
        yield "an MTP layer is marked as full attention; Step-3.5's are sliding: drafts will be poor, convert again"
    if not any(layer.clamp_routed for layer in arch.layers):
        yield "no SwiGLU clamps: the last layers' limits are missing and long answers collapse; convert again"
    yield from _draft_problems(model, arch) if is_trimmed_heads(model) else _tokenizer_problems(model)


def _tensor_problems(model: GgufModel, arch: Architecture) -> Iterator[str]:
    heads, present = _heads(arch), _present_heads(model, arch)
    trunk = range(arch.n_trunk) if has_trunk(model, arch) else ()
    yield from _at_most_three(_wrong_tensors(model, arch, {None, *trunk, *present}))
    if present and len(present) < len(heads):
        yield (
            f"{len(present)} of {len(heads)} MTP heads: llama.cpp loads all or none; "
            "add the others from the checkpoint's first shards (--mtp only)"
        )
    known = {mapped.name for mapped in _known_tensors(model, arch)}
    yield from _at_most_three(
        [
            f"{quoted(name)} is no part of Step-3.5: llama.cpp refuses the file"
            for name in model.tensors
            if name not in known
        ]
    )


def _wrong_tensors(model: GgufModel, arch: Architecture, layers: set[int | None]) -> list[str]:
    """What is missing or misshaped in these layers; None stands for the tensors outside all layers."""
    wrong = []
    for mapped in _known_tensors(model, arch):
        if mapped.layer not in layers:
            continue
        tensor = model.tensors.get(mapped.name)
        if tensor is None:
            wrong.append(f"{mapped.name} is missing")
        elif tensor.shape != mapped.shape:
            wrong.append(f"{mapped.name} expected shape {list(mapped.shape)}, got {list(tensor.shape)}")
    return wrong


def _known_tensors(model: GgufModel, arch: Architecture) -> Iterator[MappedTensor]:
    """All that a file may hold; trimmed heads have output matrices of their own only."""
    for mapped in map_tensors(arch, trunk=True, mtp=True):
        if mapped.name != "output.weight" or not is_trimmed_heads(model):
            yield mapped


def _at_most_three(problems: list[str]) -> list[str]:
    return problems if len(problems) <= 3 else [*problems[:3], f"... and {len(problems) - 3} more tensors"]


def _tokenizer_problems(model: GgufModel) -> Iterator[str]:
    if (pre := model.metadata.get("tokenizer.ggml.pre")) != PRE_TOKENIZER:
        yield (
            f"tokenizer.ggml.pre expected {PRE_TOKENIZER}, got {quoted(pre)}: "
            "prompts are split into other tokens than in training"
        )
    if not isinstance(model.metadata.get(_TEMPLATE_KEY), str):
        yield "no chat template: chats will be formatted by guesswork"
    if type(model.metadata.get("tokenizer.ggml.eos_token_id")) is not int:
        yield "no eos_token_id: llama.cpp takes id 11 instead, and answers end at that token"
    tokens, types = model.metadata["tokenizer.ggml.tokens"], model.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        yield (
            f"tokenizer.ggml.token_type expected {len(tokens)} types, "
            f"got {len(types) if isinstance(types, list) else quoted(types)}; convert again"
        )
    elif END_OF_TURN not in tokens:
        yield f"no {END_OF_TURN} token: answers will not end"
    elif types[tokens.index(END_OF_TURN)] != TokenType.CONTROL:
        yield f"{END_OF_TURN} is not a control token: it will show in answers"


def _draft_problems(model: GgufModel, arch: Architecture) -> Iterator[str]:
    kept, stand_ins = (model.metadata.get(f"{ARCH}.draft.{name}") for name in ("tokens", "stand_ins"))
    if not _fit(kept, stand_ins, arch.vocab_size):
        yield (
            f"draft.tokens expected {arch.vocab_size} ascending token ids, "
            "and draft.stand_ins one of them for each token of the"
            " model: drafts would be other tokens; make the file again with convert-step35 mtp trim"
        )


def _fit(kept: Any, stand_ins: Any, n_kept: int) -> bool:
    """Whether the tokens that heads know and those that stand for all of them agree: a kept one stands for itself."""
    if not (_are_ids(stand_ins, n_kept) and _are_ids(kept, len(stand_ins)) and len(kept) == n_kept):
        return False
    return kept == sorted(set(kept)) and [stand_ins[i] for i in kept] == list(range(n_kept))


def _are_ids(values: Any, n: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < n for value in values)


def _notes(model: GgufModel, arch: Architecture) -> Iterator[str]:
    if is_trimmed_heads(model):
        stand_ins = model.metadata.get(f"{ARCH}.draft.stand_ins")
        n_model = len(stand_ins) if isinstance(stand_ins, list) else "?"
        yield (
            f"trimmed heads: {arch.vocab_size} of the model's {n_model} tokens can be drafted; for step35 only, "
            "llama.cpp refuses the file"
        )
    if not has_trunk(model, arch):
        yield "MTP heads only: a draft file, to be used beside a trunk file"
    elif not _present_heads(model, arch):
        yield "no MTP heads: runs without drafting; make a side file with convert-step35 run --mtp only"
    if arch.rope_scaling is None:
        yield "no rope_freqs.weight: the full-attention layers rotate without llama3 scaling, which Step-3.5 has"


def _template(model: GgufModel, models: Models) -> str:
    text = model.metadata.get(_TEMPLATE_KEY)
    if not isinstance(text, str):
        return "none"
    digest = hashlib.sha256(text.strip().encode()).hexdigest()
    return models.templates.get(digest, f"unknown ({digest[:12]})")


def _file_type(number: Any) -> str:
    try:
        return LlamaFileType(number).name
    except ValueError:
        return f"unknown ({quoted(number)})"


def _types(model: GgufModel, arch: Architecture) -> tuple[TypeUse, ...]:
    uses: dict[tuple[str, str], list[GgufTensor]] = {}
    for tensor in model.tensors.values():
        uses.setdefault((group_of(tensor.name, arch.n_trunk), tensor.ggml_type.name), []).append(tensor)
    rows = [
        TypeUse(group, kind, len(tensors), sum(t.n_bytes for t in tensors)) for (group, kind), tensors in uses.items()
    ]
    return tuple(sorted(rows, key=lambda use: (_GROUPS.index(use.group), -use.n_bytes)))


_GROUPS = (
    "routed experts",
    "shared experts",
    "attention",
    "dense layers",
    "embedding and output",
    "MTP heads",
    "norms and router",
    "other",
)


def group_of(name: str, n_trunk: int) -> str:
    """The group of a tensor in tables, from its GGUF name."""
    if "norm" in name or name.endswith(".bias") or "ffn_gate_inp" in name or name == "rope_freqs.weight":
        return "norms and router"
    if name in ("token_embd.weight", "output.weight"):
        return "embedding and output"
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= n_trunk:
        return "MTP heads"
    marks = (
        ("_exps", "routed experts"),
        ("_shexp", "shared experts"),
        ("attn_", "attention"),
        ("ffn_", "dense layers"),
    )
    return next((group for mark, group in marks if layer is not None and mark in name), "other")
