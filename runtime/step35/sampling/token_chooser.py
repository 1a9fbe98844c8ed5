"""Choosing the tokens of one turn: sampling with a grammar's state and log-probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from step35.native.interface import GrammarInterface
from step35.sampling.sampler import Sampling, adjust, choose, log_probabilities


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A chosen token's log-probability under the model, and the most probable tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Chooser:
    """Chooses a turn's tokens, in order; closed at the turn's end."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        grammar: GrammarInterface | None = None,
        n_logprobs: int | None = None,
        process: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """`process` maps (token ids so far, logits) to logits; it sees every position once."""
        self.sampling = sampling
        self.logprobs: list[TokenLogprobs] = []
        self._grammar = grammar
        self._n_logprobs = n_logprobs
        self._process = process

    def close(self) -> None:
        if self._grammar:
            self._grammar.close()

    def choose(self, logits: np.ndarray, history: Sequence[int]) -> int:
        """Returns the token that follows `history`, given its logits (n_vocab,)."""
        adjusted = adjust(logits, self.sampling, history)
        if self._process:
            adjusted = self._process(np.asarray(history), adjusted.copy())
        token = choose(adjusted, self.sampling, len(history))
        if self._grammar:
            token = self._allowed(self._grammar, token, adjusted, len(history))
            self._grammar.accept(token)
        if self._n_logprobs is not None:
            self.logprobs.append(_logprobs(logits, token, self._n_logprobs))
        return token

    def _allowed(self, grammar: GrammarInterface, token: int, logits: np.ndarray, position: int) -> int:
        """Returns the token if the grammar allows it, else the choice among those that it allows.

        To ask for one token is cheap; to ask for the whole vocabulary is not, and seldom needed.
        """
        if grammar.allowed(np.array([token]))[0]:
            return token
        allowed = grammar.allowed(np.arange(len(logits)))
        return choose(np.where(allowed, logits, -np.inf), self.sampling, position)


def _logprobs(logits: np.ndarray, token: int, n_top: int) -> TokenLogprobs:
    values = log_probabilities(logits)
    top = np.argsort(-values, kind="stable")[:n_top] if n_top else []
    return TokenLogprobs(token, float(values[token]), tuple((int(i), float(values[i])) for i in top))
