"""Runs a reader of untrusted files in a child process of bounded memory and time, one file after another.

A reader may return or raise its own one-line error; a crash, a hang, another exception or a request for more memory
than `MEMORY_BYTES` is what the tests look for.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

MEMORY_BYTES = 512 * 2**20
TIMEOUT_S = 300  # a reader takes a few seconds at most, but the machine may be busy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reader made of one file: its value, or the name and the text of what it raised."""

    value: Any = None
    error: str | None = None
    message: str = ""


class LimitedReader:
    """A child process that calls one reader, given as `module:function`, on the bytes it is sent."""

    def __init__(self, reader: str, path: Path) -> None:
        self._connection, theirs = Pipe()
        self.path = path
        self._child = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), reader, str(path)],
            pass_fds=[theirs.fileno()],
            # BLAS would reserve address space for threads that nothing here uses.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()

    def read(self, data: bytes) -> Outcome:
        """What the reader makes of a file of these bytes."""
        # A new file each time: some file systems write an emptied one to the disk at once, 100 times slower.
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(data)
        return self.read_again()

    def read_again(self) -> Outcome:
        """What the reader makes of the file as it is."""
        self._connection.send(None)
        if not self._connection.poll(TIMEOUT_S):
            self._child.kill()
            raise AssertionError(f"the reader took more than {TIMEOUT_S} s over {self.path}")
        try:
            return self._connection.recv()
        except EOFError as exc:
            raise AssertionError(f"the reader died over {self.path}: exit status {self._child.wait()}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._child.wait(TIMEOUT_S)


def assert_clean(outcome: Outcome, error: str) -> None:
    """The reader returned, or raised `error` with one line of plain text."""
    if outcome.error is not None:
        assert outcome.error == error, f"{outcome.error}: {outcome.message}"
        assert outcome.message.isascii() and outcome.message.isprintable() and len(outcome.message) < 1000


def flips(data: bytes, n_bytes: int) -> Iterator[bytes]:
    """`data` with each single bit of its first `n_bytes` flipped in turn."""
    for position in range(n_bytes):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            yield bytes(flipped)


def _serve(connection: Connection, read: Callable[[Path], Any], path: Path) -> None:
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        try:
            outcome = Outcome(read(path))
        except Exception as exc:  # noqa: BLE001 - whatever a reader raises is what the tests ask about
            outcome = Outcome(error=type(exc).__name__, message=str(exc))
        connection.send(outcome)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _main(descriptor: str, reader: str, path: str) -> None:
    # Under its own name, so that both processes pickle the same Outcome.
    served = import_module("limited_reader")
    module, function = reader.split(":")
    read = getattr(import_module(module), function)
    served._limit_memory()
    served._serve(Connection(int(descriptor)), read, Path(path))


if __name__ == "__main__":
    _main(*sys.argv[1:])
