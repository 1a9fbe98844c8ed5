"""Prompts keep the ids of known turns, whatever the client and the template make of them."""

import dataclasses
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from real_engine import open_engine
from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.chat.prompt_builder import Prompt, PromptBuilder, TokenCache
from step35.chat.sampled_turns import KnownTurn, TurnMap, known_turn
from step35.chat.template import ChatTemplate
from step35.engine.prefix import common_prefix
from step35.native.long_runs import cut_long_runs
from step35.options import EngineOptions
from tiny_model import tiny_gguf

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>")
TEMPLATE = ChatTemplate((checkpoints.BUNDLED / "chat_template.jinja").read_text(encoding="utf-8"), "<s>", "</s>")


def tokenize(text: str) -> list[int]:
    """Characters as tokens, special texts as one each: what is cut at a special token stays the same."""
    tokens, at = [], 0
    while at < len(text):
        special = next((i for i, word in enumerate(SPECIAL) if text.startswith(word, at)), None)
        tokens.append(ord(text[at]) + 10 if special is None else special)
        at += 1 if special is None else len(SPECIAL[special])
    return tokens


def text_of(tokens) -> str:
    return "".join(SPECIAL[t] if t < len(SPECIAL) else chr(t - 10) for t in tokens)


def builder() -> PromptBuilder:
    return PromptBuilder(tokenize, TurnMap(), start_token=0)


def user(text: str) -> Message:
    return Message("user", text)


def answered(b: PromptBuilder, messages: list[Message], sampled: str, message: Message):
    """Builds the prompt of messages, answers it with a sampled text, and returns the next prompt's beginning."""
    prompt = b.build(Conversation(tuple(messages)), TEMPLATE.render)
    ids = [*prompt.tokens[prompt.answer_start :], *tokenize(sampled)]
    b.turns.add(known_turn(prompt.tokens[: prompt.answer_start], ids, message))
    return [*prompt.tokens, *tokenize(sampled)]


def test_without_known_turns_a_prompt_is_what_the_template_says():
    call = ToolCall("call_1", "ls", '{"path": "/"}')
    conversation = Conversation(
        (
            Message("system", "Be brief."), user("Hi"), Message("assistant", "Hello"), user("List"),
            Message("assistant", "", "think", (call,)), Message("tool", "a b", tool_call_id="call_1"),
        ),
        (Tool("ls", "lists", {"type": "object"}),),
    )  # fmt: skip
    prompt = builder().build(conversation, TEMPLATE.render)
    assert text_of(prompt.tokens) == TEMPLATE.render(conversation)
    assert len(prompt.turns) == 2 and prompt.n_known == 0 and prompt.opens_reasoning
    assert text_of(prompt.tokens[prompt.answer_start :]) == "<|im_start|>assistant\n<think>\n"
    assert text_of(prompt.tokens[prompt.last_start :]).startswith("<|im_start|>tool_response")
    assert set(prompt.checkpoint_positions) == {prompt.starts[1], prompt.last_start}


@pytest.mark.parametrize(
    ("starts", "n_cached", "checkpoint_positions"),
    [
        ((0, 500, 700, 900), 0, (500, 700)),
        ((0, 500, 520, 900), 0, (500,)),
        ((0, 500, 940, 960), 930, ()),
        ((0, 500, 940, 960), 480, (500, 940)),
        ((0, 500, 800, 960), 600, (800,)),
    ],
)
def test_a_mark_close_behind_a_checkpoint_is_not_worth_a_decode(starts, n_cached, checkpoint_positions):
    """A short message took three decodes in every turn, one of them for the five tokens before the answer."""
    assert Prompt([0] * 1000, starts).checkpoints_after(n_cached) == checkpoint_positions


