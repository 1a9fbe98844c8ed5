"""Where sources are kept: the sdist in the user's cache, and trees unpacked from it."""

import os
from pathlib import Path

from step35.backend.upstream import Upstream, check, fetch, unpack


def cache_folder() -> Path:
    """Returns the folder for what can be made again: the sdist, and builds under way."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "step35" / "backend"


def pristine(pin: Upstream, folder: Path, sdist: Path | None) -> None:
    """Unpacks the pinned llama.cpp to a new folder; pip fetches the sdist unless one is given."""
    if sdist is not None:
        check(pin, sdist)
    unpack(pin, sdist or fetch(pin, cache_folder()), folder)
