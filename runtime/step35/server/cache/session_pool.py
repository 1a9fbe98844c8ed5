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
from step35.engine.engine import Engine
from step35.engine.prefix import Cached, common_prefix, plan_sync
from step35.engine.session import Session, n_cells
from step35.engine.turn import Turn
from step35.errors import DoesNotFit, NativeError, SettingsError
from step35.server.cache.session_disk import SessionDisk
from step35.server.cache.slots import MIN_FORK, Choice, SlotView, choose_slot, eviction_order, why_broken

MAX_SHORT = 4096
"""Tokens of a conversation that counts as short, at most."""
MIN_LOAD_GAIN = 256
"""A session on disk is worth loading if it saves this many tokens more than what is in memory."""
ANSWER_ROOM = 64
"""Cells that are free for an answer when it begins."""
ONE_NEW_IN = 8
"""A session is written again when one token in so many is new, not after every turn: its file may have gigabytes."""
UNUSED_BEFORE_SAVE_S = 30.0
"""Or when nobody has used it for this long."""

log = logging.getLogger("step35.server")


@dataclass(slots=True)
class SessionSlot:
    """A session with what the server knows about it. `turn` is set while it is being extended."""

    session: Session
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    last_start: int = 0
    last_used_s: float = 0.0
    turn: Turn | None = None
    is_running: bool = False
    turns: tuple[KnownTurn, ...] = ()
    is_unsaved: bool = False
    n_saved: int = 0
    """Tokens in its file."""

    def reset(self, *, keeps_cells: bool) -> None:
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
        """`n_parallel` answers can run at a time, however many conversations are idle."""
        self.engine, self.disk = engine, disk
        self.slots = [SessionSlot(engine.open_session()) for _ in range(engine.options.n_sessions)]
        self.n_protected = min(max(1, len(self.slots) - n_parallel), len(self.slots) - 1)
        """Long conversations that short requests leave alone."""
        self.n_short = min(MAX_SHORT, engine.n_ctx // 8)
        self._text, self._clock = text, clock

    # a session for a prompt

    def acquire(self, prompt: Prompt) -> SessionSlot | None:
        """Returns the session that will serve a prompt, with what can be shared in it; None: wait for a running one."""
        views, n_prompt = self._views(prompt.tokens), len(prompt.tokens)
        choice = choose_slot(n_prompt, views, self.n_short, self.n_protected) if self._can_fit(n_prompt) else None
        if choice is None:
            return None
        slot, view = self.slots[choice.index], views[choice.index]
        self._log_mismatch(views, choice, prompt)
        if not view.is_continued:
            self._evict(slot, keeps_cells=view.n_here > 0 and choice.source is None)
        if choice.source is not None:
            self._fork(slot, self.slots[choice.source], choice.n_fork)
        self._load_if_better(slot, prompt.tokens, max(view.n_here, choice.n_fork))
        self.free_cells(min(n_prompt + ANSWER_ROOM, self.engine.n_ctx) - slot.session.n_past, keep=slot)
        slot.is_running, slot.last_used_s = True, self._clock()
        return slot

    def _can_fit(self, n_prompt: int) -> bool:
        """Whether a prompt fits beside the running turns once all idle sessions are gone."""
        running = [slot.session for slot in self.slots if slot.is_running]
        return not running or n_cells(running) + n_prompt + ANSWER_ROOM <= self.engine.n_ctx

    def _views(self, prompt: Sequence[int]) -> list[SlotView]:
        return [self._view(i, slot, prompt) for i, slot in enumerate(self.slots)]

    def _view(self, index: int, slot: SessionSlot, prompt: Sequence[int]) -> SlotView:
        session = slot.session
        n_known = common_prefix(session.tokens, prompt)
        n_common = min(n_known, session.n_past)
        most = min(n_common, len(prompt) - 1)
        ends = [n for n in (*session.checkpoints, session.n_past) if n <= most]
        coming = [n for n in slot.turn.checkpoint_positions if session.n_past < n <= n_known] if slot.turn else []
        return SlotView(
            index,
            session.n_past if not slot.turn else len(session.tokens),
            n_common,
            0 if slot.is_running else session.n_reusable(prompt),
            max(ends, default=0),
            max(coming, default=0),
            slot.last_start,
            slot.is_running,
            slot.last_used_s,
        )

    def _fork(self, slot: SessionSlot, source: SessionSlot, n_tokens: int) -> None:
        try:
            slot.session.fork(source.session, n_tokens)
        except (NativeError, SettingsError) as error:  # the watchdog may have dropped the checkpoint
            log.warning("prefix not shared: %s", error)

    def _log_mismatch(self, views: Sequence[SlotView], choice: Choice, prompt: Prompt) -> None:
        """Logs where a prompt that looked like the next turn of a conversation parts from it."""
        nearest = max(views, key=lambda view: view.n_common)
        session = self.slots[nearest.index].session
        if MIN_FORK <= nearest.n_common < min(session.n_past, len(prompt.tokens) - 1):
            reused = max(views[choice.index].n_here, choice.n_fork)
            log.info(
                "%s; %d of %d tokens reused",
                why_broken(session.tokens[: session.n_past], prompt.tokens, self._text), reused, len(prompt.tokens),
            )  # fmt: skip

    def _load_if_better(self, slot: SessionSlot, prompt: Sequence[int], n_in_memory: int) -> None:
        """Replaces a session by one on disk that has much more of the prompt."""
        if self.disk is None:
            return
        name = self._best_saved(self.disk, prompt, n_in_memory + min(MIN_LOAD_GAIN, len(prompt) // 2))
        if name is not None:
            self._load(self.disk, name, slot, prompt)

    def _best_saved(self, disk: SessionDisk, prompt: Sequence[int], n_least: int) -> str | None:
        """Returns the session on disk that has most of a prompt, if that is `n_least` tokens or more."""
        live, wanted = {slot.name for slot in self.slots}, tuple(prompt)
        found: dict[str, int] = {}
        for name, saved in list(disk.saved.items()):
            tokens = saved.tokens[: saved.n_past]
            if name not in live and common_prefix(tokens, wanted) >= n_least:
                window_start = max(0, saved.n_past - self.engine.window + 1)
                cached = Cached(tokens, window_start, saved.checkpoints)
                found[name] = plan_sync(cached, wanted, self.engine.window).n_keep
        best = max(found, key=found.__getitem__, default=None)
        return best if best is not None and found[best] >= n_least else None

    def _load(self, disk: SessionDisk, name: str, slot: SessionSlot, prompt: Sequence[int]) -> None:
        saved = disk.saved[name]
        snapshot = disk.load(name)
        if snapshot is None:
            return
        self._evict(slot)
        if not self.free_cells(saved.n_past, keep=slot):
            return
        try:
            slot.session.restore(snapshot)
        except NativeError as error:
            slot.session.rewind(0)
            disk.drop(name, error)
            return
        if common_prefix(saved.tokens, prompt) >= saved.last_start:  # else it is another branch, and gets its own file
            slot.name, slot.n_saved = name, saved.n_past
        log.info("session %s came back from disk: %d tokens", name[:8], saved.n_past)

    # room

    def free_cells(self, n_cells: int, keep: SessionSlot | None = None) -> bool:
        """Empties idle sessions, the least useful first, until so many cells are free; returns whether they are."""
        if self.engine.n_free_cells >= n_cells:
            return True
        views = [
            SlotView(i, s.session.n_past, is_busy=s.is_running or s is keep, last_used_s=s.last_used_s)
            for i, s in enumerate(self.slots)
        ]
        for view in eviction_order(views, self.n_short):
            if self.engine.n_free_cells >= n_cells:
                break
            unused_s = self._clock() - view.last_used_s
            log.info("session emptied for room: %d tokens, unused for %.0f s", view.n_tokens, unused_s)
            self._evict(self.slots[view.index])
        return self.engine.n_free_cells >= n_cells

    def _evict(self, slot: SessionSlot, *, keeps_cells: bool = False) -> None:
        """Gives a session to another conversation; what of this one is not on disk goes there first, if it is long."""
        if self.disk is not None and slot.is_unsaved and slot.session.n_past >= self.n_short:
            if self.disk.can_save:
                self._save(self.disk, slot)
            else:
                log.info("session %s left unsaved: another one is being written", slot.name[:8])
        slot.reset(keeps_cells=keeps_cells)

    # after a turn

    def release(self, slot: SessionSlot, last_start: int, turns: Sequence[KnownTurn]) -> None:
        """Takes a session back at the end of a turn; its cells stay."""
        slot.turn, slot.is_running, slot.last_used_s = None, False, self._clock()
        slot.last_start, slot.turns, slot.is_unsaved = last_start, tuple(turns), True
        self._leave_one_short(slot)

    def _leave_one_short(self, slot: SessionSlot) -> None:
        """Short requests always find a session: when all timelines have become long, the oldest goes."""
        if len(self.slots) == 1 or any(other.session.n_past < self.n_short for other in self.slots):
            return
        idle = [other for other in self.slots if not other.is_running and other is not slot]
        if idle:
            self._evict(min(idle, key=lambda other: other.last_used_s))

    def drop(self, slot: SessionSlot) -> None:
        """Forgets a session whose cells can't be trusted."""
        slot.turn, slot.is_running = None, False
        slot.reset(keeps_cells=False)

    # disk

    @property
    def has_unsaved(self) -> bool:
        """Whether a session is still to be written."""
        return self.disk is not None and any(slot.is_unsaved for slot in self.slots)

    def save_one(self) -> bool:
        """Hands one unsaved idle session to the disk, if it takes one; returns whether it did."""
        idle = [slot for slot in self.slots if slot.is_unsaved and not slot.is_running]
        unsaved = [slot for slot in idle if self._is_worth_saving(slot)]
        if self.disk is None or not unsaved or not self.disk.can_save:
            return False
        self._save(self.disk, min(unsaved, key=lambda slot: slot.last_used_s))
        return True

    def _is_worth_saving(self, slot: SessionSlot) -> bool:
        n_past = slot.session.n_past
        is_new = (n_past - slot.n_saved) * ONE_NEW_IN >= n_past
        return n_past > 0 and (is_new or self._clock() - slot.last_used_s >= UNUSED_BEFORE_SAVE_S)

    def save_all(self) -> None:
        """Writes every unsaved session, one after the other, and waits."""
        if self.disk is None:
            return
        for slot in self.slots:
            if slot.is_unsaved and slot.session.n_past:
                self.disk.wait()
                self._save(self.disk, slot)
        self.disk.close()

    def _save(self, disk: SessionDisk, slot: SessionSlot) -> None:
        slot.is_unsaved, slot.n_saved = False, slot.session.n_past
        try:
            disk.save(slot.name, slot.session.snapshot(), slot.turns, slot.last_start)
        except DoesNotFit as error:
            log.warning("session not saved: %s", error)
