"""A session in a file: a line of JSON, then its sections, each with its digest.

The sections are the tokens, the turns, llama.cpp's cells, those of each checkpoint, and the messages if the writer has
them: `step35 chat` does, the server's clients send theirs with each request.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, get_args

from step35.chat.messages import Message, Role, ToolCall
from step35.chat.sampled_turns import KnownTurn
from step35.engine.session import Snapshot
from step35.errors import Step35Error

FORMAT = "step35-session-1"
MAX_HEADER = 1 << 20
TOKENS, TURNS, MESSAGES, STATE, CHECKPOINT = "tokens", "turns", "messages", "state", "checkpoint-"


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
    turns: tuple[KnownTurn, ...] = ()
    n_bytes: int = 0
    messages: tuple[Message, ...] | None = None
    """None if the file has none."""


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    n_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Head:
    """A file's first line."""

    key: dict[str, str]
    n_past: int
    last_start: int
    sections: tuple[_Section, ...]

    @property
    def checkpoints(self) -> tuple[int, ...]:
        names = [section.name for section in self.sections if section.name.startswith(CHECKPOINT)]
        return tuple(int(name.removeprefix(CHECKPOINT)) for name in names)

    def line(self) -> bytes:
        """Returns the line; its own digest is its last field."""
        sections = [[section.name, section.n_bytes, section.digest] for section in self.sections]
        fields = {
            "format": FORMAT,
            "key": self.key,
            "n_kv": self.n_past,
            "last_start": self.last_start,
            "sections": sections,
        }
        return json.dumps(fields | {"digest": _digest(json.dumps(fields).encode())}).encode() + b"\n"

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError on what `line` didn't write; older files have no digest."""
        rest = {name: value for name, value in fields.items() if name != "digest"}
        wanted, got = fields.get("digest"), _digest(json.dumps(rest).encode())
        if wanted not in (None, got):
            raise ValueError(f"first line expected digest {wanted}, got {got}")
        sections = tuple(_Section(str(name), int(n_bytes), str(digest)) for name, n_bytes, digest in fields["sections"])
        return cls(dict(fields["key"]), int(fields["n_kv"]), int(fields["last_start"]), sections)


def write_session(
    path: Path,
    key: Mapping[str, str],
    snapshot: Snapshot,
    turns: Sequence[KnownTurn],
    last_start: int,
    messages: Sequence[Message] | None = None,
) -> None:
    """Writes a session; the name holds either the whole new file or what was there before."""
    data = {
        TOKENS: array("i", snapshot.tokens).tobytes(),
        TURNS: json.dumps([turn.as_data() for turn in turns]).encode(),
        **({} if messages is None else {MESSAGES: json.dumps([asdict(message) for message in messages]).encode()}),
        STATE: snapshot.state,
        **{f"{CHECKPOINT}{n}": state for n, state in snapshot.checkpoints.items()},
    }
    sections = tuple(_Section(name, len(section), _digest(section)) for name, section in data.items())
    head = _Head(dict(key), snapshot.n_past, last_start, sections)
    unfinished = path.with_name(f"{path.name}.part")
    try:
        _write_synced(unfinished, [head.line(), *data.values()])
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
        head = _read_head(file, path)
        sections = dict(_read_sections(file, head, path, lambda name: name in (TOKENS, TURNS, MESSAGES)))
        n_bytes = os.fstat(file.fileno()).st_size
    try:
        tokens = tuple(array("i", sections[TOKENS]))
        turns = tuple(KnownTurn.from_data(entry) for entry in json.loads(sections[TURNS]))
        messages = tuple(map(_message, json.loads(sections[MESSAGES]))) if MESSAGES in sections else None
        checkpoints = head.checkpoints
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedSession(f"not a whole session: {path}: {type(error).__name__}: {error}") from error
    if not 0 < head.n_past <= len(tokens):
        raise DamagedSession(f"not a whole session: {path} expected 1 to {len(tokens)} cells, got {head.n_past}")
    return SavedSession(path, head.key, tokens, head.n_past, checkpoints, head.last_start, turns, n_bytes, messages)


def _message(entry: dict[str, Any]) -> Message:
    if entry["role"] not in get_args(Role):
        raise ValueError(f"role expected one of {get_args(Role)}, got {entry['role']!r}")
    calls = tuple(ToolCall(**call) for call in entry["tool_calls"])
    return Message(**entry | {"content": str(entry["content"]), "tool_calls": calls})


def read_cells(saved: SavedSession) -> Snapshot:
    """Reads the cells of a session; raises DamagedSession."""
    with open(saved.path, "rb") as file:
        head = _read_head(file, saved.path)
        cells = dict(_read_sections(file, head, saved.path, lambda name: name == STATE or name.startswith(CHECKPOINT)))
    try:
        checkpoints = {n: cells[f"{CHECKPOINT}{n}"] for n in saved.checkpoints}
        return Snapshot(saved.tokens, saved.n_past, cells[STATE], checkpoints)
    except KeyError as error:
        raise DamagedSession(f"not a whole session: {saved.path} lacks {error}") from error


def _read_head(file: BinaryIO, path: Path) -> _Head:
    line = file.readline(MAX_HEADER)
    fields = _fields(line, path)
    try:
        head = _Head.from_fields(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedSession(f"not a whole session: {path}: {type(error).__name__}: {error}") from error
    wanted, got = len(line) + sum(section.n_bytes for section in head.sections), os.fstat(file.fileno()).st_size
    if wanted != got or any(section.n_bytes < 0 for section in head.sections):
        raise DamagedSession(f"damaged session: {path} expected {wanted} bytes, got {got}")
    return head


def _fields(line: bytes, path: Path) -> dict[str, Any]:
    """Returns the fields of a session file's first line."""
    try:
        fields = json.loads(line)
        if {"vocab", "messages"} <= fields.keys():
            raise DamagedSession(
                f"saved by an older step35 chat: {path} expected format {FORMAT}, got none; the messages are in its "
                "first line, as JSON: begin again and /save that"
            )
        found = fields["format"]
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedSession(f"not a session: {path}: {type(error).__name__}: {error}") from error
    if found != FORMAT:
        raise DamagedSession(f"not a session: {path} expected format {FORMAT}, got {found!r}")
    return fields


def _read_sections(
    file: BinaryIO, head: _Head, path: Path, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    for section in head.sections:
        if not is_wanted(section.name):
            file.seek(section.n_bytes, os.SEEK_CUR)
            continue
        data = file.read(section.n_bytes)
        if _digest(data) != section.digest:
            raise DamagedSession(
                f"damaged session: {path}: {section.name} expected {section.n_bytes} bytes with digest "
                f"{section.digest}, got {len(data)}"
            )
        yield section.name, data


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
