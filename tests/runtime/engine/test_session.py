"""Sessions on the bundled model: whatever is reused, the logits are those of a fresh session."""

import numpy as np
import pytest

from real_engine import open_engine
from session_logits import FLOAT_NOISE, GREEDY, engine, fresh_logits, logits_after, text_tokens
from step35.engine.decode_loop import begin, generate, step
from step35.engine.engine import Engine
from step35.errors import ContextFull, ModelError, SettingsError
from step35.options import EngineOptions
from step35.sampling.token_chooser import Chooser
from tiny_model import tiny_gguf


@pytest.mark.parametrize("n_keep", [10, 150, 299, 420, 560, 599])
def test_a_rewind_never_attends_to_lost_cells(n_keep):
    """The ring holds 256 cells: rewinds on either side of its end, and of a checkpoint at 300."""
    with engine(n_sessions=2, n_batch=32) as e:
        tokens = text_tokens(e, 600)
        with e.open_session() as session:
            logits_after(session, tokens[:301])
            session.rewind(300)
            session.tokens = tokens[:300]
            session.checkpoint()
            logits_after(session, tokens)
            prompt = tokens[:n_keep] + text_tokens(e, 5, seed=1)
            logits, n_reused = logits_after(session, prompt)
        assert n_reused in (n_keep, 300, 0)
        assert n_reused <= n_keep
        if n_keep >= 560:
            assert n_reused == n_keep
        assert np.abs(logits - fresh_logits(e, prompt)).max() < FLOAT_NOISE


def test_without_the_guard_the_lost_cells_would_show():
    """The same rewind, done blindly: llama.cpp attends to what is left, without a word."""
    with engine(n_sessions=2) as e:
        tokens = text_tokens(e, 600)
        with e.open_session() as session:
            logits_after(session, tokens)
            prompt = tokens[:150] + text_tokens(e, 5, seed=1)
            e.trunk.truncate(session.seq, 150)
            session.tokens, session.n_past = prompt, 150
            turn = begin(session, prompt[:-1], Chooser(GREEDY), 1)
            session.n_past = 150
            e.trunk.truncate(session.seq, 150)
            step(e, [turn])
            logits = e.trunk.logits()[-1].copy()
        assert np.abs(logits - fresh_logits(e, prompt[:-1])).max() > 20 * FLOAT_NOISE


def test_a_longer_prompt_extends_and_a_foreign_one_rebuilds():
    with engine(n_sessions=2) as e, e.open_session() as session:
        tokens = text_tokens(e, 100)
        logits_after(session, tokens)
        longer = tokens + text_tokens(e, 50, seed=2)
        logits, n_reused = logits_after(session, longer)
        assert n_reused == 100
        assert np.abs(logits - fresh_logits(e, longer)).max() < FLOAT_NOISE
        assert logits_after(session, text_tokens(e, 40, seed=3))[1] == 0


def test_the_same_prompt_again_decodes_one_token():
    with engine() as e, e.open_session() as session:
        tokens = text_tokens(e, 100)
        first, _ = logits_after(session, tokens)
        again, n_reused = logits_after(session, tokens)
        assert n_reused == 99
        assert np.abs(first - again).max() < FLOAT_NOISE


def test_a_chat_turn_comes_back_to_the_start_of_the_last_message():
    """The next turn renders the last message anew: the checkpoint before it saves the long prefix."""
    with engine(n_sessions=2) as e, e.open_session() as session:
        assert e.model.turn_start is not None
        head = [*text_tokens(e, 500), e.model.turn_start, 400, 401]
        list(generate(begin(session, head, Chooser(GREEDY), 320)))
        assert session.checkpoints == (500,)
        prompt = [*head[:501], *text_tokens(e, 30, seed=4)]
        logits, n_reused = logits_after(session, prompt)
        assert n_reused == 500
        assert np.abs(logits - fresh_logits(e, prompt)).max() < FLOAT_NOISE


def test_a_snapshot_comes_back_bit_for_bit():
    with engine(n_sessions=2) as e, e.open_session() as session:
        tokens = text_tokens(e, 400)
        logits_after(session, tokens)
        snapshot = session.snapshot()
        wanted, _ = logits_after(session, [*session.tokens, 500])
        logits_after(session, text_tokens(e, 90, seed=5))
        session.restore(snapshot)
        got, n_reused = logits_after(session, [*snapshot.tokens, 500])
        assert n_reused == 400
        assert np.array_equal(wanted, got)
        with e.open_session() as other:
            other.restore(snapshot)
            assert np.array_equal(logits_after(other, [*snapshot.tokens, 500])[0], wanted)


