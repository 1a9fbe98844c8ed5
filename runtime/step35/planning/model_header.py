"""What a model's header says before any weight is read: its tensors with their bytes, its shape, its heads.

Only the headers are read, without llama.cpp: a file of any size, on any machine, takes a fraction of a second. See
docs/gguf.md for the names and keys.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from step35.errors import ModelError
from step35.native import draft_vocabulary
from step35.native.draft_vocabulary import ARCHITECTURE, DraftVocabulary
from step35.planning.gguf_file import GgufFile, Metadata, StoredTensor, read_gguf

MAX_LAYERS, MAX_EXPERTS, MAX_SHARDS = 512, 1024, 65535
"""What llama.cpp takes: LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS, and 16 bits for split.count."""


class Group(StrEnum):
    """What a tensor is part of; the groups that are placed together."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION = "attention"
    DENSE = "dense"
    ROUTER = "router"
    SHARED = "shared experts"
    EXPERTS = "routed experts"
    NORMS = "norms"
    HEADS = "MTP heads"
    IDLE = "MTP heads beside those of a side file"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; `layer` is None outside the layers, `shape` has the slowest dimension first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    n_bytes: int
    layer: int | None
    group: Group


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What differs from layer to layer."""

    n_head: int
    n_head_kv: int
    is_sliding: bool
    is_moe: bool
    clamps_experts: bool
    clamps_shared: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions that memory and work depend on; `layers` holds the trunk's, then the heads'."""

    n_trunk: int
    n_heads: int
    """MTP heads whose tensors are in the file."""
    n_embd: int
    n_ff: int
    n_ff_expert: int
    n_ff_shared: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    n_head_vocab: int
    """Logits of a head: n_vocab, or less where heads were trimmed."""
    head_dim: int
    window: int
    n_ctx_train: int
    layers: tuple[LayerShape, ...]

    @property
    def trunk(self) -> tuple[LayerShape, ...]:
        return self.layers[: self.n_trunk]

    @property
    def heads(self) -> tuple[LayerShape, ...]:
        return self.layers[self.n_trunk :]


@dataclass(frozen=True, slots=True)
class Header:
    """A model's header. `digest` tells this file from any other: sha256 of the header's bytes, in hex."""

    path: Path
    files: tuple[Path, ...]
    """The file itself, and its other shards."""
    name: str
    recipe: str
    shape: ModelShape
    tensors: tuple[Tensor, ...]
    digest: str
    n_blocks: int
    """Layers that the (trunk's) file declares, heads included: what llama.cpp spreads over several GPUs."""
    has_trunk: bool
    draft_vocabulary: DraftVocabulary | None = None
    """Of trimmed heads; None if the file's tokens are the model's."""

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers of the files that an engine loads: the model's, and that of a side file that brings the heads.

    Raises ModelError if the model's file holds only heads.
    """

    model: Header
    side: Header | None = None

    def __post_init__(self) -> None:
        if not self.model.has_trunk:
            raise ModelError(
                f"no trunk: {self.model.path} holds only MTP heads; give the model's file, and this one with --mtp-file"
            )

    @property
    def side_path(self) -> Path | None:
        return None if self.side is None else self.side.path

    def joined(self, *, with_heads: bool = True) -> Header:
        """Returns the header of what is loaded; without heads the side file is left out.

        Raises ModelError if the side file has no heads.
        """
        return with_side(self.model, self.side) if self.side is not None and with_heads else self.model


def read_headers(model: Path, mtp: Path | None = None) -> Headers:
    """Reads the headers of a model and of a side file; raises ModelError if the model's file holds only heads."""
    headers = Headers(read_header(model))
    return headers if mtp is None else replace(headers, side=read_header(mtp))


def read_model(model: Path, mtp: Path | None = None) -> Header:
    """Returns the header of a model, joined with that of a side file that brings the heads."""
    return read_headers(model, mtp).joined()


def read_header(path: Path) -> Header:
    """Reads the header of one model, or of all its shards; raises ModelError on anything else."""
    first = read_gguf(path)
    metadata = first.metadata
    is_trimmed = _check_architecture(metadata)
    paths = (path, *_other_shards(path, metadata.number("split.count", 1, high=MAX_SHARDS)))
    files = [first, *map(read_gguf, paths[1:])]
    stored = _all_tensors(path, files)
    shape = _shape(metadata, stored)
    _check_heads(path, metadata, shape, stored)
    tensors = tuple(_tensor(path, shape, tensor) for tensor in stored.values())
    return Header(
        path=path,
        files=paths,
        name=metadata.text("general.name", path.name),
        recipe=metadata.text("convert_step35.recipe"),
        shape=shape,
        tensors=tensors,
        digest=hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest(),
        n_blocks=metadata.number(_key("block_count")),
        has_trunk=shape.n_trunk > 0 and "blk.0.attn_norm.weight" in stored,
        draft_vocabulary=_draft_vocabulary(metadata) if is_trimmed else None,
    )


