"""llama.cpp's names for the shards of a model: NAME-00001-of-00003.gguf, numbered from 1."""

import re
from dataclasses import dataclass
from pathlib import Path

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class ShardName:
    """What a shard's name says: the whole model's name, and which shard of how many; not checked to fit together."""

    whole_name: str
    number: int
    count: int


def parse_shard_name(name: str) -> ShardName | None:
    """The parts of a shard's name; None for the name of a whole file."""
    match = _SHARD.fullmatch(name)
    return ShardName(match["stem"] + ".gguf", int(match["number"]), int(match["count"])) if match is not None else None


def is_shard_name(name: str) -> bool:
    """True for NAME-00001-of-00003.gguf, which stands for all its shards."""
    return parse_shard_name(name) is not None


def whole_name(name: str) -> str:
    """The name that shards were made of: OUT.gguf of OUT-00002-of-00003.gguf."""
    shard = parse_shard_name(name)
    return name if shard is None else shard.whole_name


def shard_path(path: Path, i: int, n: int) -> Path:
    """The path of shard `i` of `n`, counted from 0: llama.cpp loads the rest from the first."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{i + 1:05d}-of-{n:05d}.gguf")
