"""--debug stands before a command or after it, and its error then comes with a traceback."""

import subprocess
import sys

import pytest

MISSING = ["generate", "/no/such/file.gguf", "-p", "x"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "step35.cli", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "line", [["--debug", *MISSING], [*MISSING, "--debug"], ["backend", "use", "nope", "--debug"]], ids=" ".join
)
def test_it_is_taken_anywhere_in_the_line(line: list[str]) -> None:
    done = run(*line)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_without_it_an_error_is_one_line() -> None:
    done = run(*MISSING)
    assert (done.returncode, done.stderr) == (
        1,
        "step35: error: no model file: /no/such/file.gguf doesn't exist or isn't a file\n",
    )


def test_a_text_that_is_spelt_like_it_is_a_text() -> None:
    done = run("generate", "/no/such/file.gguf", "-p", "--debug")
    assert "Traceback" not in done.stderr


def test_the_help_of_the_program_alone_shows_it() -> None:
    assert "--debug" in run("--help").stdout and "--debug" not in run("generate", "--help").stdout
