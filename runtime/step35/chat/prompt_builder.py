"""From a conversation to its tokens: assistant turns that are known keep the ids they were sampled with.

The template renders the conversation twice: as it is, and with a placeholder for each assistant
message. The text between the placeholders is the same in both, so the text of each turn is what lies
between those pieces in the first. A turn that is known takes its own ids instead of that text. A turn
seen for the first time is known from then on: the template drops older reasoning, so it would render
the same turn otherwise later, and the cache would break there.
"""

import re
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

from step35.chat.messages import Conversation, Message
from step35.chat.sampled_turns import Digest, KnownTurn, TurnMap, known_turn
from step35.markup import ASSISTANT_START, THINK, THINK_END, TURN_END, TURN_START

_CUT = re.compile(f"(?={re.escape(TURN_START)})")
MAX_CHARS = 16_000_000
"""Of texts whose ids are kept."""
LEAST_CHECKPOINT = 32
"""Tokens: a checkpoint of fewer saves less than it costs."""
LEAST_PIECE = 64
"""Tokens between checkpoints: to decode fewer on their own, every time, costs more than to decode them again after an
edit. On a CPU, llama.cpp's attention also takes twice as long for a row where there are fewer rows than this."""
TAIL, LEAST_TEXT = 4, 256
"""Tokens at the end of a text without messages that may become others as it is typed on.

A shorter text is read again.
"""
BILLING = re.compile(r"^x-anthropic-billing-header:.*\n?", re.MULTILINE)

Render = Callable[[Conversation], str]
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens; `starts` are the positions where messages begin, the last one the answer's."""

    tokens: list[int]
    starts: tuple[int, ...] = ()
    opens_reasoning: bool = False
    turns: tuple[KnownTurn, ...] = ()
    """The assistant turns in it."""
    n_known: int = 0
    """How many of them took the ids that they were sampled with."""

    @property
    def answer_start(self) -> int:
        """Where the generation prompt begins."""
        return self.starts[-1] if self.starts else len(self.tokens)

    @property
    def last_start(self) -> int:
        """Where the last message begins: a client's edit or retry parts from the timeline there or later."""
        if not self.starts:
            return len(self.tokens) - TAIL if len(self.tokens) >= LEAST_TEXT else 0
        return self.starts[-2] if len(self.starts) > 1 else 0

    @property
    def checkpoint_positions(self) -> tuple[int, ...]:
        """Where checkpoints save work: after the system's message, and before the last message."""
        wanted = {*self.starts[1:2], self.last_start}
        return tuple(sorted(n for n in wanted if LEAST_CHECKPOINT <= n < len(self.tokens)))

    def checkpoints_after(self, n_cached: int) -> tuple[int, ...]:
        """Returns the positions to come, but for those close behind another one or behind the cached tokens' end.

        The first message's stays: it serves other conversations.
        """
        positions, last = [], n_cached
        for n in self.checkpoint_positions:
            if n - last >= LEAST_PIECE or (n > n_cached and n in self.starts[1:2]):
                positions.append(n)
                last = n
        return tuple(positions)


class TokenCache:
    """Tokenizes texts message by message and keeps the ids: every turn brings the whole history again.

    A message begins with a special token, so a text that is cut there has the same ids. Callable from any thread.
    """

    def __init__(self, tokenize: Tokenize, max_chars: int = MAX_CHARS) -> None:
        self._tokenize, self._max_chars = tokenize, max_chars
        self._known: OrderedDict[str, array[int]] = OrderedDict()  # the last one used at the end
        self._n_chars = 0
        self._lock = Lock()

    def __call__(self, text: str) -> list[int]:
        tokens: list[int] = []
        for message in _CUT.split(text):
            tokens += self._ids(message)
        return tokens

    def _ids(self, message: str) -> "array[int]":
        with self._lock:
            if message in self._known:
                self._known.move_to_end(message)
                return self._known[message]
        ids = array("i", self._tokenize(message) if message else [])
        with self._lock:
            self._keep(message, ids)
        return ids

    def _keep(self, message: str, ids: "array[int]") -> None:
        if message not in self._known:
            self._known[message] = ids
            self._n_chars += len(message)
        while self._n_chars > self._max_chars:
            self._n_chars -= len(self._known.popitem(last=False)[0])


