"""A session in a file: a line of JSON, then tokens, turns and llama.cpp's cells, each with its digest."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from step35.chat.sampled_turns import KnownTurn
from step35.engine.session import Snapshot
from step35.errors import Step35Error

FORMAT = "step35-session-1"
MAX_HEADER = 1 << 20


class DamagedSession(Step35Error):
    """A session file is not whole, or not one."""


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What a session file holds besides the cells; the cells are read when they are wanted."""

    path: Path
    key: Mapping[str, str]
    """What the cells depend on: the model, the types of the cache, the template, the versions."""
    tokens: tuple[int, ...]
    n_past: int
    checkpoints: tuple[int, ...]
    last_start: int
    turns: tuple[KnownTurn, ...] = field(default=())
    n_bytes: int = 0


def write_session(
    path: Path, key: Mapping[str, str], snapshot: Snapshot, turns: Sequence[KnownTurn], last_start: int
) -> None:
    """Writes a session; the name holds either the whole new file or what was there before."""
    sections = {
        "tokens": array("i", snapshot.tokens).tobytes(),
        "turns": json.dumps([turn.as_data() for turn in turns]).encode(),
        "state": snapshot.state,
        **{f"checkpoint-{n}": state for n, state in snapshot.checkpoints.items()},
    }
    head = {
        "format": FORMAT,
        "key": dict(key),
        "n_kv": snapshot.n_past,
        "last_start": last_start,
        "sections": [[name, len(data), _digest(data)] for name, data in sections.items()],
    }
    unfinished = path.with_name(f"{path.name}.part")
    try:
        _write_synced(unfinished, [json.dumps(head).encode() + b"\n", *sections.values()])
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a full disk must not stay full of halves
        raise


def _write_synced(path: Path, pieces: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # what was said is in it
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def read_session(path: Path) -> SavedSession:
    """Reads all but the cells; raises DamagedSession."""
    with open(path, "rb") as file:
        head = _head(file, path)
        try:
            sections = dict(_sections(file, head, path, lambda name: name in ("tokens", "turns")))
            tokens = array("i", sections["tokens"])
            turns = tuple(KnownTurn.from_data(entry) for entry in json.loads(sections["turns"]))
            checkpoints = tuple(
                int(name.partition("-")[2]) for name, _, _ in head["sections"] if name.startswith("checkpoint-")
            )
            n_past, last_start, key = int(head["n_kv"]), int(head["last_start"]), dict(head["key"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedSession(f"not a whole session: {path}: {type(error).__name__}: {error}") from error
        if not 0 < n_past <= len(tokens):
            raise DamagedSession(f"not a whole session: {path} expected 1 to {len(tokens)} cells, got {n_past}")
        return SavedSession(
            path, key, tuple(tokens), n_past, checkpoints, last_start, turns, os.fstat(file.fileno()).st_size
        )


def read_cells(saved: SavedSession) -> Snapshot:
    """Reads the cells of a session; raises DamagedSession."""
    with open(saved.path, "rb") as file:
        head = _head(file, saved.path)
        cells = dict(_sections(file, head, saved.path, lambda name: name not in ("tokens", "turns")))
    try:
        checkpoints = {n: cells[f"checkpoint-{n}"] for n in saved.checkpoints}
        return Snapshot(saved.tokens, saved.n_past, cells["state"], checkpoints)
    except KeyError as error:
        raise DamagedSession(f"not a whole session: {saved.path} lacks {error}") from error


def _head(file: BinaryIO, path: Path) -> dict[str, Any]:
    try:
        head = json.loads(file.readline(MAX_HEADER))
        is_ours = head["format"] == FORMAT
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedSession(f"not a session: {path}: {type(error).__name__}: {error}") from error
    if not is_ours:
        raise DamagedSession(f"not a session: {path} expected format {FORMAT}, got {head['format']!r}")
    return head


def _sections(file: BinaryIO, head: dict[str, Any], path: Path, wanted) -> Iterator[tuple[str, bytes]]:
    for name, n_bytes, digest in head["sections"]:
        if not wanted(name):
            file.seek(n_bytes, os.SEEK_CUR)
            continue
        data = file.read(n_bytes)
        if len(data) != n_bytes or _digest(data) != digest:
            raise DamagedSession(
                f"damaged session: {path}: {name} expected {n_bytes} bytes with digest {digest}, got {len(data)}"
            )
        yield name, data


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
