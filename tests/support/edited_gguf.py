"""Makes a GGUF that is wrong in one way out of a sound one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import GGUFValueType as V

from convert_step35.gguf.header import Entry, TensorInfo, encode_header, padded
from convert_step35.gguf.reader import GgufFile, GgufTensor, read_gguf


def edit_gguf(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, Any] = {},
    without: tuple[str, ...] = (),
    shapes: Mapping[str, tuple[int, ...]] = {},
    types: Mapping[str, GGMLQuantizationType] = {},
) -> Path:
    """Write `source` to `target` with some keys and tensors changed; data that no longer fits becomes zeros.

    Args:
        metadata: a plain value keeps the key's type, an Entry brings its own, None removes the key.
        without: tensors to leave out, each by its whole name or by a prefix that ends in a dot.
        shapes, types: tensors to change, or to add as F32.
    """
    file = read_gguf(source)
    kept = [tensor for tensor in file.tensors.values() if not any(_matches(tensor.name, mark) for mark in without)]
    new_shapes = {tensor.name: tensor.shape for tensor in kept} | dict(shapes)
    new_types = {name: tensor.ggml_type for name, tensor in file.tensors.items()} | dict(types)
    infos: list[TensorInfo] = []
    offset = 0
    for name, shape in new_shapes.items():
        infos.append(TensorInfo(name, new_types.get(name, GGMLQuantizationType.F32), shape, offset))
        offset += padded(_n_bytes(infos[-1]))
    with source.open("rb") as old, target.open("wb") as new:
        new.write(encode_header(_entries(file, metadata), infos))
        start = new.tell()
        new.truncate(start + offset)
        for info in infos:
            _copy(old, new, file.tensors.get(info.name), start, info)
    return target


def _matches(name: str, mark: str) -> bool:
    return name == mark or (mark.endswith(".") and name.startswith(mark))


def _n_bytes(info: TensorInfo) -> int:
    n_per_block, block_bytes = GGML_QUANT_SIZES[info.ggml_type]
    return math.prod(info.shape) // n_per_block * block_bytes


def _copy(old: BinaryIO, new: BinaryIO, stored: GgufTensor | None, start: int, info: TensorInfo) -> None:
    if stored is not None and stored.n_bytes == _n_bytes(info):
        old.seek(stored.offset)
        new.seek(start + info.offset)
        new.write(old.read(stored.n_bytes))


def _entries(file: GgufFile, metadata: Mapping[str, Any]) -> list[Entry]:
    kinds = {key: item if item is not None else kind for key, (kind, item) in file.value_types.items()}
    changed = {**file.metadata, **metadata}
    return [
        value if isinstance(value, Entry) else _entry(key, kinds[key], value)
        for key, value in changed.items()
        if value is not None
    ]


def _entry(key: str, kind: V, value: Any) -> Entry:
    return Entry(key, kind, tuple(value) if isinstance(value, list) else value)
