"""Sessions on disk: written in the background, one at a time, found again after a restart, bounded in size."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from step35.chat.sampled_turns import KnownTurn
from step35.chat.session_file import DamagedSession, SavedSession, read_cells, read_session, write_session
from step35.engine.session import Snapshot
from step35.sizes import format_size

SUFFIX = ".session"

log = logging.getLogger("step35.server")


class SessionDisk:
    """The session files of a folder. `saved` are those of this model; a background thread writes.

    `save` takes a snapshot only when the last one is on disk: at most one waits in memory.
    """

    def __init__(self, folder: Path, key: Mapping[str, str], max_bytes: int) -> None:
        self.folder, self.key, self.max_bytes = folder, dict(key), max_bytes
        self.saved: dict[str, SavedSession] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._find()
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._idle = threading.Event()
        self._idle.set()
        self._unwritten: tuple[str, Snapshot] | None = None
        self._writer = threading.Thread(target=self._write_all, name="step35-sessions", daemon=True)
        self._writer.start()

    def _find(self) -> None:
        for part in self.folder.glob(f"*{SUFFIX}.part"):
            part.unlink(missing_ok=True)  # a write that a kill cut short
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                saved = read_session(path)
            except (DamagedSession, OSError) as error:
                self._set_aside(path, error)
                continue
            if saved.key == self.key:
                self.saved[path.name.removesuffix(SUFFIX)] = saved

    def _set_aside(self, path: Path, error: Exception) -> None:
        log.warning("session file set aside as %s.damaged: %s", path.name, error)
        try:
            path.replace(path.with_name(f"{path.name}.damaged"))
        except OSError as failure:
            log.warning("and it can't be renamed: %s", failure)

    def load(self, name: str) -> Snapshot | None:
        """Reads a session's cells, or takes them from the write that is under way; None if the file is damaged."""
        unwritten = self._unwritten
        if unwritten is not None and unwritten[0] == name:
            return unwritten[1]
        saved = self.saved[name]
        try:
            snapshot = read_cells(saved)
            os.utime(saved.path)
            return snapshot
        except (DamagedSession, OSError) as error:
            self.drop(name, error)
            return None

    def drop(self, name: str, error: Exception) -> None:
        """Sets a file aside that can't be used."""
        self._set_aside(self.saved.pop(name).path, error)

    @property
    def can_save(self) -> bool:
        """Whether the last snapshot is on disk."""
        return self._idle.is_set()

    def save(self, name: str, snapshot: Snapshot, turns: Sequence[KnownTurn], last_start: int) -> None:
        """Writes a session in the background."""
        path = self.folder / f"{name}{SUFFIX}"
        kept = tuple(sorted(snapshot.checkpoints))
        self.saved[name] = SavedSession(
            path, self.key, snapshot.tokens, snapshot.n_past, kept, last_start, tuple(turns)
        )
        self._idle.clear()
        self._unwritten = (name, snapshot)
        self._jobs.put(lambda: self._write(name, path, snapshot, turns, last_start))

    def _write(self, name: str, path: Path, snapshot: Snapshot, turns: Sequence[KnownTurn], last_start: int) -> None:
        try:
            write_session(path, self.key, snapshot, turns, last_start)
            if name in self.saved:
                self.saved[name] = replace(self.saved[name], n_bytes=path.stat().st_size)
            self._keep_to_size(path)
        except OSError as error:
            log.warning("session not saved: %s: %s", path, error)
            self.saved.pop(name, None)

    def _keep_to_size(self, newest: Path) -> None:
        """Deletes the files that were used longest ago; the newest stays."""
        files = sorted(
            ((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob(f"*{SUFFIX}*")),
            reverse=True,
        )
        n_bytes = 0
        for _, size, path in files:
            n_bytes += size
            if n_bytes > self.max_bytes and path != newest:
                log.info("session file deleted: %s, over %s in all", path.name, format_size(self.max_bytes))
                self.saved.pop(path.name.removesuffix(SUFFIX), None)
                path.unlink(missing_ok=True)

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            if self._jobs.empty():
                self._unwritten = None
                self._idle.set()

    def wait(self) -> None:
        """Waits until the last snapshot is on disk."""
        self._idle.wait()

    def close(self) -> None:
        """Waits for the last write."""
        self._jobs.put(None)
        self._writer.join()
