"""The pinned llama.cpp: which sdist holds its sources, how it is fetched, checked and unpacked."""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from step35.errors import BackendError
from step35.yaml_file import read_yaml, text

PACKAGE = "llama-cpp-python"


@dataclass(frozen=True, slots=True)
class Upstream:
    """What patches/UPSTREAM pins."""

    version: str
    """Of llama-cpp-python."""
    sha256: str
    """Of its sdist."""
    commit: str
    """Of the llama.cpp in it."""

    @property
    def root(self) -> str:
        """llama.cpp's folder in the sdist."""
        return f"llama_cpp_python-{self.version}/vendor/llama.cpp/"


def patches_folder() -> Path:
    """Returns patches/ at the root of a checkout, or beside the package in an installed wheel."""
    here = Path(__file__).resolve()
    candidates = (here.parents[3] / "patches", here.parents[2] / "step35-patches")
    for path in candidates:
        if (path / "UPSTREAM").is_file():
            return path
    raise BackendError(f"the patches are missing: expected {candidates[0]} or {candidates[1]}; reinstall step35")


def read_upstream(patches: Path) -> Upstream:
    """Returns the pin; raises SettingsError that names the line of a mistake."""
    section = read_yaml(patches / "UPSTREAM")
    pin = Upstream(
        section.take(PACKAGE, _matching(r"\d+\.\d+\.\d+"), "a version"),
        section.take("sdist-sha256", _matching(r"[0-9a-f]{64}"), "64 hexadecimal digits"),
        section.take("llama.cpp", _matching(r"[0-9a-f]{7,40}"), "a commit"),
    )
    section.end()
    return pin


def _matching(pattern: str):
    def check(value: object) -> str:
        if not re.fullmatch(pattern, text(value)):
            raise ValueError
        return text(value)

    return check


def fetch(pin: Upstream, folder: Path) -> Path:
    """Returns the sdist, downloaded by pip into `folder` unless it is there already."""
    path = folder / f"llama_cpp_python-{pin.version}.tar.gz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _download(pin, Path(work))
            (Path(work) / path.name).replace(path)
    check(pin, path)
    return path


def _download(pin: Upstream, folder: Path) -> None:
    wanted = folder / "pin.txt"
    wanted.write_text(f"{PACKAGE}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", PACKAGE, "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(
            f"pip can't fetch the sources of {PACKAGE} {pin.version}: {reason}; carry the sdist here and name it "
            f"with --sdist FILE (elsewhere: pip download --no-deps --no-binary {PACKAGE} {PACKAGE}=={pin.version})"
        )


def check(pin: Upstream, sdist: Path) -> None:
    """Raises BackendError unless the file is the pinned sdist."""
    try:
        with open(sdist, "rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackendError(f"can't read the sdist: {sdist}: {error.strerror}") from error
    if got != pin.sha256:
        raise BackendError(
            f"another sdist: {sdist} expected {PACKAGE} {pin.version} with sha256 {pin.sha256}, got {got}; "
            "delete it, or name the right one with --sdist FILE"
        )


def unpack(pin: Upstream, sdist: Path, folder: Path) -> None:
    """Unpacks llama.cpp's sources to `folder`, which appears only when all are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        with tarfile.open(sdist) as archive:
            archive.extractall(work, (m for m in archive if _is_source(m.name, pin)), filter="data")
        (Path(work) / pin.root).rename(folder)


def _is_source(name: str, pin: Upstream) -> bool:
    """Whether an entry is llama.cpp's; its .git points to a repository that isn't in the sdist."""
    return name.startswith(pin.root) and name != f"{pin.root}.git"
