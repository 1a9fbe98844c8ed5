"""A conversation on one session: nothing that was decoded is decoded again, and a saved one goes on as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from real_engine import open_engine
from step35.chat.dialogue import Dialogue, Reply
from step35.chat.messages import Message
from step35.chat.session_file import read_session, write_session
from step35.engine.engine import Engine
from step35.errors import Cancelled, ContextFull, ModelError, SettingsError, Step35Error
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling
from tiny_model import tiny_gguf

GREEDY = Sampling(temperature=0)
QUESTIONS = ("Hello!", "What is the capital of France?", "Write a Python function that adds two numbers.", "Thanks.")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine(
        EngineOptions(tiny_gguf(), draft="2", n_ctx=2048, n_batch=64, n_threads=1, n_sessions=2)
    ) as engine:
        yield engine


@pytest.fixture
def dialogue(engine: Engine) -> Iterator[Dialogue]:
    with engine.open_session() as session:
        yield Dialogue(session, GREEDY)


def answer(dialogue: Dialogue, question: str, n_most: int = 1000) -> tuple[Reply, str]:
    """Asks, and keeps what is said: all of it, or so many pieces of it."""
    reply, text = dialogue.ask(question), ""
    for n, piece in enumerate(reply, 1):
        text += piece
        if n == n_most:
            break
    dialogue.keep(reply)
    return reply, text


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=5)])
def test_every_decoded_token_of_the_history_is_reused(engine: Engine, sampling: Sampling) -> None:
    """The third turn decoded the second's answer again: the template drops the reasoning of older turns."""
    with engine.open_session() as session:
        dialogue = Dialogue(session, sampling)
        for question in QUESTIONS:
            n_decoded = session.n_past
            reply, _ = answer(dialogue, question)
            assert reply.turn.stats.n_reused == n_decoded
            assert reply.prompt.n_known == len(reply.prompt.turns)
            assert session.n_past >= len(session.tokens) - 1, "but for the last token, everything was decoded"


def test_reasoning_and_content_are_told_apart(dialogue: Dialogue) -> None:
    reply = dialogue.ask(QUESTIONS[0])
    assert reply.in_reasoning
    text = "".join(reply)
    assert not reply.in_reasoning
    dialogue.keep(reply)
    question, message = dialogue.messages
    reasoning, _, content = text.partition("\n</think>\n")
    assert (question, message) == (Message("user", QUESTIONS[0]), Message("assistant", content, reasoning))


def test_until_it_is_kept_a_reply_changes_nothing(dialogue: Dialogue) -> None:
    answer(dialogue, QUESTIONS[0])
    messages = dialogue.messages
    list(dialogue.ask("Never mind."))
    assert dialogue.messages == messages
    with pytest.raises(ContextFull, match="prompt too long"):
        dialogue.ask("a b " * 2000)
    reply, _ = answer(dialogue, QUESTIONS[1])
    assert dialogue.messages == (*messages, *dialogue.messages[2:]) and len(dialogue.messages) == 4
    assert reply.prompt.n_known == 1


@pytest.mark.parametrize("n_pieces", [1, 6])
def test_an_answer_that_was_stopped_keeps_what_was_said(dialogue: Dialogue, n_pieces: int) -> None:
    answer(dialogue, QUESTIONS[0])
    reply, text = dialogue.ask(QUESTIONS[1]), ""
    with pytest.raises(Cancelled):
        for n, piece in enumerate(reply, 1):
            text += piece
            if n == n_pieces:
                dialogue.session.engine.cancel()
    dialogue.keep(reply)
    said = dialogue.messages[-1]
    assert (said.reasoning or said.content) and text.startswith(said.reasoning or "")
    n_decoded = dialogue.session.n_past
    reply, _ = answer(dialogue, QUESTIONS[2])
    assert reply.turn.stats.n_reused == n_decoded


def test_an_answer_that_was_left_in_the_middle_of_a_step_keeps_what_was_shown(dialogue: Dialogue) -> None:
    _, shown = answer(dialogue, QUESTIONS[1], n_most=3)
    assert dialogue.messages[-1].reasoning == shown
    reply, _ = answer(dialogue, QUESTIONS[2])
    assert reply.prompt.n_known == 1


def test_a_saved_conversation_goes_on_as_it_would_have(engine: Engine, dialogue: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    for question in QUESTIONS[:2]:
        answer(dialogue, question)
    dialogue.save(path)
    n_decoded, messages = dialogue.session.n_past, dialogue.messages
    _, wanted = answer(dialogue, QUESTIONS[2])
    with engine.open_session() as session:
        other = Dialogue(session, GREEDY)
        other.load(path)
        assert other.messages == messages and session.n_past == n_decoded
        reply, text = answer(other, QUESTIONS[2])
        assert (text, reply.turn.stats.n_reused, reply.prompt.n_known) == (wanted, n_decoded, 2)
    dialogue.reset()
    assert dialogue.messages == () and dialogue.session.tokens == []
    dialogue.load(path)
    assert dialogue.messages == messages


def test_a_conversation_without_a_token_is_not_saved(dialogue: Dialogue, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to save"):
        dialogue.save(tmp_path / "talk")
    assert not list(tmp_path.iterdir())


def refused(dialogue: Dialogue, path: Path, error: type[Step35Error], match: str) -> None:
    """The file is refused in one line, and the conversation is what it was."""
    messages, tokens, n_past = dialogue.messages, list(dialogue.session.tokens), dialogue.session.n_past
    with pytest.raises(error, match=match) as caught:
        dialogue.load(path)
    assert "\n" not in str(caught.value)
    assert (dialogue.messages, dialogue.session.tokens, dialogue.session.n_past) == (messages, tokens, n_past)


def test_what_can_t_be_loaded_changes_nothing(dialogue: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    answer(dialogue, QUESTIONS[0])
    dialogue.save(path)
    whole, saved, snapshot = path.read_bytes(), read_session(path), dialogue.session.snapshot()
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        refused(dialogue, path, Step35Error, "session")
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
        refused(dialogue, path, Step35Error, "session")
    write_session(path, saved.key, snapshot, saved.turns, 0)
    refused(dialogue, path, ModelError, r"not a saved chat: .* a session of step35 serve")
    write_session(path, {**saved.key, "kv_type": "q8_0"}, snapshot, saved.turns, 0, dialogue.messages)
    refused(dialogue, path, ModelError, r"saved with another kv_type: .* expected f16, got q8_0")
    write_session(path, {**saved.key, "model": "0"}, snapshot, saved.turns, 0, dialogue.messages)
    refused(dialogue, path, ModelError, "saved with another model")
    path.write_bytes(whole)
    dialogue.load(path)
