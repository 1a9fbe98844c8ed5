"""The documents say what is there: links, paths, commands and options, the map of modules, counts, the version."""

import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import convert_step35
import module_map
import step35
from checkpoints import BUNDLED, REAL, tensor_shapes
from convert_step35.cli import cli as convert_cli
from step35.cli import cli as run_cli

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT / "docs" / "log.md"
"""Its entries are in the words, and with the module names, of their day."""
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "patches" / "README.md"])
CURRENT = [path for path in DOCUMENTS if path != ARCHIVE]
COMMANDS: dict[str, click.Group] = {"convert-step35": convert_cli, "step35": run_cli}
OTHERS_FILES = {"docs/step3.5-flash.md"}
"""Named in a document, and not in this repository: StepFun's."""

documents = pytest.mark.parametrize("document", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# links and paths


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text_of(document))
    assert [link for link in links if not (document.parent / link).exists()] == []


@documents
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"(?<![\w./-])((?:tests|bench|patches|docs|runtime|converter)/[\w./-]*\w)", text_of(document))
    assert [name for name in named if not (ROOT / name).exists() and name not in OTHERS_FILES] == []


@documents
def test_targets_of_make_exist(document: Path) -> None:
    wanted = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text_of(document), re.MULTILINE))
    assert wanted - set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)) == set()


# commands


def command_lines(text: str) -> Iterator[str]:
    """The lines of shell blocks, and code in the text, that call one of the two commands."""
    shell = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [line for block in shell.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", shell.sub("", text).replace("\n", " "))
    for line in lines:
        for part in re.split(r"\s+(?:&&|\||>|&)\s*", re.sub(r"\s#\s.*", "", line)):
            if part.split(maxsplit=1)[:1] and part.split()[0] in COMMANDS:
                yield part


def unknown_words(line: str) -> list[str]:
    """The command, if there is none of that name, and the options that it doesn't know, or no longer shows."""
    program, *words = shlex.split(line.replace("...", ""))
    command: click.Command = COMMANDS[program]
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            return [name]
        command = command.commands[name]
        if (program, name) == ("step35", "mtp"):
            command = convert_cli.commands["mtp"]
    shown = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    known = {"-h", "--help"}.union(*([*param.opts, *param.secondary_opts] for param in shown))
    return [word for word in words if re.match(r"--?[a-zA-Z]", word) and word.partition("=")[0] not in known]


@documents
def test_commands_are_spelt_as_their_help_has_them(document: Path) -> None:
    found = {line: unknown for line in command_lines(text_of(document)) if (unknown := unknown_words(line))}
    assert found == {}


def all_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for word, part in command.commands.items():
            yield from all_commands(part, f"{name} {word}")


@pytest.mark.parametrize("program", COMMANDS)
def test_examples_in_help_texts_are_spelt_as_help_has_them(program: str) -> None:
    lines = [
        line.strip()
        for _, command in all_commands(COMMANDS[program], program)
        for line in f"{command.help}\n{command.epilog}".splitlines()
        if line.strip().startswith(tuple(f"{name} " for name in COMMANDS)) and line.startswith("  ")
    ]
    assert {line: unknown for line in lines if (unknown := unknown_words(line))} == {}


def test_the_readme_shows_commands() -> None:
    """What looks for wrong commands does find commands."""
    lines = list(command_lines(text_of(ROOT / "README.md")))
    assert len(lines) > 20 and {line.split()[0] for line in lines} == COMMANDS.keys()
    assert unknown_words("step35 generate m.gguf --nonesuch 3 -n 2 --json") == ["--nonesuch"]
    assert unknown_words("step35 nonesuch") == ["nonesuch"]
    assert unknown_words("step35 mtp trim in.gguf out.gguf --vocab 8 --sides 2") == ["--sides"]


# the map of modules


def test_the_module_map_is_that_of_the_folders() -> None:
    """After a new module, or a new first line: python tests/support/module_map.py."""
    written = text_of(module_map.DESIGN).partition(module_map.MARK)[2]
    assert written == f"{module_map.module_map()}\n"


@pytest.mark.parametrize("package", module_map.PACKAGES, ids=lambda path: path.name)
def test_the_module_map_names_every_folder_and_module_once(package: Path) -> None:
    section = module_map.module_map().partition(f"### {package.relative_to(ROOT).as_posix()}\n")[2].partition("\n#")[0]
    files = [path for path in package.rglob("*") if path.suffix in module_map.SOURCES]
    folders = {folder for path in files for folder in path.relative_to(package).parents if folder != Path()}
    names = [path.relative_to(package).as_posix() for path in files if not path.name.startswith("__")]
    named = re.findall(r"^ *- `([^`]+)`: \S", section, re.MULTILINE)
    assert sorted(named) == sorted([*names, *(f"{folder.as_posix()}/" for folder in folders)])


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/design.md"])
def test_the_chain_of_folders_is_the_one_that_imports_follow(document: str) -> None:
    for package, folders in module_map.floors().items():
        chain = " < ".join(", ".join(floor) for floor in folders).replace("llama", "llama.py")
        assert f"{package}: (top){chain}" in " ".join(text_of(ROOT / document).split())


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/design.md"])
def test_modules_that_are_named_by_folder_exist(document: str) -> None:
    named = re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)*/[a-z0-9_.]*)`", text_of(ROOT / document))
    roots = (ROOT, *module_map.PACKAGES, *(package.parent for package in module_map.PACKAGES))
    found = {name for name in named for root in roots if any((root / f"{name}{end}").exists() for end in ("", ".py"))}
    assert len(found) > 10 and set(named) - found == set()


# numbers


def weights_of_bundled() -> int:
    """Counts the weights in the bundled checkpoint's headers."""
    n_weights = 0
    for shard in BUNDLED.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        n_weights += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return n_weights


def test_the_numbers_of_weights_are_those_of_the_tensors() -> None:
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(REAL).items()}
    heads = sum(n for name, n in sizes.items() if re.match(r"model\.layers\.4[567]\.", name))
    total = sum(sizes.values())
    readme, tiny = text_of(ROOT / "README.md"), text_of(ROOT / "docs" / "tiny.md")
    for said in (
        f"{weights_of_bundled() / 1e6:.1f} million",
        f"{total / 1e9:.1f} billion weights",
        f"{(total - heads) / 1e9:.2f} billion",
        f"{heads / 3 / 1e9:.2f} billion",
    ):
        assert said in " ".join(readme.split()), said
    assert f"| {weights_of_bundled() / 1e6:.1f} M | {total / 1e9:.1f} B |" in tiny


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["version"]
    newest = re.findall(r"^## (\S+?),? ", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[0]
    assert {convert_step35.__version__, step35.__version__, newest} == {version}


def test_the_documents_name_every_patch_of_the_series() -> None:
    series = text_of(ROOT / "patches" / "series").split()
    assert all(f"| {name[:4]} |" in text_of(ROOT / "patches" / "README.md") for name in series)
    words = {1: "one patch", 2: "two patches", 3: "three patches", 4: "four patches"}
    assert words[len(series)] in text_of(ROOT / "CHANGELOG.md") and words[len(series)] in text_of(ROOT / "README.md")
