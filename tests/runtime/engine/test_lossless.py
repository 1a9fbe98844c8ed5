"""Drafting changes nothing: the text equals plain decoding, token for token, on the bundled model.

Batches of another shape add up in another order, so two nearly equal scores may change places, or a
token at the edge of the truncation may fall out. Such a first difference is allowed only
- where a fresh plain decode shows the two tokens' (noised) scores, or the edge, within float noise;
- where the fresh plain decode of this one session gives the drafted token: it is the plain run of twenty
  sequences that went astray;
- where the reference shows a router's two best scores nearly equal just before, which is more than noise.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from checkpoints import BUNDLED
from real_engine import open_engine
from reference.checkpoint import load_checkpoint
from reference.model import MoE, Step35
from step35.engine.decode_loop import begin, step
from step35.engine.turn import Turn
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling, gumbel, truncate
from step35.sampling.token_chooser import Chooser
from tiny_model import tiny_gguf

N_PROMPTS, N_PREDICT = 20, 512
FLOAT_NOISE = 2e-2  # llama.cpp's logits lie up to 0.011 from the reference's on these texts, in F32
ROUTER_TIE, ROUTER_TIE_ROWS = 5e-4, 4
"""A router's choice this close has been seen to flip, and moved three rows' logits by 0.17 to 0.04."""
GREEDY = Sampling(temperature=0)


def sampling_of(i: int) -> Sampling:
    """Every other prompt is greedy; the others cover what sampling can do."""
    return [
        GREEDY,
        Sampling(temperature=1.0, top_p=1.0, seed=i),
        GREEDY,
        Sampling(temperature=0.8, top_p=0.95, min_p=0.02, top_k=50, seed=i, repeat_penalty=1.1),
    ][i % 4]


@cache
def prompts() -> list[list[int]]:
    """Pieces of a source file that a pinned dependency ships, of unequal length."""
    source = Path(gguf.quants.__file__).read_text(encoding="utf-8")
    with open_engine(EngineOptions(tiny_gguf(), draft="off", n_ctx=64, n_threads=1)) as engine:
        tokens = engine.tokenize(source)
    return [tokens[700 * i : 700 * i + 20 + 9 * i] for i in range(N_PROMPTS)]


def even_clock() -> Callable[[], float]:
    """Returns a clock by which every decode takes one millisecond, whatever its width."""
    return partial(next, count(0.0, 1e-3))


def run(draft: str, model: Path | None = None) -> tuple[list[list[int]], list[Turn]]:
    """Generates from all prompts at once, one batch a step."""
    options = EngineOptions(model or tiny_gguf("F32"), None, draft, 16384, 256, N_PROMPTS, n_threads=1, kv_type="f32")
    clock = even_clock() if draft == "ngram" else time.perf_counter  # a busy machine must not decide what is looked up
    with open_engine(options, clock) as engine:
        turns = [
            begin(engine.open_session(), prompt, Chooser(sampling_of(i)), N_PREDICT)
            for i, prompt in enumerate(prompts())
        ]
        while live := [turn for turn in turns if turn.finish is None]:
            step(engine, live)
        return [turn.generated for turn in turns], turns


@cache
def plain() -> list[list[int]]:
    return run("off")[0]


def assert_same_text(texts: list[list[int]]) -> None:
    for i, (wanted, got) in enumerate(zip(plain(), texts, strict=True)):
        if wanted != got:
            n = next(n for n, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b)
            assert is_tie(i, wanted[:n], [wanted[n], got[n]]), f"prompt {i} differs at token {n}"


def is_tie(i: int, text: list[int], tokens: list[int]) -> bool:
    """Whether two tokens' scores, or the edge of the truncation, lie within float noise after a text."""
    sampling, (logits, chosen) = sampling_of(i), plain_choice(i, text)
    if chosen == tokens[1] or is_router_tie(prompts()[i] + text):
        return True
    if sampling.temperature == 0:
        return abs(float(np.diff(logits[tokens])[0])) < FLOAT_NOISE
    if any(is_on_edge(logits, sampling, token) for token in tokens):
        return True
    ids = np.array(tokens)
    noise = gumbel(sampling.seed, len(prompts()[i]) + len(text), ids)
    return abs(float(np.diff(logits[ids] / sampling.temperature + noise)[0])) < FLOAT_NOISE


