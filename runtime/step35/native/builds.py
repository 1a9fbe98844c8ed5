"""The builds of this user: a folder each, listed, chosen and removed. Knows nothing of how they are made.

A build's folder gets its name only when everything is in it, so what bears a name is whole.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from step35.errors import BackendError

MANIFEST = "backend.json"
SERVER = "rpc-server"
STOCK = "stock"
"""The name of llama-cpp-python's own libraries."""
PARTIAL = ".partial-"
"""What a folder's name begins with that is being made or removed."""


@dataclass(frozen=True, slots=True)
class Build:
    """What a build says of itself."""

    name: str
    version: str
    """Of the llama-cpp-python that it was made for."""
    commit: str
    target: str
    architectures: str
    patches: list[str]
    definitions: dict[str, str]
    built: str
    """The day, ISO."""

    @property
    def folder(self) -> Path:
        return home() / self.name

    @property
    def about(self) -> str:
        """Target, architectures and patches in a few words."""
        archs = f" {self.architectures}" if self.architectures else ""
        return f"{self.target}{archs}, {len(self.patches) or 'no'} patches, llama.cpp {self.commit}, built {self.built}"


def home() -> Path:
    """Returns the folder of this user's builds."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "step35" / "backends"


def builds() -> list[Build]:
    """Returns this user's builds by name."""
    if not home().is_dir():
        return []
    folders = sorted(path for path in home().iterdir() if path.is_dir() and not path.name.startswith("."))
    return [read(path) for path in folders]


def read(folder: Path) -> Build:
    """Returns what a build's folder says; raises BackendError if it doesn't."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Build(**data)
    except (OSError, ValueError, TypeError) as error:
        raise BackendError(
            f"not a build of step35's: {folder}: {error}; step35 backend remove {folder.name}, and build it again"
        ) from error


def write(build: Build, folder: Path) -> None:
    """Writes the manifest, the last file of a build."""
    (folder / MANIFEST).write_text(json.dumps(asdict(build), indent=1) + "\n", encoding="utf-8")


# the chosen one


def chosen_name() -> str:
    """Returns the name of the chosen build, or STOCK."""
    try:
        return _choice().read_text(encoding="utf-8").strip() or STOCK
    except FileNotFoundError:
        return STOCK


def chosen() -> Build | None:
    """Returns the chosen build, None for the stock one; raises BackendError if it is gone or damaged."""
    name = chosen_name()
    if name == STOCK:
        return None
    if not (home() / name).is_dir():
        raise BackendError(
            f"the chosen backend is gone: expected {home() / name}; "
            "step35 backend build makes one, step35 backend use stock does without"
        )
    return read(home() / name)


def server_program() -> Path:
    """Returns the chosen build's rpc-server; raises BackendError if there is none."""
    build = chosen()
    if build is None:
        raise BackendError("no rpc-server: the stock llama-cpp-python has none; step35 backend build makes one")
    return build.folder / SERVER


def use(name: str) -> None:
    """Chooses a build, or STOCK, for all that starts from now on."""
    if name != STOCK:
        read(_existing(name))
    home().mkdir(parents=True, exist_ok=True)
    new = _choice().with_suffix(".new")
    new.write_text(f"{name}\n", encoding="utf-8")
    new.replace(_choice())


def remove(name: str) -> None:
    """Deletes a build; the stock one is chosen if this one was."""
    folder = _existing(name)
    if chosen_name() == name:
        use(STOCK)
    doomed = home() / f"{PARTIAL}{name}"  # a removal that is cut short must leave nothing that looks whole
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _existing(name: str) -> Path:
    folder = home() / name
    if not name or name.startswith(".") or "/" in name or not folder.is_dir():
        known = ", ".join([STOCK, *(build.name for build in builds())])
        raise BackendError(f"no such backend: expected one of {known}, got {name!r}")
    return folder


def _choice() -> Path:
    return home() / "chosen"
