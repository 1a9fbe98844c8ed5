"""The files being written: preallocated under a temporary name, synced, and published by rename."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from convert_step35.errors import DiskFullError, OutputError
from convert_step35.planning.plan import PlannedFile
from convert_step35.sizes import format_size

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


class Output:
    """All files of a plan, open for writing at final offsets."""

    def __init__(self, files: Sequence[PlannedFile]) -> None:
        self._files = files
        self._descriptors: list[int] = []
        self._of_tensor: list[int] = []

    def __enter__(self) -> "Output":
        """Open or create every file and reserve its whole size; a full disk is refused here."""
        try:
            self._check_space()
            for file in self._files:
                descriptor = os.open(self._working_path(file), os.O_RDWR | os.O_CREAT, 0o644)
                self._descriptors.append(descriptor)
                self._of_tensor += [descriptor] * len(file.tensors)
                reserve(descriptor, file.path, file.n_bytes)
                os.pwrite(descriptor, file.header, 0)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, index: int, data: np.ndarray, offset: int) -> None:
        """Write uint8 `data` of the plan's tensor `index` at an absolute offset."""
        view, done = data.data, 0
        while done < len(view):
            done += os.pwrite(self._of_tensor[index], view[done:], offset + done)

    def read(self, index: int, data: np.ndarray, offset: int) -> None:
        """Read back what was written; OutputError where the file is short."""
        view, done = data.data, 0
        while done < len(view):
            n = os.preadv(self._of_tensor[index], [view[done:]], offset + done)
            if n == 0:
                raise OutputError(
                    f"truncated output: expected {offset + len(view)} bytes, got {offset + done}; was the file changed?"
                )
            done += n

    def sync(self) -> None:
        """Bring all written data to the disk, and out of the page cache."""
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def publish(self) -> None:
        """Sync and rename; of several shards the first, which loads the rest, comes last."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        for file in reversed(self._files):
            if partial_path(file.path).exists():
                partial_path(file.path).replace(file.path)
        sync_folder(self._files[0].path.parent)

    def _working_path(self, file: PlannedFile) -> Path:
        """The partial file, or the published one where a run was killed between the renames and the journal's end."""
        partial = partial_path(file.path)
        return file.path if not partial.exists() and self._is_published(file) else partial

    def _is_published(self, file: PlannedFile) -> bool:
        if not file.path.is_file() or file.path.stat().st_size != file.n_bytes:
            return False
        with file.path.open("rb") as stream:
            return stream.read(len(file.header)) == file.header

    def _check_space(self) -> None:
        existing = sum(_allocated(self._working_path(file)) for file in self._files)
        require_space(self._files[0].path.parent, sum(file.n_bytes for file in self._files) - existing)

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def require_space(folder: Path, n_bytes: int) -> None:
    """DiskFullError where a folder's disk has less room than that."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DiskFullError(
            f"disk full: {folder} expected {format_size(n_bytes)} free ({n_bytes} bytes), "
            f"got {format_size(free)} ({free}); free the room, or write to another disk"
        )


def reserve(descriptor: int, path: Path, n_bytes: int) -> None:
    """Take the room for a whole file; `path` is what the error names."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, n_bytes)
        os.ftruncate(descriptor, n_bytes)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise DiskFullError(f"disk full: {path} expected room for {n_bytes} bytes: {exc.strerror}") from exc


def discard(files: Sequence[PlannedFile]) -> None:
    """Remove the partial files of a plan."""
    for file in files:
        partial_path(file.path).unlink(missing_ok=True)


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    temporary = partial_path(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
