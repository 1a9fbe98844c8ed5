"""The patches on llama.cpp go in whole or not at all, twice is a no-op, and an export gives the same bytes."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.backend import series
from step35.backend.series import Patch, apply, commit_all, export, parse, read_series, write_series
from step35.backend.upstream import patches_folder, read_upstream
from step35.errors import BackendError

FIELDS = "".join(f"{field}: words,\n  and more\n" for field in series.FIELDS)
LINES = [f"line {i}\n" for i in range(40)]


def make_tree(folder: Path) -> Path:
    """A tree of sources with two files, one of them with CRLF."""
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "one.cpp").write_bytes("".join(LINES).encode())
    (folder / "two words.txt").write_bytes(b"beside\n")
    (folder / "crlf.h").write_bytes(b"a\r\nb\r\nc\r\n")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Three patches, exported from commits: the second changes what the first brought, the third a CRLF file."""
    work = make_tree(tmp_path / "work")
    commit_all([], work)
    for title, path, old, new in (
        ("graph: A hook!", "src/one.cpp", "line 20\n", "line 20\nhook();\n"),
        ("graph: the hook has arguments", "src/one.cpp", "hook();\n", "hook(1, \u00e9);\n"),
        ("h: b is B", "crlf.h", "b\r\n", "B\r\n"),
    ):
        file = work / path
        file.write_bytes(file.read_bytes().decode().replace(old, new).encode())
        series._commit(work, f"{title}\n\n{FIELDS}")
    folder = tmp_path / "patches"
    folder.mkdir()
    write_series(export(work), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_series_goes_in_in_order(tree: Path, patches: Path) -> None:
    names = ["0001-graph-a-hook.patch", "0002-graph-the-hook-has-arguments.patch", "0003-h-b-is-b.patch"]
    assert apply(read_series(patches), tree) == names
    assert "line 20\nhook(1, \u00e9);\nline 21\n" in (tree / "src" / "one.cpp").read_text(encoding="utf-8")
    assert (tree / "crlf.h").read_bytes() == b"a\r\nB\r\nc\r\n"


def test_applying_twice_is_a_no_op(tree: Path, patches: Path) -> None:
    """What is the same keeps its time, too: nothing is built again."""
    apply(read_series(patches), tree)
    before, times = contents(tree), [p.stat().st_mtime_ns for p in sorted(tree.rglob("*"))]
    assert apply(read_series(patches), tree) == []
    assert contents(tree) == before
    assert [p.stat().st_mtime_ns for p in sorted(tree.rglob("*"))] == times


def test_a_tree_with_a_part_of_the_series_gets_the_rest(tree: Path, patches: Path) -> None:
    apply(read_series(patches)[:1], tree)
    assert [name[:4] for name in apply(read_series(patches), tree)] == ["0002", "0003"]
    assert apply(read_series(patches), tree) == []


def test_a_drifted_tree_fails_with_patch_cause_and_remedy_and_stays_as_it_was(tree: Path, patches: Path) -> None:
    drifted = (tree / "src" / "one.cpp").read_text().replace("line 20", "line twenty")
    (tree / "src" / "one.cpp").write_text(drifted)
    before = contents(tree)
    with pytest.raises(BackendError) as caught:
        apply(read_series(patches), tree)
    message = str(caught.value)
    assert message.startswith("patch 0001-graph-a-hook.patch doesn't apply to ")
    assert "patch failed: src/one.cpp" in message
    assert "unpack the pinned ones anew" in message
    assert "\n" not in message
    assert contents(tree) == before


def test_a_missing_file_is_drift(tree: Path, patches: Path) -> None:
    (tree / "crlf.h").unlink()
    with pytest.raises(BackendError, match="0003-h-b-is-b.patch .* crlf.h: No such file or directory"):
        apply(read_series(patches), tree)
    assert "hook" not in (tree / "src" / "one.cpp").read_text()


def test_a_tree_inside_a_repository_is_patched_all_the_same(tree: Path, patches: Path) -> None:
    """git apply looks for a repository around it, and leaves out what is not under its own folder."""
    subprocess.run(["git", "init", "--quiet", str(tree.parent)], check=True)
    assert len(apply(read_series(patches), tree)) == 3
    assert "hook" in (tree / "src" / "one.cpp").read_text(encoding="utf-8")


def test_the_export_is_byte_identical(tree: Path, patches: Path, tmp_path: Path) -> None:
    commit_all(read_series(patches), tree)
    again = tmp_path / "again"
    again.mkdir()
    (again / "0001-gone.patch").write_text("a patch that is no longer there")
    write_series(export(tree), again)
    assert contents(again) == contents(patches)


def test_the_export_does_not_hear_the_users_git_settings(tree: Path, patches: Path, monkeypatch, tmp_path) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[diff]\n\tnoprefix = true\n\tcontext = 9\n\talgorithm = patience\n[color]\n\tui = always\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    commit_all(read_series(patches), tree)
    assert export(tree) == read_series(patches)


def test_the_real_series_is_whole_and_exports_to_its_own_bytes(tmp_path: Path) -> None:
    """Needs no sources: each patch is parsed, and its file's name comes from its title."""
    real = read_series(patches_folder())
    for number, patch in enumerate(real, 1):
        assert patch.name == series.file_name(number, patch.title)
    write_series(real, tmp_path)
    wanted = {name: data for name, data in contents(patches_folder()).items() if name.endswith((".patch", "series"))}
    assert contents(tmp_path) == wanted


def test_uncommitted_work_is_not_forgotten(tree: Path, patches: Path) -> None:
    commit_all(read_series(patches), tree)
    (tree / "crlf.h").write_text("changed")
    with pytest.raises(BackendError, match="uncommitted changes in .*commit them"):
        export(tree)


def test_a_tree_of_another_make_is_not_exported(tree: Path) -> None:
    with pytest.raises(BackendError, match=r"expected a tree of step35 backend sources, got no \.git"):
        export(tree)


@pytest.mark.parametrize("field", series.FIELDS)
def test_a_patch_without_a_field_is_refused(field: str) -> None:
    header = "title\n\n" + FIELDS.replace(f"{field}: words", "words")
    with pytest.raises(BackendError, match=f"bad patch: x.patch .* got none of {field}$"):
        parse("x.patch", header + "\ndiff --git a/x b/x\n")


def test_a_patch_that_is_not_listed_is_refused(patches: Path) -> None:
    shutil.copy(patches / "0003-h-b-is-b.patch", patches / "0004-stray.patch")
    with pytest.raises(BackendError, match="expected every patch of the folder once.*0004-stray"):
        read_series(patches)


@pytest.mark.slow
@settings(max_examples=6)
@given(st.data())
def test_any_edits_go_there_and_back(tmp_path_factory, data) -> None:
    """Commits to patches, patches to a fresh tree and to commits again: the same files and the same bytes."""
    folder = tmp_path_factory.mktemp("law")
    work = make_tree(folder / "work")
    commit_all([], work)
    for number in range(data.draw(st.integers(1, 3))):
        lines = (work / "src" / "one.cpp").read_text().splitlines(keepends=True)
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.lists(st.sampled_from(["x\n", "\n", "y y\n"]), min_size=1, max_size=3)
        )
        (work / "src" / "one.cpp").write_text("".join([*lines, f"// {number}\n"]))
        series._commit(work, f"change {number}\n\n{FIELDS}")
    exported = export(work)
    fresh, again = make_tree(folder / "fresh"), make_tree(folder / "again")
    apply(exported, fresh)
    commit_all(exported, again)
    assert (fresh / "src" / "one.cpp").read_bytes() == (work / "src" / "one.cpp").read_bytes()
    assert export(again) == exported
    assert apply(exported, fresh) == []


