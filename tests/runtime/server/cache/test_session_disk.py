"""The session pool and its files: what is written when, what comes back, and what a full disk leaves behind."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_native import Script, loader
from server_fakes import GREEDY
from step35.chat import session_file
from step35.chat.prompt_builder import Prompt
from step35.engine.decode_loop import begin, generate
from step35.engine.engine import Engine
from step35.options import EngineOptions
from step35.sampling.token_chooser import Chooser
from step35.server.cache.session_disk import SessionDisk
from step35.server.cache.session_pool import UNUSED_BEFORE_SAVE_S, SessionPool, SessionSlot

KEY = {"model": "fake"}
LONG = [1, *range(2, 60), *range(2, 60)]


class Desk:
    """A session pool over a fake engine, with a clock to be set."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 30) -> None:
        options = EngineOptions(Path("fake"), draft="off", n_ctx=400, n_batch=16, n_sessions=2)
        self.engine = Engine(options, loading=loader(Script()))
        self.disk = SessionDisk(folder, KEY, max_bytes)
        self.now = 0.0
        self.pool = SessionPool(self.engine, str, self.disk, lambda: self.now)

    def answer(self, prompt: list[int]) -> tuple[SessionSlot, int]:
        """Returns the session that served a prompt, and how much of the prompt it knew."""
        slot = self.pool.acquire(Prompt(prompt))
        assert slot is not None
        turn = begin(slot.session, prompt, Chooser(GREEDY), 4)
        list(generate(turn))
        self.pool.release(slot, 0, ())
        return slot, turn.stats.n_reused

    def save(self) -> bool:
        is_saved = self.pool.save_one()
        self.disk.wait()
        return is_saved


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.disk.close()
    desk.engine.close()


def test_a_long_conversation_is_not_written_for_every_short_turn(desk):
    """An agent's tool loop wrote gigabytes a turn."""
    slot, _ = desk.answer(LONG)
    assert desk.save() and not desk.save()
    desk.answer([*slot.session.tokens, 5])
    assert slot.is_unsaved and not desk.save(), "six tokens of 125 can wait"
    desk.now += UNUSED_BEFORE_SAVE_S
    assert desk.save(), "until nobody uses it"
    desk.answer([*slot.session.tokens, *range(2, 30)])
    assert desk.save(), "a fifth of it is new"


def test_a_conversation_that_is_still_being_written_comes_back(desk):
    """Its file was not there yet: it was called damaged, and the prompt was processed again."""
    may_write = threading.Event()
    desk.disk._jobs.put(may_write.wait)
    slot, _ = desk.answer(LONG)
    tokens = list(slot.session.tokens)
    desk.pool._evict(slot)
    assert not list(desk.disk.folder.iterdir())
    back, n_reused = desk.answer([*tokens, 7, 8])
    assert n_reused >= len(tokens) - 1
    may_write.set()
    desk.disk.wait()
    [path] = desk.disk.folder.iterdir()
    assert path.name == f"{back.name}.session"


def test_a_disk_that_is_full_loses_a_file_and_keeps_no_half(desk, monkeypatch, caplog):
    def full(path: Path, pieces) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_file, "_write_synced", full)
    slot, _ = desk.answer(LONG)
    with caplog.at_level(logging.WARNING):
        assert desk.save()
    assert "session not saved" in caplog.text and "No space left" in caplog.text
    assert not list(desk.disk.folder.iterdir()) and not desk.disk.saved
    _, n_reused = desk.answer([*slot.session.tokens, 7])
    assert n_reused, "it goes on in memory"


def test_files_over_the_size_go_the_longest_unused_first(tmp_path):
    desk = Desk(tmp_path)
    desk.answer(LONG)
    desk.save()
    [first] = tmp_path.iterdir()
    desk.disk.max_bytes = first.stat().st_size * 3 // 2
    desk.answer([9, *LONG])
    desk.save()
    [second] = tmp_path.iterdir()
    assert second != first and set(desk.disk.saved) == {second.name.removesuffix(".session")}
    desk.disk.close()
    desk.engine.close()


def test_half_a_file_of_a_kill_is_removed_and_a_foreign_one_left_alone(tmp_path):
    desk = Desk(tmp_path)
    desk.answer(LONG)
    desk.save()
    desk.disk.close()
    desk.engine.close()
    (tmp_path / "x.session.part").write_bytes(b"half")
    other = SessionDisk(tmp_path, KEY | {"model": "another"}, 1 << 30)
    other.close()
    assert not other.saved and [path.suffix for path in tmp_path.iterdir()] == [".session"]
