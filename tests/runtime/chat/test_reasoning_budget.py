"""The budget of reasoning: closed softly where it can be, hard where it must, once a user request."""

from hypothesis import given
from hypothesis import strategies as st

from step35.chat.messages import Conversation, Message
from step35.chat.reasoning_budget import SOFT_SHARE, ReasoningWatch, budget_of, reasoning_so_far, watch
from step35.server.constrained_chooser import ReasoningEnd


def low() -> int | None:
    return budget_of("low", None)


def test_efforts_are_budgets_and_a_budget_in_tokens_goes_before() -> None:
    assert [budget_of(effort, None) for effort in ("none", "low", "medium", "high", None)] == [
        0,
        1024,
        8192,
        None,
        None,
    ]
    assert budget_of("low", 5000) == 5000 and budget_of("none", 5) == 0


def test_the_budget_holds_over_the_tool_loop_of_a_user_request() -> None:
    turns = (
        Message("user", "a"), Message("assistant", "x", "old"), Message("user", "b"),
        Message("assistant", "", "one"), Message("tool", "r"), Message("assistant", "", "two"), Message("assistant", "no reasoning"), Message("tool", "r"),
    )  # fmt: skip
    assert reasoning_so_far(Conversation(turns)) == ("one", "two")
    assert (
        reasoning_so_far(Conversation(turns[3:])) == ("one", "two") and reasoning_so_far(Conversation(turns[:3])) == ()
    )
    assert watch(low(), 1000).n_left == 24 and watch(low(), 2000).n_left == 0


def test_without_a_budget_nothing_is_forced() -> None:
    endless = watch(None, 10**9)
    assert all(endless.add("word.\n") is None for _ in range(10_000))


def test_a_spent_budget_closes_the_reasoning_at_once() -> None:
    assert watch(low(), 1024).due() == "\n</think>\n"


def closes(texts: list[str], n_left: int) -> tuple[int, str]:
    watched = ReasoningWatch(n_left)
    for i, text in enumerate(texts, 1):
        if forced := watched.add(text):
            return i, forced
    return 0, ""


def test_it_closes_at_the_end_of_a_line_or_sentence_past_the_soft_share() -> None:
    words = [" word"] * 100
    assert closes(words, 40) == (40, "\n</think>\n")
    assert closes([*words[:34], ".\n", *words], 40) == (35, "</think>\n")
    assert closes([*words[:34], ". ", *words], 40) == (35, "\n</think>\n")
    assert closes([*words[:34], ".", " ", *words], 40) == (36, "\n</think>\n")
    assert closes([*words[:10], ".\n", *words], 40) == (40, "\n</think>\n")


def closes_before(texts: list[str], n_left: int) -> int:
    """How many texts are taken until the reasoning is closed, each looked at before it is taken."""
    watched = ReasoningWatch(n_left)
    for i, text in enumerate(texts):
        if watched.depends_on_next and watched.due(text):
            return i
        if watched.add(text):
            return i + 1
    return len(texts)


def test_a_full_stop_is_an_end_where_the_next_word_brings_the_space() -> None:
    """Budgets ran to their hard end: the space after a full stop comes with the next word, in one token."""
    words = [" word"] * 100
    assert closes_before([*words[:34], ".", " The", *words], 40) == 35
    assert closes_before([*words[:34], "?", '"', ")", " The", *words], 40) == 37
    assert closes_before([*words[:20], ".", " The", *words], 40) == 40, "too early"
    assert closes_before([*words[:30], " self", ".", "items", " is", " 3", ".", "5", *words], 40) == 40


def test_thinking_that_begins_again_is_of_the_same_budget() -> None:
    """A budget of 40 tokens had 57: the model closed its reasoning, opened it again, and nobody counted."""
    pieces = dict(enumerate([" word", "\n", "<think>", "</think>"]))
    end = ReasoningEnd(ReasoningWatch(4), lambda token: pieces[token].encode(), lambda text: [1, 3, 1])
    said = [0, 0, 3, 1, 2, 0]
    assert [end.after(token) for token in said] == [[]] * 6
    assert end.after(0) == [1, 3, 1], "two before and two after"
    assert [end.after(token) for token in (1, 3, 1, 0, 2, 0, 0, 0, 0)] == [[]] * 9, "said in an answer it opens nothing"


def test_the_words_that_would_follow_are_not_said() -> None:
    pieces = dict(enumerate([" word", ".", " The", "</think>", "\n"]))
    end = ReasoningEnd(ReasoningWatch(4), lambda token: pieces[token].encode(), lambda text: [4, 3, 4])
    assert [end.before(lambda: 2), end.after(0)] == [[], []]
    assert [end.before(lambda: 2), end.after(0)] == [[], []]
    assert [end.before(lambda: 2), end.after(1)] == [[], []]
    assert end.before(lambda: 2) == [4, 3, 4] and end.before(lambda: 2) == [], "once"


@given(st.lists(st.sampled_from([" a", ".", " ", "\n", "?\n", "。"]), max_size=60), st.integers(0, 50))
def test_it_never_passes_the_budget_and_never_closes_before_the_soft_share(texts: list[str], n_left: int) -> None:
    n, forced = closes(texts, n_left)
    assert n <= max(n_left, 1)
    if n:
        assert n >= SOFT_SHARE * n_left and forced.lstrip("\n") == "</think>\n"
        assert ("".join(texts[:n]) + forced).endswith("\n</think>\n")
    else:
        assert len(texts) < max(n_left, 1)
