"""The engine's sessions as a cache of conversations: where a prompt goes, what it shares, what makes room.

Lives in the thread that owns the engine.
"""

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from step35.chat.prompt_builder import Prompt
from step35.chat.sampled_turns import KnownTurn
from step35.engine.decode_loop import Turn
from step35.engine.engine import Engine
from step35.engine.prefix import Cached, common_prefix, plan_sync
from step35.engine.session import Session, n_cells
from step35.errors import DoesNotFit, NativeError, SettingsError
from step35.server.cache.session_disk import SessionDisk
from step35.server.cache.slots import LEAST_FORK, Choice, Slot, choose_slot, eviction_order, why_broken

MOST_SHORT = 4096
LEAST_LOAD = 256
"""A session on disk is worth loading if it saves this many tokens more than what is in memory."""
ROOM_TO_ANSWER = 64
LEAST_CHANGE = 8
"""A session is written again when one token in so many is new, not after every turn: its file may have gigabytes."""
SETTLED_S = 30.0
"""Or when nobody has used it for this long."""

log = logging.getLogger("step35.server")


@dataclass(slots=True)
class SessionSlot:
    """A session with what the server knows about it. `turn` is set while it is being extended."""

    session: Session
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    last_start: int = 0
    last_used: float = 0.0
    turn: Turn | None = None
    is_taken: bool = False
    turns: tuple[KnownTurn, ...] = ()
    is_unsaved: bool = False
    n_saved: int = 0
    """Tokens in its file."""

    def begin_anew(self, *, keeps_cells: bool) -> None:
        """Makes room for another conversation; the file of this one, if there is one, stays."""
        if not keeps_cells:
            self.session.rewind(0)
        self.name, self.last_start, self.turns = uuid.uuid4().hex, 0, ()
        self.is_unsaved, self.n_saved = False, 0