def test_sessions_in_one_batch_get_the_logits_they_get_alone():
    with engine(n_sessions=3, n_batch=64) as e:
        prompts = [text_tokens(e, n, seed=n) for n in (300, 40, 131)]
        turns = [begin(e.open_session(), prompt, Chooser(GREEDY), 8) for prompt in prompts]
        while live := [turn for turn in turns if turn.finish is None]:
            step(e, live)
        together = [turn.generated for turn in turns]
        for turn in turns:
            turn.session.close()
        for prompt, tokens in zip(prompts, together, strict=True):
            with e.open_session() as session:
                assert list(generate(begin(session, prompt, Chooser(GREEDY), 8))) == tokens


def test_limits_are_errors_with_numbers():
    with engine(n_ctx=64) as e, e.open_session() as session:
        with pytest.raises(ContextFull, match="the context holds 64 tokens, got 64"):
            session.sync([1] * 64)
        with pytest.raises(SettingsError, match="empty prompt"):
            session.sync([])
        with pytest.raises(ContextFull, match="all 1 are open"):
            e.open_session()
        with pytest.raises(SettingsError, match="expected 0 to 0 tokens, got 3"):
            session.rewind(3)


def test_a_context_over_the_models_is_refused():
    with pytest.raises(SettingsError, match="n_ctx expected at most 262144"):
        engine(n_ctx=262145)


def test_a_model_file_that_isnt_one_is_refused_in_one_line(tmp_path):
    whole = tiny_gguf().read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    cases = {
        tmp_path / "none.gguf": "no model file",
        cut: "incomplete file: .* download it again",
    }
    for path, message in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            Engine(EngineOptions(path))
        assert "\n" not in str(caught.value)


def test_a_file_of_heads_alone_is_refused_as_the_model():
    with pytest.raises(ModelError, match="holds only MTP heads"):
        Engine(EngineOptions(tiny_gguf(mtp="only")))


def test_heads_from_a_side_file_draft_like_embedded_ones():
    prompt = list(range(400, 440))
    stats = []
    for model, mtp in ((tiny_gguf(), None), (tiny_gguf(mtp="drop"), tiny_gguf(mtp="only"))):
        with (
            open_engine(EngineOptions(model, mtp, draft="3", n_ctx=512, n_threads=1)) as e,
            e.open_session() as session,
        ):
            turn = begin(session, prompt, Chooser(GREEDY), 40)
            stats.append((list(generate(turn)), turn.stats.accepted_per_head))
    assert stats[0] == stats[1]


def patched(tmp_path, source, old: bytes, new: bytes):
    """Returns a copy of a file with the first `old` replaced by `new`, of equal length."""
    data = source.read_bytes()
    assert len(old) == len(new)
    assert old in data
    path = tmp_path / "patched.gguf"
    path.write_bytes(data.replace(old, new, 1))
    return path


def test_a_file_with_some_of_its_heads_is_refused(tmp_path):
    path = patched(tmp_path, tiny_gguf(), b"blk.7.nextn.eh_proj", b"blk.7.nextn.eh_gone")
    with pytest.raises(ModelError, match=r"incomplete MTP heads: .* expected 3 .* got 2"):
        Engine(EngineOptions(path))


def test_a_side_file_with_another_vocabulary_is_refused(tmp_path):
    path = patched(tmp_path, tiny_gguf(mtp="only"), b"return", b"retirn")
    with pytest.raises(ModelError, match=r"the MTP file doesn't belong to the model: .* expected vocab_digest="):
        Engine(EngineOptions(tiny_gguf(mtp="drop"), path, n_ctx=64))


@pytest.mark.parametrize(
    "option", [{"draft": "4"}, {"kv_type": "q2"}, {"load_mode": "x"}, {"n_ctx": 0}, {"n_sessions": 99}]
)
def test_an_unknown_option_value_is_refused_with_what_is_known(option):
    with pytest.raises(SettingsError, match=f"bad option: {next(iter(option))} expected"):
        EngineOptions(tiny_gguf(), **option)