@dataclass(slots=True)
class PromptBuilder:
    """Builds prompts; `render` ends with the generation prompt, `start_token` begins a message."""

    tokenize: Tokenize
    turns: TurnMap
    start_token: int | None
    _secret: str = field(default_factory=lambda: secrets.token_hex(12))

    def build(self, conversation: Conversation, render: Render, *, exact: bool = True) -> Prompt:
        """Returns a conversation's prompt; without `exact`, as the template alone would have it."""
        conversation = without_billing(conversation)
        text = render(conversation)
        indices = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        pieces = self._pieces(conversation, render, text, indices) if exact and indices else None
        if pieces is None:
            return self._prompt(self.tokenize(text), text, (), 0)
        return self._join(pieces, [conversation.messages[i] for i in indices], text)

    def remember(self, prompt: Prompt, tokens: Sequence[int], message: Message) -> KnownTurn:
        """Keeps an answer's own ids for when its message comes back; `tokens` are the prompt's and the answer's."""
        start = prompt.answer_start
        turn = known_turn(tokens[:start], tokens[start:], message)
        self.turns.add(turn)
        return turn

    def _pieces(
        self, conversation: Conversation, render: Render, text: str, indices: Sequence[int]
    ) -> list[str] | None:
        """Returns the texts around the assistant turns and of them, alternating; None where they don't fit together."""
        marked = render(self._with_placeholders(conversation, indices))
        around = self._around(marked, len(indices))
        return _weave(text, around) if around else None

    def _with_placeholders(self, conversation: Conversation, indices: Sequence[int]) -> Conversation:
        messages = list(conversation.messages)
        for n, i in enumerate(indices):
            messages[i] = Message("assistant", self._placeholder(n))
        return replace(conversation, messages=tuple(messages))

    def _placeholder(self, n: int) -> str:
        return f"{self._secret}-{n}-"

    def _around(self, marked: str, n_turns: int) -> list[str] | None:
        """Returns the texts between the turns; a turn begins with its header and ends before the end token."""
        around = []
        for n in range(n_turns):
            before, found, marked = marked.partition(self._placeholder(n))
            header = before.rfind(ASSISTANT_START)
            if not found or header < 0 or not marked.startswith(TURN_END):
                return None
            around.append(before[:header])
        return [*around, marked]

    def _join(self, pieces: list[str], messages: Sequence[Message], text: str) -> Prompt:
        tokens = self.tokenize(pieces[0])
        digest, n_hashed, n_known, turns = Digest(), 0, 0, []
        for message, turn_text, after in zip(messages, pieces[1::2], pieces[2::2], strict=True):
            digest.extend(tokens[n_hashed:])
            n_hashed = len(tokens)
            known = self.turns.find(digest.value, message)
            n_known += known is not None
            if known is None:
                known = KnownTurn(digest.value, message, array("i", self.tokenize(turn_text)))
                self.turns.add(known)
            turns.append(known)
            tokens += known.ids
            tokens += self.tokenize(after)
        return self._prompt(tokens, text, tuple(turns), n_known)

    def _prompt(self, tokens: list[int], text: str, turns: tuple[KnownTurn, ...], n_known: int) -> Prompt:
        starts = tuple(i for i, token in enumerate(tokens) if token == self.start_token)
        tail = text[text.rfind(TURN_START) :]
        return Prompt(tokens, starts, THINK in tail and THINK_END not in tail, turns, n_known)


def _weave(text: str, around: Sequence[str]) -> list[str] | None:
    """Returns `around` with the texts of the turns between; None if `text` doesn't consist of them."""
    if not text.startswith(around[0]):
        return None
    pieces, at = [around[0]], len(around[0])
    for n, after in enumerate(around[1:], 2):
        end = text.find(after, at) if n < len(around) else len(text) - len(after)
        if end < at or not text.startswith(after, end):
            return None
        pieces += [text[at:end], after]
        at = end + len(after)
    return pieces


def without_billing(conversation: Conversation) -> Conversation:
    """Leaves out Claude Code's billing line: it changes from request to request, and says nothing to the model."""
    messages = tuple(
        replace(message, content=BILLING.sub("", message.content)) if message.role == "system" else message
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)