class SessionPool:
    """All sessions of an engine, and those on disk."""

    def __init__(
        self,
        engine: Engine,
        text: Callable[[Sequence[int]], str],
        disk: SessionDisk | None = None,
        clock: Callable[[], float] = time.monotonic,
        n_parallel: int = 1,
    ) -> None:
        """`n_parallel` answers can run at a time, whatever conversations rest."""
        self.engine, self.disk = engine, disk
        self.held = [SessionSlot(engine.open_session()) for _ in range(engine.options.n_sessions)]
        self.n_kept = min(max(1, len(self.held) - n_parallel), len(self.held) - 1)
        """Long conversations that short requests leave alone."""
        self.n_short = min(MOST_SHORT, engine.n_ctx // 8)
        self._text, self._clock = text, clock

    # placing a prompt

    def acquire(self, prompt: Prompt) -> SessionSlot | None:
        """Returns the session that will serve a prompt, with what can be shared in it; None: wait for a running one."""
        slots = self._slots(prompt.tokens)
        n_prompt = len(prompt.tokens)
        choice = choose_slot(n_prompt, slots, self.n_short, self.n_kept) if self._can_fit(n_prompt) else None
        if choice is None:
            return None
        held, slot = self.held[choice.index], slots[choice.index]
        self._tell_why(slots, choice, prompt)
        if not slot.is_continued:
            self._leave(held, keeps_cells=slot.n_here > 0 and choice.source is None)
        if choice.source is not None:
            self._fork(held, choice)
        self._load_better(held, prompt.tokens, max(slot.n_here, choice.n_fork))
        self.free_cells(min(len(prompt.tokens) + ROOM_TO_ANSWER, self.engine.n_ctx) - held.session.n_past, keep=held)
        held.is_taken, held.last_used = True, self._clock()
        return held

    def _can_fit(self, n_prompt: int) -> bool:
        """Whether a prompt fits beside the running turns once all idle sessions are gone."""
        running = [held.session for held in self.held if held.is_taken]
        return not running or n_cells(running) + n_prompt + ROOM_TO_ANSWER <= self.engine.n_ctx

    def _slots(self, tokens: Sequence[int]) -> list[Slot]:
        return [self._slot(i, held, tokens) for i, held in enumerate(self.held)]

    def _slot(self, index: int, held: SessionSlot, prompt: Sequence[int]) -> Slot:
        session = held.session
        n_known = common_prefix(session.tokens, prompt)
        n_common = min(n_known, session.n_past)
        most = min(n_common, len(prompt) - 1)
        ends = [n for n in (*session.checkpoints, session.n_past) if n <= most]
        coming = [n for n in held.turn.checkpoint_positions if session.n_past < n <= n_known] if held.turn else []
        return Slot(
            index,
            session.n_past if not held.turn else len(session.tokens),
            n_common,
            0 if held.is_taken else session.n_reusable(prompt),
            max(ends, default=0),
            max(coming, default=0),
            held.last_start,
            held.is_taken,
            held.last_used,
        )

    def _fork(self, held: SessionSlot, choice: Choice) -> None:
        try:
            held.session.fork(self.held[choice.source].session, choice.n_fork)
        except (NativeError, SettingsError) as error:  # the watchdog may have dropped the checkpoint
            log.warning("prefix not shared: %s", error)

    def _tell_why(self, slots: Sequence[Slot], choice: Choice, prompt: Prompt) -> None:
        """Logs where a prompt that looked like the next turn of a conversation parts from it."""
        nearest = max(slots, key=lambda slot: slot.n_common)
        session = self.held[nearest.index].session
        if LEAST_FORK <= nearest.n_common < min(session.n_past, len(prompt.tokens) - 1):
            reused = max(slots[choice.index].n_here, choice.n_fork)
            log.info(
                "%s; %d of %d tokens reused",
                why_broken(session.tokens[: session.n_past], prompt.tokens, self._text), reused, len(prompt.tokens),
            )  # fmt: skip

    def _load_better(self, held: SessionSlot, prompt: Sequence[int], in_memory: int) -> None:
        """Replaces a session by one on disk that has much more of the prompt."""
        name = self._best_saved(prompt, in_memory + min(LEAST_LOAD, len(prompt) // 2)) if self.disk else None
        if name is None:
            return
        saved = self.disk.saved[name]
        snapshot = self.disk.load(name)
        if snapshot is None:
            return
        self._leave(held)
        if not self.free_cells(saved.n_past, keep=held):
            return
        try:
            held.session.restore(snapshot)
        except NativeError as error:
            held.session.rewind(0)
            self.disk.drop(name, error)
            return
        if common_prefix(saved.tokens, prompt) >= saved.last_start:  # else it is another branch, and gets its own file
            held.name, held.n_saved = name, saved.n_past
        log.info("session %s came back from disk: %d tokens", name[:8], saved.n_past)

    def _best_saved(self, prompt: Sequence[int], n_least: int) -> str | None:
        """Returns the session on disk that has most of a prompt, if it is worth its while."""
        live, wanted = {held.name for held in self.held}, tuple(prompt)
        found = {}
        for name, saved in list(self.disk.saved.items()):
            tokens = saved.tokens[: saved.n_past]
            if name not in live and common_prefix(tokens, wanted) >= n_least:
                held_from = max(0, saved.n_past - self.engine.window + 1)
                found[name] = plan_sync(Cached(tokens, held_from, saved.checkpoints), wanted, self.engine.window).n_keep
        best = max(found, key=found.__getitem__, default=None)
        return best if best is not None and found[best] >= n_least else None

    # room

    def free_cells(self, n_cells: int, keep: SessionSlot | None = None) -> bool:
        """Empties idle sessions, the least useful first, until so many cells are free; returns whether they are."""
        if self.engine.n_free_cells >= n_cells:
            return True
        slots = [
            Slot(i, h.session.n_past, is_busy=h.is_taken or h is keep, last_used=h.last_used)
            for i, h in enumerate(self.held)
        ]
        for slot in eviction_order(slots, self.n_short):
            if self.engine.n_free_cells >= n_cells:
                break
            log.info(
                "session emptied for room: %d tokens, unused for %.0f s", slot.n_tokens, self._clock() - slot.last_used
            )
            self._leave(self.held[slot.index])
        return self.engine.n_free_cells >= n_cells

    def _leave(self, held: SessionSlot, *, keeps_cells: bool = False) -> None:
        """Gives a session to another conversation; what of this one is not on disk goes there first, if it is long."""
        is_lost = self.disk is not None and held.is_unsaved and held.session.n_past >= self.n_short
        if is_lost and self.disk.can_save:
            self._save(held)
        elif is_lost:
            log.info("session %s left unsaved: another one is being written", held.name[:8])
        held.begin_anew(keeps_cells=keeps_cells)

    # after a turn

    def release(self, held: SessionSlot, last_start: int, turns: Sequence[KnownTurn]) -> None:
        """Takes a session back at the end of a turn; its cells stay."""
        held.turn, held.is_taken, held.last_used = None, False, self._clock()
        held.last_start, held.turns, held.is_unsaved = last_start, tuple(turns), True
        self._leave_one_short(held)

    def _leave_one_short(self, held: SessionSlot) -> None:
        """Short requests always find a place: when all timelines have become long, the oldest goes."""
        if len(self.held) == 1 or any(other.session.n_past < self.n_short for other in self.held):
            return
        idle = [other for other in self.held if not other.is_taken and other is not held]
        if idle:
            self._leave(min(idle, key=lambda other: other.last_used))

    def drop(self, held: SessionSlot) -> None:
        """Forgets a session whose cells can't be trusted."""
        held.turn, held.is_taken = None, False
        held.begin_anew(keeps_cells=False)

    # disk

    @property
    def has_unsaved(self) -> bool:
        """Whether a session is still to be written."""
        return self.disk is not None and any(held.is_unsaved for held in self.held)

    def save_one(self) -> bool:
        """Hands one unsaved idle session to the disk, if it takes one; returns whether it did."""
        unsaved = [held for held in self.held if held.is_unsaved and not held.is_taken and self._is_worth_saving(held)]
        if self.disk is None or not unsaved or not self.disk.can_save:
            return False
        self._save(min(unsaved, key=lambda held: held.last_used))
        return True

    def _is_worth_saving(self, held: SessionSlot) -> bool:
        n_past = held.session.n_past
        is_new = (n_past - held.n_saved) * LEAST_CHANGE >= n_past
        return n_past > 0 and (is_new or self._clock() - held.last_used >= SETTLED_S)

    def save_all(self) -> None:
        """Writes every unsaved session, one after the other, and waits."""
        if self.disk is None:
            return
        for held in self.held:
            if held.is_unsaved and held.session.n_past:
                self.disk.wait()
                self._save(held)
        self.disk.close()

    def _save(self, held: SessionSlot) -> None:
        held.is_unsaved, held.n_saved = False, held.session.n_past
        try:
            self.disk.save(held.name, held.session.snapshot(), held.turns, held.last_start)
        except DoesNotFit as error:
            log.warning("session not saved: %s", error)
