"""An answer as it grows: what its events say is what it remembers, however its text comes in tokens."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from step35.chat.answer import Answer
from step35.chat.collected import Collected
from step35.chat.events import AnswerEvent, Finished
from step35.chat.messages import Message, Tool, ToolCall
from step35.chat.output_parser import OutputParser

LS = Tool("ls", "Lists.", {"type": "object", "properties": {"path": {"type": "string"}}})
CALL = "<tool_call>\n<function=ls>\n<parameter=path>\n/\n</parameter>\n</function>\n</tool_call>"


def answered(
    pieces: list[str], *, stop: tuple[str, ...] = (), reason: str = "stop", may_call_twice: bool = True
) -> tuple[Answer, list[AnswerEvent]]:
    """An answer whose tokens are these pieces, and all its events."""
    ids = (f"call_{n}" for n in count())
    parser = OutputParser((LS,), True, lambda: next(ids))
    answer = Answer(lambda token: pieces[token].encode(), parser, stop, may_call_twice)
    events = []
    for token in range(len(pieces)):
        if answer.is_over:
            break
        events += answer.feed(token)
    return answer, events + answer.finish(reason, 10, 5)


def collected(events: list[AnswerEvent]) -> Collected:
    said = Collected()
    for event in events:
        said.add(event)
    return said


def test_an_answer_has_reasoning_content_and_calls() -> None:
    answer, events = answered(["Hm.\n", "</think>", "\nI look.\n", CALL])
    assert answer.message() == Message("assistant", "I look.", "Hm.", (ToolCall("call_0", "ls", '{"path": "/"}'),))
    end = events[-1]
    assert isinstance(end, Finished) and end.reason == "tool_calls"
    assert (end.usage.n_prompt, end.usage.n_cached, end.usage.n_generated) == (10, 5, 4)


def test_a_call_that_is_cut_short_is_closed() -> None:
    answer, events = answered(["</think>", CALL[: CALL.index("\n</parameter>")]], reason="length")
    assert answer.message().tool_calls == (ToolCall("call_0", "ls", '{"path": "/"}'),)
    assert collected(events).reason == "length"


def test_a_stop_string_ends_the_content_only() -> None:
    answer, events = answered(["END ", "</think>", "Do", "ne. E", "ND or", " more"], stop=("END",))
    assert answer.is_over and answer.message() == Message("assistant", "Done. ", "END ")
    assert collected(events).stop_text == "END" and collected(events).reason == "stop"


def test_where_one_call_is_allowed_the_answer_ends_after_it() -> None:
    answer, _ = answered(["</think>", *CALL, "\n", *CALL], may_call_twice=False)
    assert answer.is_over and answer.said.n_calls == 1


pieces = st.lists(st.sampled_from(["a", "E", "N", "D", " ", "\n", "</think>", CALL, CALL[:40], "é"]), max_size=12)


@given(pieces, st.sampled_from([(), ("END",), ("ND", "END"), ("a", "aE")]), st.sampled_from(["stop", "length"]))
def test_any_tokens_of_a_text_say_the_same_and_the_events_say_it_all(
    texts: list[str], stop: tuple[str, ...], reason: str
) -> None:
    answer, events = answered(texts, stop=stop, reason=reason)
    said = collected(events)
    assert said == answer.said
    letters, _ = answered(list("".join(texts)), stop=stop, reason=reason)
    assert letters.message() == answer.message()
    assert (letters.said.reason, letters.said.stop_text) == (said.reason, said.stop_text)
