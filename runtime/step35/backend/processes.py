"""Runs a compiler's long work: its output in a file, its progress told, and stopped in order when we are."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from step35.errors import BackendError

GRACE_S = 20
_PROGRESS = re.compile(r"^\[\s*(?:\d+%|\d+/\d+)\]")
_ERROR = re.compile(r"\berror\b|\bError\b|undefined reference|not found|No space left")


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
    """Returns the first line of a log that tells of an error, else the last one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = next(((i, line) for i, line in enumerate(lines) if _ERROR.search(line)), None)
    if found is None:
        return lines[-1] if lines else "no output"
    i, line = found
    return f"{line} {lines[i + 1]}" if line.endswith(":") and i + 1 < len(lines) else line  # cmake's two lines


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
