"""A checkpoint folder: its config, its shards' tensors and their identity, without reading tensor data."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_step35.errors import CheckpointError, quoted
from convert_step35.source.architecture import Architecture, read_architecture
from convert_step35.source.mapping import Kind, MappedTensor, canonical_source, is_vision, map_tensors
from convert_step35.source.safetensors_header import StoredTensor, read_header, read_index, resolve_shard
from convert_step35.source.strict_json import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_CONFIG_BYTES = 4 * 1024**2

FLOAT_DTYPES = ("BF16", "F16", "F32")
FP8_DTYPE = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"

# Scales of the KV cache and of activations in FP8 checkpoints: the weights don't need them.
_UNUSED_SUFFIXES = (".k_scale", ".v_scale", ".input_scale", "_activation_scale", ".activation_scale")


@dataclass(frozen=True, slots=True)
class BlockScale:
    """The scales of an FP8 tensor: one for each block of so many rows and columns."""

    stored: StoredTensor
    block_rows: int
    block_columns: int


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor and, for FP8, the scales its blocks are multiplied by."""

    weight: StoredTensor
    scale: BlockScale | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All that is stored for it."""
        return (self.weight,) if self.scale is None else (self.weight, self.scale.stored)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose every tensor is there, of the right shape and dtype.

    `sources` is keyed by canonical names; `has_mtp` is False where the MTP weights are missing as a whole,
    `n_skipped_vision` counts the vision tensors that are left out.
    """

    folder: Path
    config: dict[str, Any]
    arch: Architecture
    sources: dict[str, Source]
    has_mtp: bool
    n_skipped_vision: int
    n_text_tensors: int
    n_text_bytes: int

    @property
    def dtype(self) -> str:
        """The dtype of nearly all weights: the routed experts'."""
        return FP8_DTYPE if self.arch.fp8_block is not None else self.sources["model.embed_tokens.weight"].weight.dtype

    @property
    def shards(self) -> tuple[Path, ...]:
        return tuple(sorted({tensor.path for source in self.sources.values() for tensor in source.stored}))

    def source_of(self, tensor: MappedTensor) -> Source | None:
        """What a GGUF tensor is made of; None for one that is generated."""
        return self.sources[tensor.source] if tensor.source is not None else None


def open_checkpoint(folder: Path, *, mtp_only: bool = False) -> Checkpoint:
    """Read config.json and the shards' headers and check every tensor; CheckpointError names the first wrong one.

    With `mtp_only` the shards that hold nothing an MTP-only file needs may be absent.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            f"no checkpoint: {folder} expected a folder with config.json and safetensors, got {what}; "
            "give the checkpoint's folder"
        )
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"no checkpoint: {folder} expected config.json and safetensors in it, got no config.json; "
            "give the checkpoint's folder"
        )
    config = read_json(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
    arch = read_architecture(config)
    stored = _read_shards(folder, _wanted_names(arch) if mtp_only else None)
    text = _text_tensors(stored)
    has_mtp = _has_mtp(arch, text)
    mapped = map_tensors(arch, trunk=not mtp_only, mtp=has_mtp)
    sources = {m.source: _source(arch, m, m.source, text, folder) for m in mapped if m.source is not None}
    if not mtp_only:
        _refuse_extra(text, sources, folder)
    return Checkpoint(
        folder=folder,
        config=config,
        arch=arch,
        sources=sources,
        has_mtp=has_mtp,
        n_skipped_vision=len(stored) - len(text),
        n_text_tensors=len(text),
        n_text_bytes=sum(t.n_bytes for t in text.values()),
    )


def digest(checkpoint: Checkpoint) -> str:
    """sha256 over the config and the name, size and header of every shard: cheap, and any other download differs."""
    sha = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for path in checkpoint.shards:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            sha.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(n_header))
    return sha.hexdigest()


def modification_times(checkpoint: Checkpoint) -> dict[str, int]:
    """The shards' modification times in ns: a resumed run must find the input untouched."""
    return {path.name: path.stat().st_mtime_ns for path in checkpoint.shards}


def _wanted_names(arch: Architecture) -> frozenset[str]:
    mapped = map_tensors(arch, trunk=False, mtp=True)
    return frozenset(m.source for m in mapped if m.source is not None)


def _read_shards(folder: Path, wanted: frozenset[str] | None) -> list[StoredTensor]:
    """All tensors of the shards that hold `wanted` names (all shards for None), checked against the index."""
    if not (folder / INDEX).is_file():
        return _read_single(folder)
    index = read_index(folder / INDEX)
    names = sorted({shard for name, shard in index.items() if wanted is None or canonical_source(name) in wanted})
    tensors = [t for name in names for t in read_header(_shard(folder, name, wanted))]
    _check_index(folder, index, tensors, set(names))
    return tensors


