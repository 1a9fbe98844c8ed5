"""Our patches on llama.cpp: read, applied to a tree of sources, and exported from one that was worked on.

A tree to work on is a git repository: first the pristine sources, then one commit a patch. The commit's message is
the patch's header, so a patch goes there and back without a changed byte.
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from step35.errors import BackendError

FIELDS = ("Was", "Does", "Reason", "Upstream", "Drop-when", "Test")
"""What a patch's header says, after its title."""
_DIFF = "diff --git "
_FORMAT = ("--no-color", "--no-renames", "--no-ext-diff", "--no-textconv", "--diff-algorithm=myers", "--unified=3")
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/", "--no-indent-heuristic", "--full-index")


@dataclass(frozen=True, slots=True)
class Patch:
    """One file of the series."""

    name: str
    header: str
    """Its text up to the diff: a title, and FIELDS."""
    diff: str

    @property
    def title(self) -> str:
        return self.header.partition("\n")[0]

    @property
    def paths(self) -> list[str]:
        """The files that it changes."""
        return re.findall(r"^diff --git a/(\S+) b/\S+$", self.diff, re.MULTILINE)

    @property
    def text(self) -> str:
        return self.header + self.diff


def read_series(patches: Path) -> list[Patch]:
    """Returns the patches in the order of `series`; raises BackendError if the folder and the list differ."""
    lines = (patches / "series").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    there = sorted(path.name for path in patches.glob("*.patch"))
    if sorted(names) != there:
        raise BackendError(f"patches/series expected every patch of the folder once, {there}, got {names}")
    return [parse(name, (patches / name).read_bytes().decode()) for name in names]


def parse(name: str, text: str) -> Patch:
    """Returns the patch that a file's text holds; raises BackendError if the header lacks a field."""
    start = text.find(_DIFF)
    header, diff = (text[:start], text[start:]) if start >= 0 else (text, "")
    missing = [field for field in FIELDS if not re.search(rf"^{field}: \S", header, re.MULTILINE)]
    if missing or not diff:
        raise BackendError(
            f"bad patch: {name} expected a title, the fields {', '.join(FIELDS)} and a diff, "
            f"got none of {', '.join(missing) or 'a diff'}"
        )
    return Patch(name, header, diff)


# applied to a tree


def apply(series: list[Patch], tree: Path) -> list[str]:
    """Applies what isn't applied yet and returns the names; changes nothing if one patch fails.

    A patch that reverses cleanly is already applied. Raises BackendError that names patch, cause and remedy.
    """
    with tempfile.TemporaryDirectory() as work:
        scratch = Path(work).resolve()
        paths = sorted({path for patch in series for path in patch.paths})
        _copy(paths, tree, scratch)
        present = {patch.name for patch in reversed(series) if not _git_apply(patch, scratch, "--reverse")}
        for patch in series:
            _apply_one(patch, scratch, tree)
        _copy(paths, scratch, tree)
    return [patch.name for patch in series if patch.name not in present]


def _apply_one(patch: Patch, scratch: Path, tree: Path) -> None:
    cause = _git_apply(patch, scratch)
    if cause:
        raise BackendError(
            f"patch {patch.name} doesn't apply to {tree}: {cause}; the sources drifted: unpack the pinned ones anew, "
            "or rebase the series (patches/README.md, Upgrade)"
        )


def _git_apply(patch: Patch, tree: Path, *options: str) -> str:
    """Returns the cause of a failure, empty if the patch went in whole; else nothing is changed."""
    done = _git(tree, "apply", "--whitespace=nowarn", *options, "-", text=patch.diff, check=False)
    if not done.returncode:
        return ""
    return "; ".join(line.removeprefix("error: ") for line in done.stderr.strip().splitlines()[:2])


def _copy(paths: list[str], source: Path, target: Path) -> None:
    """Makes `target` as `source` in these files; one that is the same keeps its time, so that it isn't built again."""
    for path in paths:
        old, new = target / path, source / path
        if not new.exists():
            old.unlink(missing_ok=True)
        elif not old.exists() or old.read_bytes() != new.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new, old)


# a tree to work on


def commit_all(series: list[Patch], tree: Path) -> None:
    """Makes pristine sources a git repository with one commit a patch."""
    _git(tree, "init", "--quiet")
    _commit(tree, "pristine")
    for patch in series:
        _apply_one(patch, tree, tree)
        _commit(tree, patch.header)


def _commit(tree: Path, message: str) -> None:
    _git(tree, "add", "--all", "--force")
    _git(tree, "commit", "--quiet", "--cleanup=verbatim", "--no-verify", "--file=-", text=message)


def export(tree: Path) -> list[Patch]:
    """Returns the patches that the commits of a tree hold, the oldest first."""
    if not (tree / ".git").exists():
        raise BackendError(f"nothing to export: {tree} expected a tree of step35 backend sources, got no .git in it")
    if _git(tree, "status", "--porcelain", "--untracked-files=no").stdout:
        raise BackendError(f"uncommitted changes in {tree}: commit them, one commit a patch (git status tells them)")
    commits = _git(tree, "rev-list", "--reverse", "--first-parent", "HEAD").stdout.split()[1:]
    return [_exported(tree, number, commit) for number, commit in enumerate(commits, 1)]


def _exported(tree: Path, number: int, commit: str) -> Patch:
    header = _git(tree, "show", "--no-patch", "--format=%B", commit).stdout.rstrip("\n") + "\n\n"
    diff = _git(tree, "diff-tree", "-p", *_FORMAT, *_PREFIXES, f"{commit}^", commit).stdout
    diff = re.sub(r"^index [0-9a-f]{40}\.\.[0-9a-f]{40}( \d+)?\n", "", diff, flags=re.MULTILINE)
    return parse(file_name(number, header.partition("\n")[0]), header + diff)


def file_name(number: int, title: str) -> str:
    """Returns the name that a patch has in the series."""
    return f"{number:04}-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.patch"


def write_series(series: list[Patch], patches: Path) -> None:
    """Writes patches and `series`, and removes those that are no longer in it."""
    for path in patches.glob("*.patch"):
        if path.name not in {patch.name for patch in series}:
            path.unlink()
    for patch in series:
        (patches / patch.name).write_bytes(patch.text.encode())
    (patches / "series").write_bytes("".join(f"{patch.name}\n" for patch in series).encode())


def _git(tree: Path, *arguments: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs git in a tree, deaf to the user's settings and to a repository around it."""
    settings = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent),
        "LC_ALL": "C",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    author = ["-c", "user.name=step35", "-c", "user.email=step35@localhost", "-c", "core.autocrlf=false"]
    command, environment = ["git", *author, *arguments], inherited | settings
    try:
        raw = subprocess.run(command, check=False, cwd=tree, env=environment, input=text.encode(), capture_output=True)
    except FileNotFoundError as error:
        raise BackendError("the patches need git, and it isn't in PATH; install git") from error
    # decoded here: text mode would turn a CRLF in a diff into LF
    done = subprocess.CompletedProcess(command, raw.returncode, raw.stdout.decode(), raw.stderr.decode())
    if check and done.returncode:
        raise BackendError(f"git {arguments[0]} failed in {tree}: {done.stderr.strip()}")
    return done
