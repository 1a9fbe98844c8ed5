"""Runs `convert-step35` inside the test's own process: what it prints and its exit code, without a start-up each time.

Also what a command in a process of its own needs to be interrupted.
"""

import json
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from typing import Any
from unittest.mock import patch

from convert_step35.cli import main


@dataclass(frozen=True, slots=True)
class Done:
    """A finished command."""

    exit_code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


def convert_step35(*arguments: object) -> Done:
    """Run one command line."""
    out = TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True)
    err = TextIOWrapper(BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    exit_code = 0
    with (
        patch.object(sys, "argv", ["convert-step35", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exc:
            exit_code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return Done(exit_code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def accept_interrupts() -> None:
    """For a child before it runs: a test run started in the background ignores SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
