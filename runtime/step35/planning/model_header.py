"""What a GGUF's header says of memory: its tensors with their bytes, and the model's shape.

Only the header is read, without llama.cpp: a file of any size, on any machine, takes a fraction of a
second. Tensor data may be a hole. See docs/gguf.md for the names and keys.
"""

import hashlib
import mmap
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from step35.errors import ModelError
from step35.native import draft_vocabulary

ARCHITECTURE = "step35"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 4
MAX_HEADER_BYTES = 256 * 2**20
"""Far beyond any real model's; all that is mapped of a file."""


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
    name: str
    recipe: str
    shape: ModelShape
    tensors: tuple[Tensor, ...]
    digest: str
    n_blocks: int
    """Layers that the (trunk's) file declares, heads included: what llama.cpp spreads over several GPUs."""

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)


def read_header(path: Path) -> Header:
    """Reads the header of a model, or of all its shards; raises ModelError on anything else."""
    files = [_read_file(path)]
    files += [_read_file(shard) for shard in _other_shards(path, files[0].metadata.get("split.count", 1))]
    metadata = files[0].metadata
    if metadata.get("general.architecture") not in (ARCHITECTURE, draft_vocabulary.ARCHITECTURE):
        raise ModelError(
            f"not a Step-3.5 model: {path} expected general.architecture={ARCHITECTURE}, "
            f"got {metadata.get('general.architecture')!r}; convert a checkpoint with convert-step35"
        )
    raw = [tensor for file in files for tensor in file.tensors]
    shape = _shape(path, metadata, {name: dims for name, _, dims, _ in raw})
    tensors = tuple(_tensor(shape, *entry) for entry in raw)
    digest = hashlib.sha256("".join(file.digest for file in files).encode()).hexdigest()
    recipe = str(metadata.get("convert_step35.recipe", ""))
    n_blocks = metadata[f"{ARCHITECTURE}.block_count"]
    return Header(path, str(metadata.get("general.name", path.name)), recipe, shape, tensors, digest, n_blocks)


def read_model(path: Path, mtp: Path | None = None) -> Header:
    """Returns the header of a model, joined with that of a side file that brings the heads.

    Raises ModelError if the model's file holds only heads, or the other none.
    """
    header = read_header(path)
    if all(tensor.layer is None or tensor.layer >= header.shape.n_trunk for tensor in header.tensors):
        raise ModelError(f"no trunk: {path} holds only MTP heads; give the model's file, and this one with --mtp")
    return header if mtp is None else with_side(header, read_header(mtp))