@pytest.mark.parametrize("reasoning", [None, "", "why\n", " why"])
def test_a_sampled_turn_keeps_its_ids_with_its_reasoning_or_without(reasoning):
    b = builder()
    messages = [user("Hi")]
    ours = Message("assistant", "Hello", "why")
    past = answered(b, messages, "why \n\n</think>\n\nHello ", ours)
    back = [*messages, Message("assistant", "Hello", reasoning), user("More")]
    prompt = b.build(Conversation(tuple(back)), TEMPLATE.render)
    assert prompt.tokens[: len(past)] == past
    assert (
        text_of(prompt.tokens[len(past) :])
        == "<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert prompt.n_known == 1


def test_a_call_spelt_otherwise_is_the_same_call_and_an_edited_one_is_not():
    b = builder()
    messages = [user("List")]
    ours = Message("assistant", "", "r", (ToolCall("call_7", "ls", '{"path":"/","deep":1}'),))
    past = answered(b, messages, "r</think><tool_call>odd</tool_call>", ours)
    for arguments, is_known in (('{"deep": 1, "path": "\\u002f"}', True), ('{"path": "/etc", "deep": 1}', False)):
        back = [*messages, Message("assistant", "", None, (ToolCall("call_7", "ls", arguments),)), Message("tool", "x")]
        prompt = b.build(Conversation(tuple(back)), TEMPLATE.render)
        assert (prompt.tokens[: len(past)] == past) == is_known


def test_another_conversation_with_the_same_answer_gets_no_foreign_reasoning():
    b = builder()
    answered(b, [user("secret")], "the secret is 7</think>Done.", Message("assistant", "Done.", "the secret is 7"))
    prompt = b.build(Conversation((user("other"), Message("assistant", "Done."), user("go on"))), TEMPLATE.render)
    assert "secret" not in text_of(prompt.tokens)


def test_a_foreign_history_is_rendered_once_and_stays():
    """The template drops reasoning of older turns: rendered anew, the second prompt would part at the first turn."""
    b = builder()
    history = [user("a"), Message("assistant", "", "why", (ToolCall("c1", "f", "{}"),)), Message("tool", "r")]
    first = b.build(Conversation(tuple(history)), TEMPLATE.render)
    history += [Message("assistant", "done", "so"), user("b")]
    second = b.build(Conversation(tuple(history)), TEMPLATE.render)
    assert "why" in text_of(first.tokens)
    assert second.tokens[: first.answer_start] == first.tokens[: first.answer_start]
    assert b.build(Conversation(tuple(history)), TEMPLATE.render, exact=False).tokens != second.tokens


def test_a_changing_billing_line_changes_nothing():
    b = builder()
    texts = [f"x-anthropic-billing-header: cc_version=2.1; cch={c};\nYou are an agent." for c in ("0a1b2", "ffff0")]
    prompts = [b.build(Conversation((Message("system", text), user("Hi"))), TEMPLATE.render).tokens for text in texts]
    assert prompts[0] == prompts[1]
    assert "billing" not in text_of(prompts[0])


@given(
    st.lists(
        st.tuples(st.text(max_size=6), st.text(max_size=6), st.none() | st.text(max_size=4)), min_size=1, max_size=5
    )
)
def test_any_history_grows_by_its_end_only(turns):
    b, messages, past = builder(), [], []
    for question, answer, reasoning in turns:
        messages.append(user(question))
        prompt = b.build(Conversation(tuple(messages)), TEMPLATE.render)
        assert prompt.tokens[: len(past)] == past
        past = answered(b, messages, f"{reasoning}</think>{answer}", Message("assistant", answer, reasoning))
        messages.append(Message("assistant", answer, reasoning and reasoning + " "))


def test_turns_survive_json_and_old_ones_go_first():
    turns = TurnMap(max_tokens=10)
    old = known_turn([1], [2] * 6, Message("assistant", "x", "y", (ToolCall("i", "n", "{}"),)))
    assert KnownTurn.from_data(old.as_data()) == old
    turns.add(dataclasses.replace(old, message=Message("assistant", "x")))
    turns.add(known_turn([3], [4] * 6, Message("assistant", "z")))
    assert len(turns) == 1 and turns.find(known_turn([3], [], Message("assistant")).before, Message("assistant", "z"))


@given(st.lists(st.tuples(st.sampled_from(["a", "é", " ", "=", "本", "\n"]), st.integers(1, 40)), max_size=8))
def test_only_long_runs_are_cut_and_never_in_a_character(parts):
    text = "".join(letter * n for letter, n in parts).encode()
    pieces = cut_long_runs(text, 16)
    assert b"".join(pieces) == text
    assert all(piece.decode() is not None for piece in pieces)
    if all(n * len(letter.encode()) <= 5 for letter, n in parts) and len(parts) < 3:
        assert len(pieces) == 1


def test_a_run_is_cut_at_its_longest():
    assert [len(piece) for piece in cut_long_runs(b"ab " + b"x" * 40 + b" c", 16)] == [19, 16, 10]
    assert cut_long_runs(b"ab " * 40, 16) == [b"ab " * 40]


@given(st.lists(st.sampled_from([*SPECIAL, "user\n", "hello", " ", "\n", "<|im_", "start|>"]), max_size=30))
def test_a_text_has_the_same_tokens_message_by_message(parts: list[str]):
    text = "".join(parts)
    cached = TokenCache(tokenize)
    assert cached(text) == tokenize(text) == cached(text)


def test_a_history_is_tokenized_once():
    """Every turn of an agent tokenized its whole history anew: 20 ms for 10 000 tokens, before the first was decoded."""
    seen: list[str] = []
    cached = TokenCache(lambda text: seen.append(text) or tokenize(text), max_chars=70)
    first, second = "<|im_start|>user\nhello<|im_end|>\n", "<|im_start|>user\nbye<|im_end|>\n"
    for text in (first, first + second, first + second):
        assert cached(text) == tokenize(text)
    assert seen == [first, second]
    for text in ("x" * 30, second, first):
        cached(text)
    assert seen == [first, second, "x" * 30, first], "what was used longest ago goes"
    assert cached("y" * 100) == tokenize("y" * 100), "too long to be kept"


def test_the_models_own_tokens_are_the_same_message_by_message():
    contents = ("Be brief. ☃\n\n", "<|im_start|>Hi  <think>", "x" * 300, " \n\n a\n")
    text = TEMPLATE.render(Conversation(tuple(map(user, contents))))
    with open_engine(EngineOptions(tiny_gguf(), draft="off", n_ctx=64, n_threads=1)) as engine:
        whole = partial(engine.tokenize, add_bos=False)
        assert TokenCache(whole)(text) == whole(text)


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_the_common_prefix_is_the_longest(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
