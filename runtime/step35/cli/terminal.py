"""`step35 chat`: a conversation in the terminal, on one session."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import click

from step35.chat.dialogue import Dialogue
from step35.cli.error_line import error_line
from step35.engine.engine import Engine
from step35.errors import Cancelled, Step35Error
from step35.planning.memory_pressure import Level
from step35.sampling.sampler import Sampling

HELP = "/save FILE, /load FILE, /reset, /quit; Ctrl-C stops an answer"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run(engine: Engine, sampling: Sampling) -> None:
    """Reads messages and answers them until end of input."""
    _enable_history()
    with engine.open_session() as session:
        dialogue = Dialogue(engine, session, sampling)
        click.echo(HELP, err=True)
        for line in _lines():
            try:
                if not _command(dialogue, line):
                    _answer(dialogue, line)
            except (Step35Error, OSError) as error:
                if engine.pressure is Level.STOP:
                    raise
                click.echo(f"step35: error: {error_line(error)}", err=True)


def _enable_history() -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() a history)


def _lines() -> Iterator[str]:
    """Yields what the user types; Ctrl-C clears the line, /quit and end of input end it."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def _command(dialogue: Dialogue, line: str) -> bool:
    """Runs a line that is a command; returns whether it was one."""
    name, _, argument = line.partition(" ")
    if not name.startswith("/"):
        return False
    if name == "/reset":
        dialogue.reset()
    elif name == "/save" and argument:
        dialogue.save(Path(argument.strip()))
    elif name == "/load" and argument:
        dialogue.load(Path(argument.strip()))
    else:
        click.echo(HELP, err=True)
    return True


def _answer(dialogue: Dialogue, line: str) -> None:
    """Shows the answer to a message; Ctrl-C ends it, and what was said is kept."""
    reply = dialogue.ask(line)
    with stopping(dialogue.engine), closing(_Printer(sys.stdout.isatty(), reply.in_reasoning)) as printer:
        try:
            for text in reply:
                printer.show(text, reply.in_reasoning)
        except Cancelled:
            click.echo(" [stopped]", nl=False, err=True)
    dialogue.keep(reply)


@contextmanager
def stopping(engine: Engine) -> Iterator[None]:
    """While it lasts, Ctrl-C cancels the engine's step and nothing else."""
    before = signal.signal(signal.SIGINT, lambda *_: engine.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        engine.clear_cancel()


class _Printer:
    """Shows an answer as it comes, its reasoning dimmed on a terminal."""

    def __init__(self, has_colours: bool, in_reasoning: bool) -> None:
        self._dim, self._plain = (DIM, PLAIN) if has_colours else ("", "")
        self._is_dim = False
        self._set_dim(in_reasoning)

    def show(self, text: str, in_reasoning: bool) -> None:
        """Shows a text; `in_reasoning` is whether it ends there: the tag that ends the reasoning is dim, too."""
        click.echo(text, nl=False)
        self._set_dim(in_reasoning)

    def _set_dim(self, is_dim: bool) -> None:
        if is_dim != self._is_dim:
            self._is_dim = is_dim
            click.echo(self._dim if is_dim else self._plain, nl=False)

    def close(self) -> None:
        click.echo(self._plain)