def _check_architecture(metadata: Metadata) -> bool:
    """Returns whether a file holds trimmed heads; raises ModelError if it is no Step-3.5 at all."""
    architecture = metadata.text("general.architecture")
    if architecture not in (ARCHITECTURE, draft_vocabulary.TRIMMED):
        raise ModelError(
            f"not a Step-3.5 model: {metadata.path} expected general.architecture={ARCHITECTURE}, "
            f"got {architecture[:64]!a}; convert a checkpoint with convert-step35"
        )
    return architecture == draft_vocabulary.TRIMMED


def _other_shards(path: Path, n_shards: int) -> list[Path]:
    if n_shards <= 1:
        return []
    stem, mark, _ = path.name.rpartition("-00001-of-")
    if not mark:
        raise ModelError(f"not the first shard: {path} expected a name with -00001-of-{n_shards:05}; open that one")
    return [path.with_name(f"{stem}-{i:05}-of-{n_shards:05}.gguf") for i in range(2, n_shards + 1)]


def _all_tensors(path: Path, files: Sequence[GgufFile]) -> dict[str, StoredTensor]:
    """Returns the tensors of all shards by name."""
    stored = {tensor.name: tensor for file in files for tensor in file.tensors}
    n_tensors = sum(len(file.tensors) for file in files)
    if len(stored) != n_tensors:
        raise ModelError(
            f"damaged shards: {path} expected {n_tensors} tensors of different names, got {len(stored)}; "
            "download or convert them again"
        )
    return stored


def _draft_vocabulary(metadata: Metadata) -> DraftVocabulary:
    tokens, stand_ins = (metadata.integers(_key(f"draft.{name}")) for name in ("tokens", "stand_ins"))
    return draft_vocabulary.checked(metadata.path, tokens, stand_ins, metadata.text(_key("draft.vocab_sha256")))


def _check_heads(path: Path, metadata: Metadata, shape: ModelShape, stored: dict[str, StoredTensor]) -> None:
    """Raises ModelError if some of the declared heads have tensors and others none."""
    n_declared = metadata.number(_key("nextn_predict_layers"), 0)
    n_found = sum(_is_head(stored, shape.n_trunk + head) for head in range(n_declared))
    has_parts = any(layer is not None and layer >= shape.n_trunk for layer in map(_layer_of, stored))
    if n_found != (n_declared if has_parts else 0):
        raise ModelError(
            f"incomplete MTP heads: {path} expected {n_declared} (nextn_predict_layers), got {n_found}; "
            "convert the checkpoint again, or make a side file with convert-step35 run --mtp only"
        )


def _is_head(stored: dict[str, StoredTensor], layer: int) -> bool:
    return f"blk.{layer}.nextn.eh_proj.weight" in stored


def with_side(header: Header, side: Header) -> Header:
    """Returns a trunk's header joined with that of an MTP side file, which brings its own embedding and output.

    Heads in the trunk's own file then lie idle, as far as llama.cpp loads them. Raises ModelError if the side file has
    no heads, or those of another model.
    """
    if not side.shape.n_heads:
        raise ModelError(
            f"no MTP heads: {side.path} expected some, got none; make it with convert-step35 run --mtp only"
        )
    if side.shape.n_trunk != header.shape.n_trunk:
        raise ModelError(
            f"the MTP file doesn't belong to the model: {side.path} expected {header.shape.n_trunk} layers before its "
            f"heads as in {header.path}, got {side.shape.n_trunk}; make it from the same checkpoint"
        )
    layers = header.shape.trunk + side.shape.heads
    shape = replace(header.shape, n_heads=side.shape.n_heads, n_head_vocab=side.shape.n_vocab, layers=layers)
    trunk = tuple(_idle(tensor) for tensor in header.tensors if not is_skipped(tensor))
    heads = tuple(_of_head(tensor, shape.n_trunk) for tensor in side.tensors)
    return replace(header, shape=shape, tensors=trunk + heads)


_SKIPPED = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"}
_SKIPPED |= {"nextn.eh_proj", "nextn.enorm", "nextn.hnorm"}


def is_skipped(tensor: Tensor) -> bool:
    """Whether llama.cpp leaves a tensor out when it is told to load no heads.

    It loads most of them even so: TENSOR_SKIP reaches only those that src/models/step35.cpp (load_block_mtp) calls
    required.
    """
    return tensor.group is Group.HEADS and tensor.name.split(".", 2)[2].removesuffix(".weight") in _SKIPPED


def _idle(tensor: Tensor) -> Tensor:
    return replace(tensor, group=Group.IDLE) if tensor.group is Group.HEADS else tensor


def _of_head(tensor: Tensor, first_head: int) -> Tensor:
    is_placed = tensor.group is Group.EMBEDDING or tensor.layer is not None
    return tensor if is_placed else replace(tensor, group=Group.HEADS, layer=first_head)


# the model's shape


def _key(name: str) -> str:
    return f"{ARCHITECTURE}.{name}"


