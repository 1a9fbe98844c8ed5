"""Opens the files that others wrote: regular files only, never a pipe, a device or a folder."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from convert_step35.errors import CheckpointError, ConvertError

_LFS_POINTER = b"version https://git-lfs"


def open_regular(path: Path, *, error: type[ConvertError] = CheckpointError) -> tuple[BinaryIO, int]:
    """Open `path` for reading and return its size in bytes too; anything but a regular file is an `error`."""
    try:
        # A pipe without a writer would block an ordinary open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:
        raise error(f"cannot open {path}: {getattr(exc, 'strerror', None) or exc}") from exc
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise error(f"cannot read {path}: expected a regular file, got a folder, pipe or device")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_exactly(file: BinaryIO, n_bytes: int, path: Path, *, error: type[ConvertError] = CheckpointError) -> bytes:
    """Read the next `n_bytes`, which the caller has checked against the file's size."""
    try:
        data = file.read(n_bytes)
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) != n_bytes:
        raise error(f"file shrank while it was read: {path} expected {n_bytes} more bytes, got {len(data)}")
    return data


def is_lfs_pointer(first_bytes: bytes) -> bool:
    """Whether a file, judged by its first bytes, is a Git LFS pointer to the real file."""
    return len(first_bytes) >= 4 and _LFS_POINTER.startswith(first_bytes[: len(_LFS_POINTER)])
