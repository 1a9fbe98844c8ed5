"""Choosing an answer's tokens: sampling, a grammar that waits for the reasoning's end, forced tokens, a guard."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import isfinite

import numpy as np

from step35.chat.reasoning_budget import ReasoningWatch
from step35.markup import THINK, THINK_END, TOOL_CALL
from step35.native.interface import GrammarInterface
from step35.sampling.sampler import Sampling, adjust, choose
from step35.sampling.token_chooser import Chooser, TokenLogprobs

MAX_PERIOD = 128
MAX_REPEATED = 1024
"""Tokens that repeat with one period before an answer counts as endless."""


class LazyGrammar:
    """A grammar that is in force after its trigger token; before, only the `forbidden` tokens may not come."""

    def __init__(self, grammar: GrammarInterface, trigger_token: int | None, forbidden: Iterable[int]) -> None:
        """With `trigger_token` None the grammar is in force from the start."""
        self._grammar = grammar
        self._trigger_token = trigger_token
        self._forbidden = np.array(sorted(forbidden), np.int64)
        self._is_triggered = trigger_token is None
        self.is_stuck = False

    def close(self) -> None:
        self._grammar.close()

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Returns which of the token ids may come next; where nothing may, the answer can only end."""
        if not self._is_triggered or self.is_stuck:
            return np.isin(ids, self._forbidden) == self.is_stuck
        allowed = self._grammar.allowed(ids)
        if len(ids) > 1 and not allowed.any():
            self.is_stuck = True
            return np.isin(ids, self._forbidden)
        return allowed

    def accept(self, token: int) -> None:
        if self.is_stuck:
            return
        if self._is_triggered:
            self._grammar.accept(token)
        elif token == self._trigger_token:
            self._is_triggered = True


class ReasoningEnd:
    """Tells which ids end the reasoning when its budget is spent; asked before and after each token."""

    def __init__(
        self, watch: ReasoningWatch, piece: Callable[[int], bytes], tokenize: Callable[[str], list[int]]
    ) -> None:
        self._watch, self._piece, self._tokenize = watch, piece, tokenize
        self._is_over = self._has_answer = False

    def at_start(self) -> list[int]:
        """Returns the ids that must come first: a budget may be spent already."""
        return self._end(self._watch.due())

    def before(self, choose: Callable[[], int]) -> list[int]:
        """Returns the ids that must come instead of the next token, which `choose` returns; it is seldom called."""
        if self._is_over or not self._watch.depends_on_next:
            return []
        return self._end(self._watch.due(self._piece(choose()).decode(errors="replace")))

    def after(self, token: int) -> list[int]:
        """Returns the ids that must follow a token."""
        if self._is_over and self._has_answer:
            return []
        text = self._piece(token).decode(errors="replace")
        if self._is_over:
            self._follow(text)
            return []
        if THINK_END in text or TOOL_CALL in text:
            self._is_over, self._has_answer = True, TOOL_CALL in text
            return []
        return self._end(self._watch.add(text))

    def _follow(self, text: str) -> None:
        """After the end: a model may begin to reason again before its answer, and that counts, too."""
        self._has_answer = bool(text.replace(THINK_END, "").replace(THINK, "").strip())
        self._is_over = THINK not in text

    def _end(self, text: str | None) -> list[int]:
        if text is None:
            return []
        self._is_over = True
        return self._tokenize(text)


class ConstrainedChooser(Chooser):
    """A chooser with forced tokens and a guard: a row without a finite best ends the turn, and `is_broken` says so."""

    def __init__(
        self,
        sampling: Sampling,
        eog: int,
        *,
        grammar: LazyGrammar | None = None,
        n_logprobs: int | None = None,
        reasoning_end: ReasoningEnd | None = None,
    ) -> None:
        super().__init__(sampling, grammar=grammar, n_logprobs=n_logprobs)
        self.is_broken = False
        self._eog = eog
        self._reasoning_end = reasoning_end
        self._forced = deque(reasoning_end.at_start() if reasoning_end else ())

    def choose(self, logits: np.ndarray, history: Sequence[int]) -> int:
        """Returns the token that follows `history`, given its logits (n_vocab,)."""
        if not isfinite(logits[logits.argmax()]):  # NaN counts as the largest; cheaper than max()
            self.is_broken = True
            self.logprobs += [] if self._n_logprobs is None else [TokenLogprobs(self._eog, 0.0, ())]
            return self._eog
        end = self._reasoning_end
        if end and not self._forced:
            self._forced.extend(end.before(lambda: self._wanted(logits, history)))
        token = super().choose(self._only_forced(logits) if self._forced else logits, history)
        if end:
            self._forced.extend(end.after(token))
        return token

    def _wanted(self, logits: np.ndarray, history: Sequence[int]) -> int:
        """Returns the token that comes next where nothing is forced."""
        return choose(adjust(logits, self.sampling, history), self.sampling, len(history))

    def _only_forced(self, logits: np.ndarray) -> np.ndarray:
        only = np.full_like(logits, -np.inf)
        only[self._forced.popleft()] = 0.0
        return only


def is_endless(tokens: Sequence[int]) -> bool:
    """Whether the last MAX_REPEATED tokens are one short piece over and over."""
    if len(tokens) < MAX_REPEATED:
        return False
    tail = np.asarray(tokens[-MAX_REPEATED:])
    return any(np.array_equal(tail[period:], tail[:-period]) for period in range(1, MAX_PERIOD + 1))