def is_on_edge(logits: np.ndarray, sampling: Sampling, token: int) -> bool:
    """Whether a token is inside or outside of the truncation by float noise."""
    top_p, min_p = sampling.top_p, sampling.min_p
    tight = replace(sampling, top_p=top_p * (1 - FLOAT_NOISE), min_p=min_p * (1 + FLOAT_NOISE))
    loose = replace(sampling, top_p=min(1.0, top_p * (1 + FLOAT_NOISE)), min_p=min_p * (1 - FLOAT_NOISE))
    return (token in truncate(logits, loose)) != (token in truncate(logits, tight))


@cache
def reference() -> Step35:
    return load_checkpoint(BUNDLED)


def is_router_tie(tokens: list[int]) -> bool:
    """Whether in the last rows the scores of the last expert chosen and the first left out nearly agree."""
    gaps: list[torch.Tensor] = []

    def measure(moe: MoE, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        scores = torch.sigmoid(inputs[0][0, -ROUTER_TIE_ROWS:] @ moe.gate.weight.T) + moe.router_bias
        best = scores.topk(moe.top_k + 1).values
        gaps.append(best[:, -2] - best[:, -1])

    model = reference()
    hooks = [moe.register_forward_hook(measure) for moe in model.modules() if isinstance(moe, MoE)]
    with torch.no_grad():
        model.trunk(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return bool(torch.cat(gaps).min() < ROUTER_TIE)


def plain_choice(i: int, text: list[int]) -> tuple[np.ndarray, int]:
    """The adjusted logits after a text, and the token chosen, in a plain decode of one session."""
    options = EngineOptions(tiny_gguf("F32"), None, "off", 2048, 256, n_threads=1, kv_type="f32")
    seen: list[np.ndarray] = []

    def spy(history: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(logits.copy())
        return logits

    with open_engine(options) as engine, engine.open_session() as session:
        turn = begin(session, prompts()[i] + text, Chooser(sampling_of(i), process=spy), 1)
        while turn.finish is None:
            step(engine, [turn])
        return seen[0], turn.session.tokens[-1]


@pytest.mark.parametrize("draft", ["1", "2", "3", "ngram", "auto"])
def test_text_equals_plain_decoding(draft):
    texts, turns = run(draft)
    assert_same_text(texts)
    n_accepted = sum(turn.stats.n_accepted for turn in turns)
    assert n_accepted > 100 or draft == "auto"
    assert max(len(text) for text in texts) == N_PREDICT


def test_wrecked_heads_cost_speed_and_nothing_else(tmp_path):
    """All heads' projections rolled by half: drafts become nonsense, the text stays."""
    wrecked = tmp_path / "wrecked.gguf"
    wrecked.write_bytes(tiny_gguf("F32").read_bytes())
    _wreck(wrecked)
    texts, turns = run("2", wrecked)
    assert_same_text(texts)
    assert sum(t.stats.n_accepted for t in turns) < 0.1 * sum(t.stats.n_drafted for t in turns)


def _wreck(path: Path) -> None:
    reader = GGUFReader(path)
    spans = [(t.data_offset, t.n_bytes) for t in reader.tensors if t.name.endswith("nextn.shared_head_head.weight")]
    assert len(spans) == 3
    with open(path, "r+b") as file:
        for offset, n_bytes in spans:
            data = np.memmap(path, np.uint8, "r", offset, n_bytes).tobytes()
            half = n_bytes // 2 // 4 * 4
            file.seek(offset)
            file.write(data[half:] + data[:half])


def test_the_same_seed_repeats_and_another_doesnt():
    with open_engine(EngineOptions(tiny_gguf(), draft="3", n_ctx=512, n_threads=1)) as engine:
        texts = []
        for seed in (5, 5, 6):
            with engine.open_session() as session:
                turn = begin(session, prompts()[3], Chooser(Sampling(1.0, top_p=1.0, seed=seed)), 48)
                while turn.finish is None:
                    step(engine, [turn])
                texts.append(turn.generated)
    assert texts[0] == texts[1] != texts[2]
