"""GBNF grammars over a model's vocabulary."""

import ctypes
from typing import Any

import numpy as np

from step35.errors import SettingsError
from step35.native.library import C, forget_errors, reason


class Grammar:
    """The state of a GBNF grammar: which tokens may come next."""

    def __init__(self, vocab: Any, n_vocab: int, gbnf: str) -> None:
        """`vocab` is a llama_vocab of `n_vocab` tokens; raises SettingsError on text that isn't GBNF."""
        forget_errors()
        self._sampler = C.llama_sampler_init_grammar(vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise SettingsError(f"bad grammar: expected GBNF with a rule named root: {reason()}")
        self._candidates = np.zeros(n_vocab, _CANDIDATE)

    def close(self) -> None:
        if self._sampler:
            C.llama_sampler_free(self._sampler)
            self._sampler = None

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Returns which of the token ids (bool, same length) may come next."""
        candidates = self._candidates[: len(ids)]
        candidates["id"], candidates["logit"], candidates["p"] = ids, 0, 0
        pointer = ctypes.cast(candidates.ctypes.data, C.llama_token_data_p)
        array = C.llama_token_data_array(pointer, len(ids), -1, False)
        C.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return candidates["logit"] > -np.inf

    def accept(self, token: int) -> None:
        """Moves on past a chosen token, which must be allowed."""
        C.llama_sampler_accept(self._sampler, token)


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
