"""Choosing a token: truncation, temperature and noise keyed by (seed, position). Pure maths.

The token at a position is argmax(log p + Gumbel noise) over the truncated target distribution, which is a draw from
it (the Gumbel-max trick; Maddison et al. 2014, https://arxiv.org/abs/1411.0030). The noise depends only on the seed,
the position and the token, so the text doesn't depend on how the position was reached: drafted or not, alone or in a
batch. A draft that is chosen with the same noise agrees with the target far more often than a greedy one.

Truncation follows llama.cpp's order: bias, penalties, top_k, top_p, min_p, then temperature.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from step35.errors import SettingsError

LEAST_TEMPERATURE = 1e-6  # below it only equal scores could be told apart, and scores become infinite
MOST_BIAS = 1e6
DRAFT_MIN_P = 1e-4  # a draft needs no tail: tokens this far below the best are left out
LEAST_WEIGHTS = (1e-2, 1e-3, 1e-4)  # beside the heaviest: how far down a nucleus is looked for, before all is sorted
BLOCK = 64
FEW = 128  # scores whose noise costs less than a look at which of them matter
UNLIKELY = 8.0  # a score this far below the best (e^-8) wins by extraordinary noise only
ROUNDING = 2**12  # of a float64 beside 64 bits


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, top_k 0 and top_p 1 truncate nothing, a bias of -inf forbids."""

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 2**31)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("seed", self.seed, 0, 2**64 - 1)
        _check("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("penalty_last_n", self.penalty_last_n, 0, 2**31)
        for bias in self.logit_bias.values():
            _check("logit_bias", bias, -math.inf, MOST_BIAS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        return bool(self.logit_bias) or self.penalizes

    @property
    def penalizes(self) -> bool:
        return self.repeat_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingsError(f"bad sampling value: {name} expected {low} to {high}, got {value}")


def adjust(logits: np.ndarray, sampling: Sampling, history: Sequence[int]) -> np.ndarray:
    """Returns logits with the bias and the penalties of the last tokens of `history` applied."""
    if not sampling.changes_logits:
        return logits
    adjusted = logits.copy()
    for token, bias in sampling.logit_bias.items():
        adjusted[token] += bias
    if sampling.penalizes and sampling.penalty_last_n:
        _penalize(adjusted, sampling, Counter(history[-sampling.penalty_last_n :]))
    return adjusted


def _penalize(logits: np.ndarray, sampling: Sampling, counts: Mapping[int, int]) -> None:
    """Repeat penalty as in CTRL (https://arxiv.org/abs/1909.05858, section 4.1); the other two as in OpenAI's API."""
    ids = np.fromiter(counts, np.int64, len(counts))
    n = np.fromiter(counts.values(), np.float32, len(counts))
    values = logits[ids]
    values = np.where(values > 0, values / sampling.repeat_penalty, values * sampling.repeat_penalty)
    logits[ids] = values - n * sampling.frequency_penalty - sampling.presence_penalty


def truncate(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Returns the token ids that top_k, top_p and min_p leave; at least the best one."""
    cuts = []
    if 0 < sampling.top_k < len(logits):
        cuts.append(lambda values: _top_k(values, sampling.top_k))
    if sampling.top_p < 1:
        cuts.append(lambda values: _nucleus(values, sampling.top_p))
    if sampling.min_p > 0:
        cuts.append(lambda values: np.flatnonzero(values >= values.max() + np.log(sampling.min_p)))
    if not cuts:
        return np.flatnonzero(logits > -np.inf)
    ids = cuts[0](logits)
    for cut in cuts[1:]:
        ids = ids[cut(logits[ids])]
    return ids[logits[ids] > -np.inf]


def _top_k(values: np.ndarray, k: int) -> np.ndarray:
    leaders = _leaders(values, k)
    return leaders[np.argpartition(values[leaders], -k)[-k:]]


def _nucleus(values: np.ndarray, top_p: float) -> np.ndarray:
    """Returns the smallest set of most probable indices whose probability reaches `top_p`.

    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    weights = np.exp(values - values.max())
    wanted = top_p * float(weights.sum(dtype=np.float64))
    likely = _enough(weights, wanted)
    likely = likely[np.argsort(-weights[likely], kind="stable")]
    reached = np.cumsum(weights[likely], dtype=np.float64)
    return likely[: int(np.searchsorted(reached, wanted)) + 1]


def _enough(weights: np.ndarray, wanted: float) -> np.ndarray:
    """Returns indices of the heaviest weights, together more than `wanted`; few if few will do, to be sorted fast."""
    for least in LEAST_WEIGHTS:
        heaviest = (weights > least).nonzero()[0]
        if weights[heaviest].sum(dtype=np.float64) > wanted:
            return heaviest
    return np.arange(len(weights))


def _leaders(values: np.ndarray, k: int) -> np.ndarray:
    """Returns indices of all values that may be among the k largest: at least k, usually not many more.

    k blocks have a maximum of at least the k-th largest maximum, so no smaller value is needed.
    """
    n_blocks = len(values) // BLOCK
    if n_blocks <= k:
        return np.arange(len(values))
    maxima = values[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).max(axis=1)
    return np.flatnonzero(values >= np.partition(maxima, -k)[-k])


_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_11, _27, _30, _31 = map(np.uint64, (11, 27, 30, 31))
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def gumbel(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Returns Gumbel noise (len(ids),) float64, a function of seed, position and token alone."""
    return _noise(_bits(seed, position, _spread(ids)))


def _noise(bits: np.ndarray) -> np.ndarray:
    uniform = ((bits >> _11).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def _bits(seed: int, position: int, spread: np.ndarray) -> np.ndarray:
    """Returns random bits (len(spread),) uint64: splitmix64 (Steele, Lea, Flood 2014), keyed by seed and position."""
    key = _mix(_mix(seed & _MASK) + (position + 1) * _GOLDEN & _MASK)
    x = spread + np.uint64(key)
    shifted = x >> _30  # one array for all shifts: a new megabyte costs more than what is done with it
    x ^= shifted
    x *= _FIRST
    x ^= np.right_shift(x, _27, out=shifted)
    x *= _SECOND
    x ^= np.right_shift(x, _31, out=shifted)
    return x


def _spread(ids: np.ndarray) -> np.ndarray:
    """Returns what token ids add to the key."""
    return ids.astype(np.uint64) * np.uint64(_GOLDEN)


@lru_cache(maxsize=2)
def _spread_all(n_vocab: int) -> np.ndarray:
    return _spread(np.arange(n_vocab))


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def choose(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    """Returns the token for a position from its adjusted logits."""
    if sampling.is_greedy:
        return int(logits.argmax())
    spread = _spread_all(len(logits))
    if not sampling.truncates:
        return _best(logits / sampling.temperature, _bits(sampling.seed, position, spread))
    ids = truncate(logits, sampling)
    return int(ids[_best(logits[ids] / sampling.temperature, _bits(sampling.seed, position, spread[ids]))])


def _best(scores: np.ndarray, bits: np.ndarray) -> int:
    """Returns the argmax of scores and noise. Exact, and takes the logarithms of noise that may matter only.

    Below `floor` a score must make up for the distance to the best noised one above it, which takes bits of at
    least `needed`.
    """
    highest = scores.max()
    if len(scores) <= FEW or not math.isfinite(highest):  # what isn't a number wins, as it does without noise
        return int((scores + _noise(bits)).argmax())
    floor = highest - UNLIKELY
    is_likely = scores >= floor
    likely = is_likely.nonzero()[0]
    noised = scores[likely] + _noise(bits[likely])
    best = noised.argmax()
    needed = int(math.exp(-math.exp(floor - noised[best])) * 2**64) - ROUNDING
    able = (is_likely | (bits >= np.uint64(max(0, needed)))).nonzero()[0]
    if len(able) > len(likely):
        likely, best = able, (scores[able] + _noise(bits[able])).argmax()
    return int(likely[best])


def choose_with_margin(
    logits: np.ndarray, sampling: Sampling, position: int, names: np.ndarray | None = None
) -> tuple[int, float]:
    """Returns a draft for a position, and the distance of the two best (noised) scores.

    `names` has the token ids where they aren't the places in `logits`.
    """
    ids = np.flatnonzero(logits >= logits.max() + np.log(DRAFT_MIN_P) * max(sampling.temperature, 1.0))
    scores = logits[ids].astype(np.float64)
    if not sampling.is_greedy:
        kept = truncate(scores, sampling)
        ids = ids[kept]
        tokens = ids if names is None else names[ids]
        scores = scores[kept] / sampling.temperature + gumbel(sampling.seed, position, tokens)
    best = int(scores.argmax())
    lead, scores[best] = float(scores[best]), -np.inf
    return int(ids[best] if names is None else names[ids[best]]), lead - float(scores.max())


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax, float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
