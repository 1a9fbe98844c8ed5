"""A session's file: what was written comes back, what an older version wrote is read, and no damage passes."""

import json
from array import array
from hashlib import blake2b
from pathlib import Path

import pytest

from step35.chat.messages import Message, ToolCall
from step35.chat.sampled_turns import KnownTurn, known_turn
from step35.chat.session_file import DamagedSession, SavedSession, read_cells, read_session, write_session
from step35.engine.session import Snapshot

KEY = {"model": "fake", "kv_type": "f16"}
MESSAGES = (
    Message("user", "Hello ☃"),
    Message("assistant", "Hi.", "Hm.", (ToolCall("c", "ls", '{"path": "/"}'),)),
    Message("tool", "a b", tool_call_id="c"),
)
TURNS = (known_turn([1, 2], [3, 4], MESSAGES[1]),)
SNAPSHOT = Snapshot((1, 2, 3, 4, 5), 4, b"all cells", {2: b"window", 3: b""})


def write(path: Path, messages: tuple[Message, ...] | None = MESSAGES) -> Path:
    write_session(path, KEY, SNAPSHOT, TURNS, 2, messages)
    return path


def read(path: Path) -> tuple[SavedSession, Snapshot]:
    saved = read_session(path)
    return saved, read_cells(saved)


@pytest.mark.parametrize("messages", [None, (), MESSAGES])
def test_what_was_written_comes_back(tmp_path: Path, messages: tuple[Message, ...] | None) -> None:
    path = write(tmp_path / "a.session", messages)
    saved, snapshot = read(path)
    wanted = SavedSession(path, KEY, SNAPSHOT.tokens, 4, (2, 3), 2, TURNS, path.stat().st_size, messages)
    assert (saved, snapshot) == (wanted, SNAPSHOT)
    assert path.stat().st_mode & 0o077 == 0 and [file.name for file in tmp_path.iterdir()] == ["a.session"]


def older_file(turns: tuple[KnownTurn, ...]) -> bytes:
    """The file as it was before it had messages and a digest of its first line."""
    sections = {
        "tokens": array("i", SNAPSHOT.tokens).tobytes(),
        "turns": json.dumps([turn.as_data() for turn in turns]).encode(),
        "state": SNAPSHOT.state,
        **{f"checkpoint-{n}": state for n, state in SNAPSHOT.checkpoints.items()},
    }
    head = {
        "format": "step35-session-1",
        "key": KEY,
        "n_kv": 4,
        "last_start": 2,
        "sections": [[name, len(data), blake2b(data, digest_size=16).hexdigest()] for name, data in sections.items()],
    }
    return json.dumps(head).encode() + b"\n" + b"".join(sections.values())


def test_the_server_s_older_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    path.write_bytes(older_file(TURNS))
    saved, snapshot = read(path)
    assert (saved.key, saved.turns, saved.messages, snapshot) == (KEY, TURNS, None, SNAPSHOT)


def test_a_saved_chat_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    head = {
        "vocab": "0" * 16,
        "n_embd": 64,
        "n_kv": 2,
        "tokens": [1, 2],
        "messages": [{"role": "user", "content": "Hi"}],
    }
    path.write_bytes(json.dumps(head).encode() + b"\ncells")
    with pytest.raises(DamagedSession, match=r"saved by an older step35 chat: .*talk .* begin again"):
        read(path)


def test_no_flipped_bit_passes(tmp_path: Path) -> None:
    """A flip in the number of cells once passed: the first line had no digest."""
    path = write(tmp_path / "a.session")
    whole, wanted = path.read_bytes(), read(path)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 7)]) + whole[i + 1 :])
        try:
            assert read(path) == wanted, f"byte {i}"
        except DamagedSession as error:
            assert "\n" not in str(error)


def test_no_half_passes_and_nothing_after_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.session")
    whole = path.read_bytes()
    for damaged in [*(whole[:n] for n in range(0, len(whole), 7)), whole + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedSession):
            read(path)


@pytest.mark.parametrize("line", [b"[]", b"1", b'"vocab"', b"{}", b"\xff", b"[" * 100_000, b'{"format": "other"}', b""])
def test_any_other_file_is_refused_in_one_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(line + b"\n")
    with pytest.raises(DamagedSession, match="^not a session: [^\n]*$"):
        read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_kv", 0), ("n_kv", 6), ("sections", [["tokens", -1, ""]]), ("sections", [1]), ("sections", []), ("key", 1)],
)
def test_a_first_line_that_says_nonsense_is_refused(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "a.session"
    line, _, rest = older_file(TURNS).partition(b"\n")
    path.write_bytes(json.dumps(json.loads(line) | {field: value}).encode() + b"\n" + rest)
    with pytest.raises(DamagedSession):
        read(path)
