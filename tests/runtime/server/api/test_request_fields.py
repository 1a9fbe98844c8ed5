"""Fields of the wrong type: a 400 that names the field in every API, as OpenAI's and Anthropic's servers have it."""

from typing import Any

import pytest

from step35.server.api import chat_completions, completions, messages, responses
from step35.server.api.protocol import ApiModule
from step35.server.errors import ApiError

HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[ApiModule, dict[str, Any]] = {
    chat_completions: {"messages": HELLO},
    completions: {"prompt": "Hi"},
    messages: {"messages": HELLO, "max_tokens": 5},
    responses: {"input": "Hi"},
}
LIMITS: dict[ApiModule, tuple[str, ...]] = {
    chat_completions: ("max_tokens", "max_completion_tokens", "top_logprobs", "n", "reasoning_budget"),
    completions: ("max_tokens", "logprobs", "n", "best_of"),
    messages: ("max_tokens",),
    responses: ("max_output_tokens", "top_logprobs", "reasoning_budget"),
}
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty")
WRONG = [
    *((api, name, value, "a valid number") for api in BODIES for name in NUMBERS for value in ("0.5", True, [1])),
    *((api, name, value, "a valid integer") for api in BODIES for name in ("seed", "top_k") for value in ("5", True)),
    *((api, name, value, "a valid integer") for api in BODIES for name in LIMITS[api] for value in ("5", True, 5.5)),
    *((api, "stream", value, "a valid boolean") for api in BODIES for value in ("true", 1)),
]


@pytest.mark.parametrize(("api", "name", "value", "want"), WRONG)
def test_a_value_of_another_type_is_a_400_that_names_the_field(api: ApiModule, name: str, value: Any, want: str):
    """`"temperature": "0.5"` and `"stream": "false"` were taken for numbers and truths."""
    with pytest.raises(ApiError, match=f"{name} expected {want}, got ") as caught:
        api.read(BODIES[api] | {name: value})
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize("api", BODIES)
def test_whole_numbers_are_numbers_and_those_with_a_point_are_whole(api: ApiModule):
    asked = api.read(BODIES[api] | {"temperature": 1, "top_p": 1, "seed": 5.0} | dict.fromkeys(LIMITS[api][:1], 7.0))
    assert (asked.sampling.temperature, asked.sampling.seed, asked.n_predict) == (1, 5, 7)
    assert api.read(BODIES[api] | {"temperature": None, "seed": None}).has_seed is False


@pytest.mark.parametrize("api", BODIES)
def test_a_biass_token_is_the_only_number_that_comes_as_text(api: ApiModule):
    assert api.read(BODIES[api] | {"logit_bias": {"5": -1}}).sampling.logit_bias == {5: -1}
    with pytest.raises(ApiError, match=r"logit_bias\.5 expected a valid number, got"):
        api.read(BODIES[api] | {"logit_bias": {"5": "-1"}})
