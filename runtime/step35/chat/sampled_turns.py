"""Assistant turns as they were sampled: exact token ids, found again by what a client sends back. Pure."""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Self

from step35.chat.messages import Message, ToolCall
from step35.chat.tool_arguments import closed

MAX_TOKENS = 8_000_000  # 32 MB of ids; the turns that were used least recently go first


class Digest:
    """A digest of a growing token list."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def extend(self, tokens: Iterable[int]) -> None:
        self._hash.update(array("i", tokens).tobytes())

    @property
    def value(self) -> str:
        return self._hash.hexdigest()


def digest_of(tokens: Iterable[int]) -> str:
    """Returns the digest of a whole token list."""
    digest = Digest()
    digest.extend(tokens)
    return digest.value


@dataclass(frozen=True, slots=True)
class KnownTurn:
    """An assistant turn: the tokens before it, what clients see of it, and its own tokens.

    `ids` begin with the generation prompt and end before the end token.
    """

    before: str
    """Digest of all tokens before the turn."""
    message: Message
    ids: array

    def matches(self, message: Message) -> bool:
        """Whether a client's message is this turn; reasoning may be left out, and JSON spelt otherwise."""
        ours = self.message
        return (
            ours.content.strip() == message.content.strip()
            and _agree(ours.reasoning, message.reasoning)
            and len(ours.tool_calls) == len(message.tool_calls)
            and all(
                (a.id, a.name, _value(a.arguments)) == (b.id, b.name, _value(b.arguments))
                for a, b in zip(ours.tool_calls, message.tool_calls, strict=True)
            )
        )

    def as_data(self) -> dict[str, Any]:
        """Returns the turn as JSON can hold it."""
        calls = [[call.id, call.name, call.arguments] for call in self.message.tool_calls]
        return {
            "before": self.before,
            "content": self.message.content,
            "reasoning": self.message.reasoning,
            "calls": calls,
            "ids": list(self.ids),
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError on what `as_data` didn't write."""
        calls = tuple(ToolCall(*map(str, call)) for call in data["calls"])
        message = Message("assistant", str(data["content"]), data["reasoning"], calls)
        return cls(str(data["before"]), message, array("i", data["ids"]))


def _agree(ours: str | None, theirs: str | None) -> bool:
    return not theirs or (ours or "").strip() == theirs.strip()


def _value(arguments: str) -> object:
    """Returns what arguments say; some clients send those that were cut short as they came, and ours are closed."""
    try:
        return json.loads(closed(arguments))
    except RecursionError:
        return arguments


@dataclass(slots=True)
class TurnMap:
    """Turns by the tokens before them and by the ids of their tool calls; callable from any thread.

    What precedes a turn is part of its name: two conversations may share a content, not their reasoning.
    The ids of tool calls are ours and unique, so they name a turn even where an earlier part was edited.
    """

    max_tokens: int = MAX_TOKENS
    _turns: OrderedDict[tuple[str, ...], list[KnownTurn]] = field(default_factory=OrderedDict)
    _n_tokens: int = 0
    _lock: Lock = field(default_factory=Lock)

    def add(self, turn: KnownTurn) -> None:
        """Keeps a turn; one that was there before under the same names is found after it."""
        with self._lock:
            for name in _names(turn.before, turn.message):
                turns = self._turns.setdefault(name, [])
                if turn in turns:
                    turns.remove(turn)
                    self._n_tokens -= len(turn.ids)
                turns.insert(0, turn)
                self._turns.move_to_end(name)
                self._n_tokens += len(turn.ids)
            while self._n_tokens > self.max_tokens and len(self._turns) > 1:
                _, old = self._turns.popitem(last=False)
                self._n_tokens -= sum(len(turn.ids) for turn in old)

    def find(self, before: str, message: Message) -> KnownTurn | None:
        """Returns the turn that a client's message is, given the digest of the tokens before it."""
        with self._lock:
            for name in _names(before, message):
                found = next((turn for turn in self._turns.get(name, ()) if turn.matches(message)), None)
                if found:
                    self._turns.move_to_end(name)
                    return found
        return None

    def __len__(self) -> int:
        return len({id(turn) for turns in self._turns.values() for turn in turns})


def _names(before: str, message: Message) -> list[tuple[str, ...]]:
    calls = tuple(call.id for call in message.tool_calls)
    return [("before", before), *([("calls", *calls)] if calls else [])]


def known_turn(before: Sequence[int], ids: Sequence[int], message: Message) -> KnownTurn:
    """Returns a turn made of the tokens before it and its own."""
    return KnownTurn(digest_of(before), message, array("i", ids))
