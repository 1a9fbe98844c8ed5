"""The vocabulary of trimmed heads: fewer tokens than the model's, under ids of their own. Pure.

`convert-step35 mtp trim` chooses the tokens. Heads of such a file draft those only, and read any other token as the
one that stands in for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from step35.errors import ModelError

ARCHITECTURE = "step35"
"""The general.architecture of a model's files."""
TRIMMED = "step35-trimmed-heads"
"""That of files with trimmed heads: who doesn't translate the ids can't load them by mistake."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocabulary:
    """The model's ids of the heads' tokens, ascending, and the heads' ids that stand for all of the model's (int32)."""

    tokens: np.ndarray
    stand_ins: np.ndarray
    digest: str
    """Of the model's vocabulary."""

    def known(self, tokens: Sequence[int]) -> list[int]:
        """Returns the heads' ids of the model's tokens."""
        return self.stand_ins[list(tokens)].tolist()


def checked(path: Path, tokens: np.ndarray, stand_ins: np.ndarray, digest: str) -> DraftVocabulary:
    """Returns the vocabulary that a file's arrays describe; raises ModelError if they contradict each other."""
    n, n_model = len(tokens), len(stand_ins)
    is_sound = 0 < n <= n_model and tokens[0] >= 0 and tokens[-1] < n_model and bool((tokens[1:] > tokens[:-1]).all())
    is_sound = is_sound and stand_ins.min() >= 0 and stand_ins.max() < n
    if not is_sound or not np.array_equal(stand_ins[tokens], np.arange(n)):
        raise ModelError(
            f"damaged heads: {path} expected ascending step35.draft.tokens and a stand-in for each token of the model, "
            f"got {n} and {n_model} values that don't fit; make it again with convert-step35 mtp trim"
        )
    return DraftVocabulary(tokens, stand_ins, digest)
