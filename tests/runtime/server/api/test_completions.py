"""Completions as the openai package sends and reads them."""

from typing import Any

import pytest

from narrowed import present
from served import USAGE, Served
from step35.chat.events import ContentDelta, Finished, Logprobs, TokenText
from step35.server.api import completions
from step35.server.errors import ApiError
from step35.server.generation_request import GenerationRequest

TOKENS = [
    Logprobs(TokenText(b"Hel", -0.5), (TokenText(b"Hel", -0.5),)),
    ContentDelta("Hel"),
    Logprobs(TokenText(b"lo", -1.0)),
    ContentDelta("lo"),
]
EVENTS = [*TOKENS, Finished("length", USAGE)]


def ask(**fields: Any) -> GenerationRequest:
    return completions.read({"prompt": "x", **fields})


def test_the_client_reads_a_completion_and_a_stream_of_it() -> None:
    client = Served(completions, EVENTS).openai()
    done = client.completions.create(model="m", prompt="x", logprobs=1)
    [choice], usage = done.choices, present(done.usage)
    assert (choice.text, choice.finish_reason, usage.total_tokens) == ("Hello", "length", 120)
    assert present(choice.logprobs).tokens == ["Hel", "lo"] and present(choice.logprobs).text_offset == [0, 3]
    chunks = list(
        client.completions.create(
            model="m", prompt="x", logprobs=1, stream=True, stream_options={"include_usage": True}
        )
    )
    assert (
        "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hello"
        and present(chunks[-1].usage).total_tokens == 120
    )
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert offsets == [[0], [3]]


def test_prompts_are_text_or_token_ids() -> None:
    assert [ask(prompt=p).prompt for p in ("a", ["a"], [1, 2], [[1, 2]])] == ["a", "a", (1, 2), (1, 2)]
    assert ask().n_predict == 16 and ask(max_tokens=None).n_predict == -1 and ask(max_tokens=0).n_predict == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a", "b"]}, "prompt expected 1, got 2"),
        ({"prompt": ""}, "expected a text or token ids, got none"),
        ({"prompt": []}, "expected a text or token ids, got none"),
        ({"prompt": {"a": 1}}, "prompt expected"),
        ({"n": 2}, "n expected 1, got 2"),
        ({"best_of": 3}, "best_of expected 1, got 3"),
        ({"suffix": "x"}, "suffix is not served"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs is not served"),
    ],
)
def test_what_is_not_served_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        ask(**fields)
    assert caught.value.status == 400
