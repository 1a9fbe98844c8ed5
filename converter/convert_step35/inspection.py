"""Says what a GGUF file holds and what is wrong with it."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import LlamaFileType, TokenType

from convert_step35.architecture import Architecture
from convert_step35.errors import GgufError
from convert_step35.gguf_model import GgufModel, architecture_of, open_model
from convert_step35.gguf_reader import GgufTensor
from convert_step35.mapping import map_tensors
from convert_step35.metadata import ARCH
from convert_step35.models import Models
from convert_step35.tokenizer import PRE_TOKENIZER

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
    """What `inspect` shows. `problems` are what makes the file not work as it should; `notes` are worth knowing."""

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
    """Read the headers of a GGUF and judge them; GgufError where they can't be read as a Step-3.5 model at all."""
    model = open_model(path)
    _require_step35(model)
    arch = architecture_of(model)
    complete = [i for i, layer in enumerate(arch.layers) if layer.is_mtp and not _missing(model, arch, [i])]
    has_trunk = "blk.0.attn_norm.weight" in model.tensors
    return Inspection(
        files=tuple(file.path.name for file in model.files),
        name=str(model.metadata.get("general.name", "")),
        file_type=_file_type(model.metadata.get("general.file_type")),
        recipe=model.metadata.get("convert_step35.recipe"),
        n_bytes=model.n_bytes,
        n_tensors=len(model.tensors),
        n_trunk_layers=arch.n_trunk if has_trunk else 0,
        n_mtp_declared=arch.n_mtp,
        n_mtp_complete=len(complete),
        context_length=arch.context_length,
        template=_template(model, models),
        types=_types(model),
        problems=tuple(_problems(model, arch, has_trunk)),
        notes=tuple(_notes(model, arch, has_trunk, len(complete))),
    )


def _require_step35(model: GgufModel) -> None:
    name = model.metadata.get("general.architecture")
    if name == ARCH:
        return
    hint = "; it was made for StepFun's own fork of February 2026, convert the checkpoint again" if str(name).startswith("Step35") else ""
    raise GgufError(f"another architecture: {model.files[0].path} expected {ARCH}, got {name!r}{hint}")


def _problems(model: GgufModel, arch: Architecture, has_trunk: bool) -> list[str]:
    problems = _tensor_problems(model, arch, has_trunk)
    if f"{ARCH}.rope.dimension_count" in model.metadata:
        problems.append("rope.dimension_count is written: llama.cpp halves it and both kinds of layers rotate wrongly; convert again")
    if any(layer.is_mtp and not layer.is_sliding for layer in arch.layers):
        problems.append("an MTP layer is marked as full attention; Step-3.5's are sliding: drafts will be poor, convert again")
    if not any(layer.clamp_routed for layer in arch.layers):
        problems.append("no SwiGLU clamps: the last layers' limits are missing and long answers collapse; convert again")
    if (pre := model.metadata.get("tokenizer.ggml.pre")) != PRE_TOKENIZER:
        problems.append(f"tokenizer.ggml.pre expected {PRE_TOKENIZER}, got {pre!r}: prompts are split into other tokens than in training")
    if _TEMPLATE_KEY not in model.metadata:
        problems.append("no chat template: chats will be formatted by guesswork")
    problems += _end_of_turn_problems(model)
    return problems


def _tensor_problems(model: GgufModel, arch: Architecture, has_trunk: bool) -> list[str]:
    trunk = [None, *range(arch.n_trunk)] if has_trunk else []
    heads = [i for i, layer in enumerate(arch.layers) if layer.is_mtp]
    held = [i for i in heads if any(name.startswith(f"blk.{i}.") for name in model.tensors)]
    wrong = _missing(model, arch, trunk + held)
    if held and len(held) < len(heads):
        wrong.append(f"{len(held)} of {len(heads)} MTP heads: llama.cpp loads all or none; add the others from the checkpoint's first shards (--mtp only)")
    return wrong


def _missing(model: GgufModel, arch: Architecture, layers: list[int | None]) -> list[str]:
    """What is missing or misshaped in these layers (None: outside all layers), three at most."""
    wrong = []
    for mapped in map_tensors(arch, trunk=True, mtp=True):
        if mapped.layer not in layers:
            continue
        tensor = model.tensors.get(mapped.name)
        if tensor is None:
            wrong.append(f"{mapped.name} is missing")
        elif tensor.shape != mapped.shape:
            wrong.append(f"{mapped.name} expected shape {list(mapped.shape)}, got {list(tensor.shape)}")
    return wrong[:3]


def _end_of_turn_problems(model: GgufModel) -> list[str]:
    tokens, types = model.metadata.get("tokenizer.ggml.tokens", []), model.metadata.get("tokenizer.ggml.token_type", [])
    if "<|im_end|>" not in tokens:
        return ["no <|im_end|> token: answers will not end"]
    if types[tokens.index("<|im_end|>")] != TokenType.CONTROL:
        return ["<|im_end|> is not a control token: it will show in answers"]
    return []


def _notes(model: GgufModel, arch: Architecture, has_trunk: bool, n_complete: int) -> list[str]:
    notes = []
    if not has_trunk:
        notes.append("MTP heads only: a draft file, to be used beside a trunk file")
    elif arch.n_mtp == 0 or n_complete == 0:
        notes.append("no MTP heads: runs without drafting; make a side file with convert-step35 run --mtp only")
    return notes


def _template(model: GgufModel, models: Models) -> str:
    text = model.metadata.get(_TEMPLATE_KEY)
    if text is None:
        return "none"
    digest = hashlib.sha256(text.strip().encode()).hexdigest()
    return models.templates.get(digest, f"unknown ({digest[:12]})")


def _file_type(number: Any) -> str:
    try:
        return LlamaFileType(number).name
    except ValueError:
        return f"unknown ({number})"


def _types(model: GgufModel) -> tuple[TypeUse, ...]:
    uses: dict[tuple[str, str], list[GgufTensor]] = {}
    n_trunk = model.metadata[f"{ARCH}.block_count"] - model.metadata.get(f"{ARCH}.nextn_predict_layers", 0)
    for tensor in model.tensors.values():
        uses.setdefault((group_of(tensor.name, n_trunk), tensor.ggml_type.name), []).append(tensor)
    rows = [TypeUse(group, kind, len(tensors), sum(t.n_bytes for t in tensors)) for (group, kind), tensors in uses.items()]
    return tuple(sorted(rows, key=lambda use: (_GROUPS.index(use.group), -use.n_bytes)))


_GROUPS = ("routed experts", "shared experts", "attention", "dense layers", "embedding and output", "MTP heads", "norms and router")


def group_of(name: str, n_trunk: int) -> str:
    """The group of a tensor in tables, from its GGUF name."""
    parts = name.split(".")
    if "norm" in name or parts[-1] == "bias" or "ffn_gate_inp" in name or parts[0] == "rope_freqs":
        return "norms and router"
    if parts[0] == "blk" and int(parts[1]) >= n_trunk:
        return "MTP heads"
    for mark, group in (("_exps", "routed experts"), ("_shexp", "shared experts"), ("attn_", "attention"), ("ffn_", "dense layers")):
        if mark in name:
            return group
    return "embedding and output"
