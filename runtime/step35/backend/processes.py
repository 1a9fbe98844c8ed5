"""Runs a compiler's long work: its output in a file, its progress told, and stopped in order when we are."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path

from step35.errors import BackendError

GRACE_S = 20
MOST_LINES = 24
"""Of one error of cmake's."""
_PROGRESS = re.compile(r"^\[\s*(?:\d+%|\d+/\d+)\]")
_ERROR = re.compile(r"(?!-- ).*(\b[eE]rror\b|undefined reference|cannot find|No space left)")  # -- is cmake's talk


def run_logged(
    command: list[str], log: Path, environment: Mapping[str, str], lock: int, say: Callable[[str], None]
) -> None:
    """Runs a command, which inherits `lock`, to its end; raises BackendError with its first error if it fails."""
    with open(log, "w", buffering=1, encoding="utf-8") as file, _started(command, environment, lock) as child:
        try:
            for line in child.stdout or ():
                file.write(line)
                if _PROGRESS.match(line):
                    say(line.strip())
            code = child.wait()
        except BaseException:
            _stop(child)
            raise
    if code:
        raise BackendError(f"{Path(command[0]).name} failed: {first_error(log)}; all of its output: {log}")


def _started(command: list[str], environment: Mapping[str, str], lock: int) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=(lock,),
        )
    except OSError as error:
        raise BackendError(f"can't run {command[0]}: {error.strerror}") from error


def first_error(log: Path) -> str:
    """Returns the first error of a log, cmake's with its whole message; else the last line."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if _ERROR.match(line.strip())), None)
    if start is None:
        return lines[-1].strip() if lines else "no output"
    message = list(takewhile(_is_indented, lines[start + 1 : start + MOST_LINES]))
    is_cmakes = lines[start].startswith("CMake Error")
    return " ".join(line.strip() for line in [lines[start], *(message if is_cmakes else [])])


def _is_indented(line: str) -> bool:
    """Whether a line belongs to cmake's message above it."""
    return line.startswith(" ")


def _stop(child: subprocess.Popen[str]) -> None:
    """Ends a command and its compilers; make and ninja delete what they were at."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(GRACE_S)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
