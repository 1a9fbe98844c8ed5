"""The engine: a loaded model with its open contexts. Sessions live in it as sequences."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from step35.drafting.calibration import calibrate, choose_padding
from step35.drafting.drafter import Drafter
from step35.drafting.mtp_heads import Heads
from step35.engine.budget import Budget
from step35.engine.loading import ON_THIS_BOX, Loading
from step35.engine.session import Session, n_cells
from step35.errors import ContextFull, DoesNotFit, ModelError, SettingsError
from step35.native.interface import ContextInterface, GrammarInterface, ModelInterface
from step35.options import EngineOptions
from step35.planning.memory_pressure import Level, Reading
from step35.planning.model_header import Header, Headers
from step35.row_counts import head_rows, verify_rows
from step35.sizes import format_size

if TYPE_CHECKING:
    from step35.planning.admission import Guard, MemoryDemand


class Engine:
    """A loaded model. `headers` are read if nobody has read them yet; `loading` is where tests put a fake llama.cpp.

    `notes` tells in plain words what differs from what was asked for. `budget` is for all that is kept for later.
    `pressure` is how short the memory is; who must act on it adds a function to `on_pressure`, which the watchdog's
    thread calls with the new level.
    """

    def __init__(
        self,
        options: EngineOptions,
        headers: Headers | None = None,
        *,
        loading: Loading = ON_THIS_BOX,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.options = options
        self.clock = clock
        self.notes: list[str] = []
        self.demand: MemoryDemand | None = None
        """What everything takes, by device and purpose, as counted before loading; None where the memory is unknown."""
        self.budget = Budget()
        self.pressure, self._reading = Level.CALM, Reading(0)
        self.on_pressure: list[Callable[[Level], None]] = []
        self._closers: list[Callable[[], None]] = []
        try:
            self.headers = headers or loading.read(options)
            guard = loading.admit(options, self.headers)
            self._open(loading)
            if guard is not None:
                self._watch(guard)
        except BaseException:
            self.close()
            raise

    def _open(self, loading: Loading) -> None:
        options = self.options
        wants_heads = options.drafting.uses_heads
        self.model = self._load(loading, self.headers.model, with_heads=wants_heads and self.headers.side is None)
        self.n_ctx = _context_size(options, self.model)
        self.window = self.model.n_swa
        n_outputs = verify_rows(options.n_batch, options.n_sessions)
        self.trunk: ContextInterface = self.model.open_trunk(options.context(n_outputs=n_outputs))
        self._closers.append(self.trunk.close)
        self.drafter = Drafter(options.drafting, self._open_heads(loading) if wants_heads else None, self.clock)
        self._free_sequences = list(range(options.n_sessions))[::-1]
        self._sessions: dict[int, Session] = {}
        heads = self.drafter.heads
        if heads:
            choose_padding(heads, self.clock)
        if options.drafting.uses_lookup:
            calibrate(self.trunk, self.n_vocab, heads, self.drafter.controller.costs, self.clock)

    def _watch(self, guard: "Guard") -> None:
        self.demand = guard.demand
        self.notes += guard.differences()
        self.budget.limit = guard.cache_bytes
        watchdog = guard.watchdog(shrink=self.budget.halve, on_change=self.on_memory_level)
        self._closers.append(watchdog.stop)
        watchdog.start()

    def _load(self, loading: Loading, header: Header, *, with_heads: bool) -> ModelInterface:
        model = loading.load(self.options.load(header.path, with_heads=with_heads), header)
        self._closers.append(model.close)
        return model

    def _open_heads(self, loading: Loading) -> Heads | None:
        header = self.headers.side or self.headers.model
        if not header.shape.n_heads:
            self.notes.append(f"{header.path} has no MTP heads: running without them")
            return None
        model = self._head_model(loading)
        n_batch = head_rows(self.options.n_sessions)
        contexts = []
        for head in range(self.options.drafting.n_heads(header.shape.n_heads)):
            contexts.append(model.open_head(head, self.options.context(n_batch=n_batch, n_outputs=n_batch)))
            self._closers.append(contexts[-1].close)
        return Heads(contexts, self.window, self.model.n_embd, header.draft_vocabulary)

    def _head_model(self, loading: Loading) -> ModelInterface:
        if self.headers.side is None:
            return self.model
        model = self._load(loading, self.headers.side, with_heads=True)
        for name in ("n_vocab", "n_embd", "n_swa", "vocab_digest"):
            wanted, got = getattr(self.model, name), getattr(model, name)
            if wanted != got:
                raise ModelError(
                    f"the MTP file doesn't belong to the model: {self.headers.side.path} expected {name}={wanted} "
                    f"as in {self.headers.model.path}, got {got}; make it from the same checkpoint"
                )
        return model

    def close(self) -> None:
        """Frees everything, contexts before their models."""
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # sessions

    def open_session(self) -> Session:
        """Returns a new empty session; close it to give its sequence back."""
        if not self._free_sequences:
            raise ContextFull(
                f"no free session: all {self.options.n_sessions} are open; close one or load with more sessions"
            )
        session = Session(self, self._free_sequences.pop())
        self._sessions[session.seq] = session
        return session

    def release(self, seq: int) -> None:
        """Takes a closed session's sequence back."""
        del self._sessions[seq]
        self._free_sequences.append(seq)

    @property
    def n_free_cells(self) -> int:
        """Tokens that still fit into the context that all sessions share."""
        return self.n_ctx - n_cells(self._sessions.values())

    def cancel(self) -> None:
        """Makes the running step, or the next one, raise Cancelled. Callable from any thread or handler."""
        self.trunk.cancel()

    def clear_cancel(self) -> None:
        """Forgets a cancel that came after the last step."""
        self.trunk.clear_cancel()

    # memory

    def on_memory_level(self, level: Level, reading: Reading) -> None:
        """Takes the watchdog's word on the memory: at STOP the running step ends. Callable from any thread."""
        self.pressure, self._reading = level, reading
        if level is Level.STOP:
            self.budget.limit = 0  # a last snapshot would be the last straw
            self.cancel()
        for tell in self.on_pressure:
            tell(level)

    def check_pressure(self, most: Level) -> None:
        """Raises DoesNotFit if the memory is shorter than `most` tolerates."""
        if self.pressure > most:
            end = "nothing more is decoded" if self.pressure is Level.STOP else "no new work is begun"
            raise DoesNotFit(
                f"memory is short: {format_size(self._reading.available)} are free, and {end}; "
                "end other programs, or load with a smaller context"
            )

    # text

    def tokenize(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Returns token ids; `add_bos` None follows the model's own setting."""
        add_bos = self.model.add_bos if add_bos is None else add_bos
        return self.model.tokenize(text.encode(), add_bos=add_bos, parse_special=parse_special)

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.model.n_vocab

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Returns a token's bytes; control tokens are empty unless `special`."""
        return self.model.piece(token, special=special)

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return self.model.is_eog(token)

    def token_text(self, token: int) -> str:
        """Returns a token's text as the vocabulary spells it, control tokens included."""
        return self.model.text(token)

    @property
    def bos(self) -> int:
        """The token that begins a text."""
        return self.model.bos

    @property
    def eos(self) -> int:
        """The token that ends an answer."""
        return self.model.eos

    @property
    def turn_start(self) -> int | None:
        """The token that begins a message; None in a vocabulary without chat tokens."""
        return self.model.turn_start

    @property
    def chat_template(self) -> str | None:
        """The file's Jinja template for chat messages."""
        return self.model.chat_template

    @property
    def n_draft_heads(self) -> int:
        """MTP heads that draft."""
        return len(self.drafter.heads)

    def open_grammar(self, gbnf: str) -> GrammarInterface:
        """Returns a grammar's state at its start; raises SettingsError on text that isn't GBNF."""
        return self.model.open_grammar(gbnf)


def _context_size(options: EngineOptions, model: ModelInterface) -> int:
    if options.n_ctx > model.n_ctx_train:
        raise SettingsError(
            f"context too long: n_ctx expected at most {model.n_ctx_train} (the model's), got {options.n_ctx}"
        )
    return options.n_ctx