def _shape(metadata: Metadata, stored: dict[str, StoredTensor]) -> ModelShape:
    n_blocks = metadata.number(_key("block_count"), low=1, high=MAX_LAYERS)
    n_declared = metadata.number(_key("nextn_predict_layers"), 0, high=n_blocks)
    n_trunk = n_blocks - n_declared
    has_heads = n_declared > 0 and _is_head(stored, n_trunk)
    n_expert = metadata.number(_key("expert_count"), low=1, high=MAX_EXPERTS)
    n_vocab = _n_rows(metadata.path, stored.get("token_embd.weight"))
    return ModelShape(
        n_trunk=n_trunk,
        n_heads=n_declared if has_heads else 0,
        n_embd=metadata.number(_key("embedding_length"), low=1),
        n_ff=metadata.number(_key("feed_forward_length")),
        n_ff_expert=metadata.number(_key("expert_feed_forward_length")),
        n_ff_shared=next((t.shape[0] for n, t in stored.items() if n.endswith("ffn_gate_shexp.weight") and t.shape), 0),
        n_expert=n_expert,
        n_expert_used=metadata.number(_key("expert_used_count"), low=1, high=n_expert),
        n_vocab=n_vocab,
        n_head_vocab=n_vocab,
        head_dim=metadata.number(_key("attention.key_length"), low=1),
        window=metadata.number(_key("attention.sliding_window")),
        n_ctx_train=metadata.number(_key("context_length"), low=1),
        layers=_layers(metadata, n_blocks if has_heads else n_trunk, stored),
    )


def _n_rows(path: Path, embedding: StoredTensor | None) -> int:
    """Returns the tokens of the vocabulary, a row each."""
    if embedding is None or not embedding.shape:
        raise ModelError(f"incomplete model: {path} expected token_embd.weight, got no such tensor; convert it again")
    return embedding.shape[0]


def _layers(metadata: Metadata, n_layers: int, stored: dict[str, StoredTensor]) -> tuple[LayerShape, ...]:
    columns = zip(
        metadata.counts(_key("attention.head_count"), n_layers),
        metadata.counts(_key("attention.head_count_kv"), n_layers),
        metadata.each(_key("attention.sliding_window_pattern"), n_layers),
        metadata.each(_key("swiglu_clamp_exp"), n_layers, 0.0),
        metadata.each(_key("swiglu_clamp_shexp"), n_layers, 0.0),
        strict=True,
    )
    moe = _moe_layers(metadata.path, stored)
    return tuple(
        LayerShape(n_head, n_head_kv, bool(sliding), i in moe, routed > 0, shared > 0)
        for i, (n_head, n_head_kv, sliding, routed, shared) in enumerate(columns)
    )


def _moe_layers(path: Path, stored: dict[str, StoredTensor]) -> set[int]:
    """Returns the layers with routed experts; raises ModelError if one lacks a matrix of them."""
    experts = {(int(match[1]), match[2]) for match in map(_EXPERTS.match, stored) if match}
    layers = {layer for layer, _ in experts}
    for layer in sorted(layers):
        missing = [matrix for matrix in ("gate", "up", "down") if (layer, matrix) not in experts]
        if missing:
            raise ModelError(
                f"incomplete model: {path} expected gate, up and down experts in layer {layer}, got no {missing[0]}; "
                "convert it again"
            )
    return layers


_LAYER = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.", re.ASCII)
_GROUPS = (
    (re.compile(r".*norm\.weight|rope_freqs.*"), Group.NORMS),
    (re.compile(r"ffn_(gate|up|down)_exps\..*"), Group.EXPERTS),
    (re.compile(r"ffn_(gate|up|down)_shexp\..*"), Group.SHARED),
    (re.compile(r"ffn_gate_inp\..*|exp_probs_b\..*"), Group.ROUTER),
    (re.compile(r"ffn_(gate|up|down)\..*"), Group.DENSE),
    (re.compile(r"attn_.*"), Group.ATTENTION),
    (re.compile(r"token_embd\..*"), Group.EMBEDDING),
    (re.compile(r"output\..*"), Group.OUTPUT),
)


def _layer_of(name: str) -> int | None:
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def _tensor(path: Path, shape: ModelShape, stored: StoredTensor) -> Tensor:
    match = _LAYER.fullmatch(stored.name)
    layer, short = (int(match[1]), match[2]) if match else (None, stored.name)
    group = _group(short) if layer is None or layer < shape.n_trunk else Group.HEADS
    if group is None or (layer is not None and layer >= len(shape.layers)):
        raise ModelError(
            f"unknown tensor: {path} {stored.name!a} isn't one of a Step-3.5 model's; convert the checkpoint again"
        )
    return Tensor(stored.name, stored.kind, stored.shape, stored.n_bytes, layer, group)


def _group(name: str) -> Group | None:
    return next((group for pattern, group in _GROUPS if pattern.fullmatch(name)), None)
