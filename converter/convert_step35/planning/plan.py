"""The whole plan of a conversion: every byte's place is known before any tensor data is read."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as V
from gguf import LlamaFileType

from convert_step35.errors import PlanError
from convert_step35.gguf.header import Entry, TensorInfo, encode_header, padded
from convert_step35.gguf.metadata import Provenance, build_metadata
from convert_step35.gguf.shard_names import shard_path
from convert_step35.models import Recipe
from convert_step35.planning.recipes import (
    Override,
    TypeChoice,
    best_fit,
    check_overrides,
    choose_types,
    imatrix_demands,
    tensor_bytes,
)
from convert_step35.source.architecture import Architecture
from convert_step35.source.mapping import MappedTensor, map_tensors
from convert_step35.source.tokenizer import Tokenizer

MTP_PREFIX = "mtp-"


class MtpMode(StrEnum):
    """Which parts of the model a file holds."""

    KEEP = "keep"
    SEPARATE = "separate"
    DROP = "drop"
    ONLY = "only"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of one file; `offset` counts from the start of the file."""

    mapped: MappedTensor
    ggml_type: GgmlType
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One output file: its final header and the place of each tensor."""

    path: Path
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All files of one conversion. `notes` are lines a user should read."""

    recipe: str
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def n_weights(self) -> int:
        return sum(math.prod(tensor.mapped.shape) for tensor in self.tensors)

    def sha256(self) -> str:
        """A digest of every header, so of all names, types, shapes, offsets and metadata."""
        sha = hashlib.sha256()
        for file in self.files:
            sha.update(f"{file.path.name} {file.n_bytes} ".encode() + file.header)
        return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class TargetSize:
    """Bytes that all files of a conversion may have together: the best recipe that fits is taken."""

    n_bytes: int


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What the user asked for. `types` is the name of a preset, recipe or ggml type, or the size to stay within."""

    out: Path
    types: str | TargetSize
    overrides: tuple[Override, ...] = ()
    mtp: MtpMode = MtpMode.KEEP
    mtp_type: GgmlType | None = None
    split_max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is converted: the model's shape, its tokenizer, and where it comes from."""

    arch: Architecture
    has_mtp: bool
    tokenizer: Tokenizer
    generation: dict[str, Any]
    provenance: Provenance
    imatrix_names: frozenset[str] | None = None

    def entries(
        self, tensors: Sequence[MappedTensor], *, with_mtp: bool, ftype: LlamaFileType, recipe: str
    ) -> tuple[Entry, ...]:
        """The metadata of one file with these tensors."""
        provenance = replace(self.provenance, recipe=recipe)
        return build_metadata(
            self.arch,
            self.tokenizer,
            tensors,
            with_mtp=with_mtp,
            ftype=ftype,
            generation=self.generation,
            provenance=provenance,
        )


def make_plan(subject: Subject, options: ConversionOptions, recipes: dict[str, Recipe]) -> Plan:
    """Lay out every file; PlanError where the options can't be met."""
    parts = tuple(_parts(subject, options))
    check_overrides(options.overrides, [tensor for part in parts for tensor in part.tensors])
    types = options.types
    name = types if isinstance(types, str) else _fitting(subject, options, types, recipes, parts)
    choices = [_choose(subject, options, recipes, name, part.tensors) for part in parts]
    notes = [*subject.tokenizer.notes, *_mtp_notes(subject, options)]
    files: list[PlannedFile] = []
    for part, choice in zip(parts, choices, strict=True):
        notes += _imatrix_notes(subject, choice, part.tensors)
        files += _lay_out(subject, part, choice, options.split_max_bytes)
    return Plan(choices[-1].recipe, tuple(files), tuple(notes))


def side_file(out: Path) -> Path:
    """Where `--mtp separate` puts the MTP heads: mtp-NAME beside NAME."""
    return out.with_name(MTP_PREFIX + out.name)


@dataclass(frozen=True, slots=True)
class _Part:
    """One file before it is cut into shards."""

    path: Path
    tensors: tuple[MappedTensor, ...]
    with_mtp: bool


def _parts(subject: Subject, options: ConversionOptions) -> Iterator[_Part]:
    mode, arch = options.mtp, subject.arch
    if options.mtp_type is not None and (mode is MtpMode.DROP or not subject.has_mtp):
        reason = "--mtp drop leaves them out" if subject.has_mtp else "the checkpoint has none"
        raise PlanError(
            f"no MTP heads: --mtp-type {options.mtp_type.name} is for their matrices, and {reason}; leave it out"
        )
    if not subject.has_mtp and mode in (MtpMode.SEPARATE, MtpMode.ONLY):
        raise PlanError(
            f"no MTP weights: --mtp {mode.value} needs the checkpoint's MTP layers, and it has none; use --mtp drop"
        )
    with_mtp = mode is MtpMode.KEEP and subject.has_mtp
    if mode is not MtpMode.ONLY:
        yield _Part(options.out, map_tensors(arch, trunk=True, mtp=with_mtp), with_mtp)
    if mode is MtpMode.ONLY:
        yield _Part(options.out, map_tensors(arch, trunk=False, mtp=True), True)
    if mode is MtpMode.SEPARATE:
        yield _Part(side_file(options.out), map_tensors(arch, trunk=False, mtp=True), True)