def _read_single(folder: Path) -> list[StoredTensor]:
    if not (folder / SINGLE).exists():
        raise CheckpointError(
            f"no weights: {folder} expected {INDEX} or {SINGLE}, got neither; download the checkpoint's safetensors"
        )
    return list(read_header(resolve_shard(folder, SINGLE)))


def _shard(folder: Path, name: str, wanted: frozenset[str] | None) -> Path:
    if not (folder / name).exists():
        needed = "" if wanted is None else ", which holds MTP tensors"
        raise CheckpointError(f"missing shard: {folder / name} is named by {INDEX}{needed}; download it")
    return resolve_shard(folder, name)


def _check_index(folder: Path, index: dict[str, str], tensors: Iterable[StoredTensor], read: set[str]) -> None:
    """Index and shards agree on where each tensor is, in both directions."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise CheckpointError(
                f"duplicate tensor: {quoted(tensor.name)} stands in {found[tensor.name]} and in {tensor.path.name}"
            )
        found[tensor.name] = tensor.path.name
    expected = {name: shard for name, shard in index.items() if shard in read}
    if found != expected:
        name = next(name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name))
        raise CheckpointError(
            f"index and shards disagree: {folder / INDEX}: tensor {quoted(name)} expected in "
            f"{expected.get(name, 'no shard')}, "
            f"got {found.get(name, 'nothing')}; download the checkpoint again"
        )


def _text_tensors(stored: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """The text part's tensors by canonical name."""
    text: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = canonical_source(tensor.name)
        if name in text:
            raise CheckpointError(
                f"duplicate tensor: {quoted(tensor.name)} in {tensor.path.name} and {quoted(text[name].name)} in "
                f"{text[name].path.name} are the same"
            )
        if not is_vision(tensor.name):
            text[name] = tensor
    return text


def _has_mtp(arch: Architecture, text: dict[str, StoredTensor]) -> bool:
    """True where any MTP tensor is stored; a declared MTP part may be absent as a whole."""
    prefixes = tuple(f"model.layers.{i}." for i, layer in enumerate(arch.layers) if layer.is_mtp)
    return bool(prefixes) and any(name.startswith(prefixes) for name in text)


def _source(arch: Architecture, mapped: MappedTensor, name: str, text: dict[str, StoredTensor], folder: Path) -> Source:
    """The stored tensor of this canonical name, checked against what it becomes."""
    tensor = text.get(name)
    if tensor is None:
        raise CheckpointError(
            f"missing tensor: {folder}: {name} expected {_dims(mapped.shape)}, got nothing; download the shards again"
        )
    if tensor.shape != mapped.shape:
        raise CheckpointError(
            f"misshaped tensor: {tensor.path.name}: {name} expected {_dims(mapped.shape)}, got {_dims(tensor.shape)}"
        )
    if tensor.dtype == FP8_DTYPE and mapped.kind is Kind.MATRIX:
        return Source(tensor, _scale(arch, tensor, text))
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"unsupported dtype: {tensor.path.name}: {name} expected {', '.join(FLOAT_DTYPES)} or {FP8_DTYPE} with "
            f"scales, got {tensor.dtype}"
        )
    return Source(tensor)


def _scale(arch: Architecture, tensor: StoredTensor, text: dict[str, StoredTensor]) -> BlockScale:
    name = canonical_source(tensor.name) + SCALE_SUFFIX
    scale = text.get(name)
    if arch.fp8_block is None or scale is None:
        raise CheckpointError(
            f"missing scale: {tensor.path.name}: {tensor.name} is {FP8_DTYPE} and expected {name} and "
            "weight_block_size in config.json"
        )
    n_blocks = (-(-size // block) for size, block in zip(tensor.shape[-2:], arch.fp8_block, strict=True))
    want = (*tensor.shape[:-2], *n_blocks)
    if scale.shape != want or scale.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"misshaped scale: {scale.path.name}: {name} expected {_dims(want)} of {', '.join(FLOAT_DTYPES)}, "
            f"got {_dims(scale.shape)} of {scale.dtype}"
        )
    return BlockScale(scale, *arch.fp8_block)


def _refuse_extra(text: dict[str, StoredTensor], sources: dict[str, Source], folder: Path) -> None:
    used = {canonical_source(stored.name) for source in sources.values() for stored in source.stored}
    extra = sorted(name for name in text.keys() - used if not name.endswith(_UNUSED_SUFFIXES))
    if extra:
        raise CheckpointError(
            f"unexpected tensor: {folder}: {quoted(extra[0])} is no part of Step-3.5 ({len(extra)} such tensors); "
            "is this another model?"
        )


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"
