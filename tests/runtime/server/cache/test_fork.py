"""A prefix shared between sessions: the same text as alone, cells counted once, and the ring never fills up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_native import Script, loader
from session_logits import FLOAT_NOISE, GREEDY, engine, fresh_logits, logits_after, text_tokens
from step35.engine.decode_loop import begin, generate
from step35.engine.engine import Engine
from step35.errors import SettingsError
from step35.options import EngineOptions
from step35.sampling.token_chooser import Chooser


def test_a_fork_gives_the_logits_of_a_fresh_session():
    with engine(n_sessions=3) as e, e.open_session() as source, e.open_session() as target:
        prefix = text_tokens(e, 600)
        logits_after(source, prefix[:-1])
        source.checkpoint()
        logits_after(source, prefix + text_tokens(e, 300, seed=1))
        target.fork(source, 599)
        prompt = prefix + text_tokens(e, 50, seed=2)
        logits, n_reused = logits_after(target, prompt)
        assert n_reused == 599
        assert np.abs(logits - fresh_logits(e, prompt)).max() < FLOAT_NOISE


def test_a_ring_of_forks_has_room_for_all_of_them():
    """Shared ring cells are never taken back: six forks of one prefix would fill the ring."""
    with engine(n_sessions=6, n_ctx=4096) as e:
        sessions = [e.open_session() for _ in range(6)]
        prefix = text_tokens(e, 200)
        logits_after(sessions[0], prefix)
        for session in sessions[1:]:
            session.fork(sessions[0], 200)
        prompts = [prefix + text_tokens(e, 400, seed=i) for i in range(6)]
        logits = [logits_after(session, prompt)[0] for session, prompt in zip(sessions, prompts, strict=True)]
        for session in sessions[:5]:
            session.close()
        assert np.abs(logits[5] - fresh_logits(e, prompts[5])).max() < FLOAT_NOISE


def fake_engine(**options: Any) -> Engine:
    defaults: dict[str, Any] = {"draft": "2", "n_ctx": 200, "n_batch": 16, "n_sessions": 4}
    return Engine(EngineOptions(Path("fake"), **defaults | options), loading=loader(Script()))


def run(session, prompt, n=4):
    return list(generate(begin(session, prompt, Chooser(GREEDY), n, lambda n_cached: (len(prompt) - 1,))))


def test_shared_cells_count_once():
    with fake_engine() as e:
        a, b, c = (e.open_session() for _ in range(3))
        run(a, list(range(2, 42)), 1)
        assert e.n_free_cells == 160
        b.fork(a, 39)
        assert e.n_free_cells == 160
        run(b, [*range(2, 41), 9, 9, 9], 1)
        assert e.n_free_cells == 157
        c.fork(b, 39)
        run(a, [*range(2, 22), 7, 7], 1)
        assert e.n_free_cells == 200 - 39 - 3 - 22  # the window was lost: all decoded anew
        b.close()
        c.close()
        assert e.n_free_cells == 200 - 22


def test_a_fork_generates_what_a_cold_session_does():
    with fake_engine() as e:
        a, b, cold = (e.open_session() for _ in range(3))
        prefix = list(range(2, 42))
        run(a, [*prefix, 5])
        b.fork(a, 40)
        prompt = [*prefix, 11, 12, 13]
        assert run(b, prompt, 12) == run(cold, prompt, 12)
        assert run(a, [*prefix, 5, 6, 7], 6) == run(b, [*prefix, 5, 6, 7], 6)


def test_a_fork_needs_a_checkpoint_or_the_end():
    with fake_engine() as e:
        a, b = e.open_session(), e.open_session()
        run(a, list(range(2, 42)), 1)
        with pytest.raises(SettingsError, match=r"expected one of \[39, 40\] tokens, got 20"):
            b.fork(a, 20)


def test_a_full_store_keeps_the_first_checkpoint_and_the_latest():
    with fake_engine(n_checkpoints=3) as e, e.open_session() as a:
        list(generate(begin(a, list(range(2, 42)), Chooser(GREEDY), 1, lambda n_cached: (5, 10, 15, 20, 25))))
        assert a.checkpoints == (5, 20, 25)
