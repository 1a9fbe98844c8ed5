"""`step35 chat`: a conversation in the terminal, on one session."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from step35.engine.decode_loop import Turn, begin, generate
from step35.engine.detokenize import stream_text
from step35.engine.engine import Engine
from step35.engine.session import Session, Snapshot
from step35.errors import Cancelled, ModelError, Step35Error
from step35.markup import THINK_END
from step35.native.model import chat_renderer
from step35.planning.memory_pressure import Level
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser

HELP = "/save FILE, /load FILE, /reset, /quit; Ctrl-C stops an answer"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the session that holds them."""

    session: Session
    sampling: Sampling
    messages: list[dict] = field(default_factory=list)

    def ask(self, text: str) -> Turn:
        """Adds a user message and returns the turn that will answer it."""
        self.messages.append({"role": "user", "content": text})
        engine = self.session.engine
        prompt = engine.tokenize(chat_renderer(engine.model)(self.messages), add_bos=False)
        return begin(self.session, prompt, Chooser(self.sampling), -1)

    def keep_answer(self, text: str) -> None:
        """Adds the assistant's message; the reasoning before its end goes into a field of its own."""
        reasoning, end, content = text.rpartition(THINK_END)
        message = {"role": "assistant", "content": content.strip()}
        self.messages.append(message | ({"reasoning_content": reasoning.strip()} if end else {}))

    def reset(self) -> None:
        self.messages = []
        self.session.rewind(0)

    def save(self, path: Path) -> None:
        """Writes messages, tokens and cells: one line of JSON, then llama.cpp's bytes."""
        snapshot = self.session.snapshot()
        head = {
            "vocab": self.session.engine.model.vocab_digest,
            "n_embd": self.session.engine.model.n_embd,
            "n_kv": snapshot.n_past,
            "tokens": snapshot.tokens,
            "messages": self.messages,
        }
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_bytes(json.dumps(head).encode() + b"\n" + snapshot.state)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Goes back to a saved conversation of the same model."""
        line, _, state = path.read_bytes().partition(b"\n")
        try:
            head = json.loads(line)
            snapshot = Snapshot(tuple(head["tokens"]), head["n_kv"], state)
            messages, model = list(head["messages"]), (head["vocab"], head["n_embd"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"not a saved conversation: {path}: {type(error).__name__}: {error}") from error
        wanted = (self.session.engine.model.vocab_digest, self.session.engine.model.n_embd)
        if model != wanted:
            raise ModelError(f"saved with another model: {path} expected {wanted}, got {model}")
        self.session.restore(snapshot)
        self.messages = messages


def run(engine: Engine, sampling: Sampling) -> None:
    """Reads messages and answers them until end of input."""
    _enable_history()
    with engine.open_session() as session:
        talk = Conversation(session, sampling)
        click.echo(HELP, err=True)
        for line in _lines():
            try:
                if not _command(talk, line):
                    _answer(talk, line)
            except (Step35Error, OSError) as error:
                if engine.pressure is Level.STOP:
                    raise
                click.echo(f"step35: error: {error}", err=True)


def _enable_history() -> None:
    try:
        import readline  # noqa: F401  (its import gives input() a history)
    except ImportError:
        pass


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


def _command(talk: Conversation, line: str) -> bool:
    """Runs a line that is a command; returns whether it was one."""
    name, _, argument = line.partition(" ")
    if not name.startswith("/"):
        return False
    if name == "/reset":
        talk.reset()
    elif name == "/save" and argument:
        talk.save(Path(argument.strip()))
    elif name == "/load" and argument:
        talk.load(Path(argument.strip()))
    else:
        click.echo(HELP, err=True)
    return True


def _answer(talk: Conversation, line: str) -> None:
    turn = talk.ask(line)
    printer, text = _Printer(sys.stdout.isatty()), ""
    with stopping(talk.session.engine):
        try:
            for piece in stream_text(generate(turn), talk.session.engine.model.piece):
                text += piece
                printer.show(piece)
        except Cancelled:
            click.echo(" [stopped]", nl=False, err=True)
    printer.end()
    talk.keep_answer(text)


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

    def __init__(self, has_colours: bool) -> None:
        self._dim, self._plain = (DIM, PLAIN) if has_colours else ("", "")
        self._thinking = True
        self._seen = ""
        click.echo(self._dim, nl=False)

    def show(self, piece: str) -> None:
        click.echo(piece, nl=False)
        if self._thinking:
            self._seen += piece
            if THINK_END in self._seen:
                self._thinking = False
                click.echo(self._plain, nl=False)

    def end(self) -> None:
        click.echo(self._plain)
