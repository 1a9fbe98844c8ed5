"""Reads a range of a file whole, or says which file ended early."""

import os
from pathlib import Path

import numpy as np

from convert_step35.errors import CheckpointError, ConvertError, GgufError


def read_into(
    descriptor: int, data: np.ndarray, offset: int, path: Path, *, error: type[ConvertError] = CheckpointError
) -> None:
    """Fill uint8 `data` from a file at `offset`; an `error` that names `path` where the file ends early."""
    view, done = data.data, 0
    while done < len(view):
        n = os.preadv(descriptor, [view[done:]], offset + done)
        if n == 0:
            raise truncated(path, offset + len(view), offset + done, error=error)
        done += n


def read_piece(descriptor: int, offset: int, n_bytes: int, path: Path) -> np.ndarray:
    """uint8 [n_bytes] of a GGUF at `offset`, which then leave the page cache; GgufError where the file is short."""
    data = np.empty(n_bytes, np.uint8)
    read_into(descriptor, data, offset, path, error=GgufError)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)
    return data


def truncated(path: Path, want: int, got: int, *, error: type[ConvertError] = CheckpointError) -> ConvertError:
    """The error for a file that has only `got` bytes of the `want` that a read needs."""
    return error(f"truncated file: {path} expected {want} bytes or more, got {got}; did it change?")