def with_side(header: Header, side: Header) -> Header:
    """Returns a trunk's header joined with that of an MTP side file, which brings its own embedding and output.

    Heads in the trunk's own file then lie idle, as far as llama.cpp loads them. Raises ModelError if the side file has
    no heads.
    """
    if not side.shape.n_heads:
        raise ModelError(
            f"no MTP heads: {side.path} expected some, got none; make it with convert-step35 run --mtp only"
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


def shard_paths(path: Path) -> list[Path]:
    """Returns a model's files: itself, and its other shards."""
    return [path, *_other_shards(path, _read_file(path).metadata.get("split.count", 1))]


def _other_shards(path: Path, n_shards: int) -> list[Path]:
    if n_shards <= 1:
        return []
    stem, mark, _ = path.name.rpartition("-00001-of-")
    if not mark:
        raise ModelError(f"not the first shard: {path} expected a name with -00001-of-{n_shards:05}; open that one")
    return [path.with_name(f"{stem}-{i:05}-of-{n_shards:05}.gguf") for i in range(2, n_shards + 1)]


# the model's shape


def _shape(path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelShape:
    keys = _Keys(path, metadata)
    n_blocks, n_declared = keys.number("block_count"), keys.number("nextn_predict_layers", 0)
    n_trunk = n_blocks - n_declared
    has_heads = f"blk.{n_trunk}.nextn.eh_proj.weight" in shapes
    head_dim = keys.number("attention.key_length")
    if "token_embd.weight" not in shapes:
        raise ModelError(f"incomplete model: {path} expected token_embd.weight, got no such tensor; convert it again")
    return ModelShape(
        n_trunk=n_trunk,
        n_heads=n_declared if has_heads else 0,
        n_embd=keys.number("embedding_length"),
        n_ff=keys.number("feed_forward_length"),
        n_ff_expert=keys.number("expert_feed_forward_length"),
        n_ff_shared=next((s[0] for n, s in shapes.items() if n.endswith("ffn_gate_shexp.weight")), 0),
        n_expert=keys.number("expert_count"),
        n_expert_used=keys.number("expert_used_count"),
        n_vocab=shapes["token_embd.weight"][0],
        n_head_vocab=shapes["token_embd.weight"][0],
        head_dim=head_dim,
        window=keys.number("attention.sliding_window"),
        n_ctx_train=keys.number("context_length"),
        layers=_layers(keys, n_blocks if has_heads else n_trunk, shapes),
    )


def _layers(keys: "_Keys", n_layers: int, shapes: dict[str, tuple[int, ...]]) -> tuple[LayerShape, ...]:
    columns = zip(
        keys.each("attention.head_count", n_layers),
        keys.each("attention.head_count_kv", n_layers),
        keys.each("attention.sliding_window_pattern", n_layers),
        keys.each("swiglu_clamp_exp", n_layers, 0.0),
        keys.each("swiglu_clamp_shexp", n_layers, 0.0),
        strict=True,
    )
    return tuple(
        LayerShape(n_head, n_head_kv, bool(sliding), f"blk.{i}.ffn_gate_exps.weight" in shapes, routed > 0, shared > 0)
        for i, (n_head, n_head_kv, sliding, routed, shared) in enumerate(columns)
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    path: Path
    metadata: dict[str, Any]

    def number(self, name: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{ARCHITECTURE}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._bad(name, "a number", value)
        return value

    def each(self, name: str, n: int, default: float | None = None) -> list[Any]:
        """Returns one value a layer; a scalar stands for all of them."""
        value = self.metadata.get(f"{ARCHITECTURE}.{name}", default)
        values = value if isinstance(value, list) else [value] * n
        if None in values or len(values) < n:
            raise self._bad(name, f"{n} values", value)
        return values[:n]

    def _bad(self, name: str, want: str, got: object) -> ModelError:
        return ModelError(
            f"bad metadata: {self.path} {ARCHITECTURE}.{name} expected {want}, got {got!r}; convert it again"
        )


_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
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


def _tensor(shape: ModelShape, name: str, kind: str, dims: tuple[int, ...], n_bytes: int) -> Tensor:
    match = _LAYER.fullmatch(name)
    layer = int(match[1]) if match else None
    if layer is not None and layer >= shape.n_trunk:
        return Tensor(name, kind, dims, n_bytes, layer, Group.HEADS)
    short = match[2] if match else name
    group = next((group for pattern, group in _GROUPS if pattern.fullmatch(short)), None)
    if group is None:
        raise ModelError(f"unknown tensor: {name} isn't one of a Step-3.5 model's; convert the checkpoint again")
    return Tensor(name, kind, dims, n_bytes, layer, group)


# the file


@dataclass(frozen=True, slots=True)
class _File:
    metadata: dict[str, Any]
    tensors: list[tuple[str, str, tuple[int, ...], int]]
    digest: str


def _read_file(path: Path) -> _File:
    if not path.is_file():
        raise ModelError(f"no model file: {path} doesn't exist or isn't a file")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelError(f"not a GGUF file: {path} expected the magic b'GGUF', got {magic!r}")
            n_bytes = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), min(n_bytes, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data:
                return _parse(path, data, n_bytes)
    except OSError as error:
        raise ModelError(f"can't read the model: {path}: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, OverflowError) as error:
        raise ModelError(f"unreadable GGUF header: {path}: {error}; download or convert it again") from error


def _parse(path: Path, data: mmap.mmap, file_bytes: int) -> _File:
    cursor = _Cursor(data, 4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ModelError(f"unknown GGUF version: {path} expected 2 or 3, got {version}; convert the model again")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    metadata = dict(cursor.entry() for _ in range(n_keys))
    tensors = [cursor.tensor() for _ in range(n_tensors)]
    _check_data(path, metadata, (t[3] for t in tensors), cursor.at, file_bytes)
    return _File(metadata, tensors, hashlib.sha256(data[: cursor.at]).hexdigest())


def _check_data(path: Path, metadata: dict[str, Any], sizes: Iterable[int], header_end: int, file_bytes: int) -> None:
    alignment = metadata.get("general.alignment", 32)
    end = -(-header_end // alignment) * alignment
    for n_bytes in sizes:
        last = end + n_bytes
        end += -(-n_bytes // alignment) * alignment
        if last > file_bytes:
            raise ModelError(
                f"incomplete file: {path} expected at least {last} bytes, got {file_bytes}; download it again"
            )


@dataclass(slots=True)
class _Cursor:
    """A place in the header, moving forward; struct.error at the file's end."""

    data: mmap.mmap
    at: int

    def number(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        start, n = self.at + 8, self.number("Q")
        self._skip(n)
        return self.data[start : self.at].decode()

    def entry(self) -> tuple[str, Any]:
        return self.text(), self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        return self.number(_SCALARS[kind])

    def _array(self, kind: int, n: int) -> list[Any]:
        """Returns an array of numbers; the texts of a vocabulary are skipped."""
        if kind == _STRING:
            self._skip_texts(n)
            return []
        code = f"<{n}{_SCALARS[kind]}"
        start = self.at
        self._skip(struct.calcsize(code))
        return list(struct.unpack_from(code, self.data, start))

    def _skip_texts(self, n: int) -> None:
        data, at, length = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(n):  # a vocabulary and its merges: a quarter of a million
            at += 8 + length(data, at)[0]
        self._skip(at - self.at)

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name, n_dims = self.text(), self.number("I")
        if n_dims > _MAX_DIMS:
            raise ValueError(f"{name} expected at most {_MAX_DIMS} dimensions, got {n_dims}")
        dims = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        kind = GGMLQuantizationType(self.number("I"))
        self.number("Q")  # the offset: tensors lie one after the other
        return name, kind.name, dims, _n_bytes(kind, dims)

    def _skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, {self.at - len(self.data)} bytes too early")


def _n_bytes(kind: GGMLQuantizationType, dims: tuple[int, ...]) -> int:
    n_weights = 1
    for size in dims:
        n_weights *= size
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return n_weights // block * block_bytes