def test_the_pin_is_the_one_that_is_installed() -> None:
    from step35.native.library import PINNED_VERSION

    pin = read_upstream(patches_folder())
    pyproject = (patches_folder().parent / "pyproject.toml").read_text()
    assert pin.version == PINNED_VERSION
    assert f'"llama-cpp-python=={pin.version}"' in pyproject


def test_patch_knows_its_files() -> None:
    patch = Patch("x", "", "diff --git a/src/a.cpp b/src/a.cpp\n--- a/src/a.cpp\ndiff --git a/b.h b/b.h\n")
    assert patch.paths == ["src/a.cpp", "b.h"]


def test_the_steps_of_an_upgrade_bring_the_patches_over(tree: Path, patches: Path) -> None:
    """As patches/README.md says, where the new sources have moved lines about."""
    old, new = tree, make_tree(tree.parent / "new")
    (new / "src" / "one.cpp").write_text("".join(["new first line\n", *LINES, "new last line\n"]))
    commit_all(read_series(patches), old)
    commit_all([], new)
    git = ["git", "-C", str(new), "-c", "user.name=me", "-c", "user.email=me@here"]
    subprocess.run([*git, "fetch", "--quiet", str(old), "HEAD"], check=True)
    subprocess.run([*git, "cherry-pick", "FETCH_HEAD~3..FETCH_HEAD"], check=True, capture_output=True)
    moved = export(new)
    assert [patch.header for patch in moved] == [patch.header for patch in read_series(patches)]
    assert "@@ -19,6 +19,7 @@" in read_series(patches)[0].diff and "@@ -20,6 +20,7 @@" in moved[0].diff