def _choose(
    subject: Subject,
    options: ConversionOptions,
    recipes: dict[str, Recipe],
    name: str,
    tensors: tuple[MappedTensor, ...],
) -> TypeChoice:
    choice = choose_types(
        name,
        tensors,
        subject.arch,
        recipes,
        overrides=options.overrides,
        mtp_type=options.mtp_type,
        has_imatrix=subject.imatrix_names is not None,
    )
    demands = [n for n in imatrix_demands(choice, tensors) if n not in (subject.imatrix_names or ())]
    if demands:
        raise PlanError(
            f"imatrix needed: {name} makes {demands[0]} {choice.types[demands[0]].name} ({len(demands)} such "
            "tensors), which is garbage without one; pass --imatrix FILE that has them"
        )
    return choice


def _fitting(
    subject: Subject,
    options: ConversionOptions,
    target: TargetSize,
    recipes: dict[str, Recipe],
    parts: Sequence[_Part],
) -> str:
    """The best recipe whose files, MTP included, stay within the target."""

    def choices(name: str) -> list[tuple[_Part, TypeChoice]]:
        def choose(part: _Part) -> TypeChoice:
            overrides, mtp_type = options.overrides, options.mtp_type
            return choose_types(name, part.tensors, subject.arch, recipes, overrides=overrides, mtp_type=mtp_type)

        return [(part, choose(part)) for part in parts]

    def usable(name: str) -> bool:
        demands = (imatrix_demands(choice, part.tensors) for part, choice in choices(name))
        return subject.imatrix_names is not None or not any(demands)

    def n_bytes(name: str) -> int:
        files = (_lay_out(subject, part, choice, options.split_max_bytes) for part, choice in choices(name))
        return sum(file.n_bytes for shards in files for file in shards)

    return best_fit(target.n_bytes, [name for name in recipes if usable(name)], n_bytes)


def _lay_out(subject: Subject, part: _Part, choice: TypeChoice, split_max: int | None) -> list[PlannedFile]:
    """The file of a part, or its shards: the first has all metadata."""
    entries = subject.entries(part.tensors, with_mtp=part.with_mtp, ftype=choice.ftype, recipe=choice.recipe)
    shards = _shards(part.tensors, choice, split_max)
    if len(shards) == 1:
        return [_file(part.path, entries, part.tensors, choice)]
    n = len(shards)
    return [
        _file(
            shard_path(part.path, i, n),
            (*(entries if i == 0 else ()), *_split_entries(i, n, len(part.tensors))),
            shard,
            choice,
        )
        for i, shard in enumerate(shards)
    ]


def _shards(
    tensors: Sequence[MappedTensor], choice: TypeChoice, split_max: int | None
) -> list[tuple[MappedTensor, ...]]:
    """Cut the tensors, in order, into runs of at most `split_max` bytes of data."""
    if split_max is None:
        return [tuple(tensors)]
    shards: list[list[MappedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        n_bytes = padded(tensor_bytes(tensor, choice.types[tensor.name]))
        if n_bytes > split_max:
            raise PlanError(f"--split-max-size too small: {tensor.name} alone has {n_bytes} bytes, got {split_max}")
        if shards[-1] and used + n_bytes > split_max:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += n_bytes
    return [tuple(shard) for shard in shards]


def _split_entries(i: int, n: int, n_tensors: int) -> tuple[Entry, ...]:
    return (
        Entry("split.no", V.UINT16, i),
        Entry("split.count", V.UINT16, n),
        Entry("split.tensors.count", V.INT32, n_tensors),
    )


def _file(path: Path, entries: Sequence[Entry], tensors: Sequence[MappedTensor], choice: TypeChoice) -> PlannedFile:
    infos: list[TensorInfo] = []
    offset = 0
    for tensor in tensors:
        infos.append(TensorInfo(tensor.name, choice.types[tensor.name], tensor.shape, offset))
        offset += padded(tensor_bytes(tensor, choice.types[tensor.name]))
    header = encode_header(entries, infos)
    planned = tuple(
        PlannedTensor(tensor, info.ggml_type, len(header) + info.offset, tensor_bytes(tensor, info.ggml_type))
        for tensor, info in zip(tensors, infos, strict=True)
    )
    return PlannedFile(path, header, planned, len(header) + offset)


def _mtp_notes(subject: Subject, options: ConversionOptions) -> list[str]:
    if subject.has_mtp or options.mtp is not MtpMode.KEEP:
        return []
    if subject.arch.n_mtp:
        return [
            f"config.json declares {subject.arch.n_mtp} MTP layers but the checkpoint holds none of their weights: "
            "trunk only, no drafting"
        ]
    return ["the checkpoint has no MTP layers: trunk only, no drafting"]


def _imatrix_notes(subject: Subject, choice: TypeChoice, tensors: tuple[MappedTensor, ...]) -> list[str]:
    if subject.imatrix_names is None:
        return []
    ignored = {GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.MXFP4, GgmlType.NVFP4}
    missing = [t.name for t in tensors if choice.types[t.name] not in ignored and t.name not in subject.imatrix_names]
    if not missing:
        return []
    return [
        f"the imatrix has no entry for {len(missing)} of the quantized tensors, such as {missing[0]}: "
        "they are quantized without"
    ]
