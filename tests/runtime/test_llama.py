"""step35.Llama serves what scripts written for llama_cpp.Llama ask for."""

import inspect
import json

import llama_cpp
import pytest

import step35
from step35.errors import ContextFull, SettingsError
from tiny_model import tiny_gguf

PROMPT = "def read_file(path):\n"


@pytest.fixture(scope="module")
def llm():
    llm = step35.Llama(str(tiny_gguf()), n_ctx=1024, n_threads=1, verbose=False, seed=3)
    yield llm
    llm.close()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["text"]


def test_it_is_a_llama_and_takes_the_same_arguments():
    assert issubclass(step35.Llama, llama_cpp.Llama)
    for name in ("create_completion", "create_chat_completion", "tokenize", "detokenize", "save_state", "load_state"):
        stock = inspect.signature(getattr(llama_cpp.Llama, name)).parameters
        ours = inspect.signature(getattr(step35.Llama, name)).parameters
        assert set(stock) <= set(ours) or any(p.kind is p.VAR_KEYWORD for p in ours.values()), name


def test_greedy_text_equals_the_stock_class(llm):
    stock = llama_cpp.Llama(str(tiny_gguf()), n_ctx=1024, n_threads=1, verbose=False)
    assert llm.tokenize(PROMPT.encode()) == stock.tokenize(PROMPT.encode())
    wanted = stock(PROMPT, max_tokens=24, temperature=0)
    got = llm(PROMPT, max_tokens=24, temperature=0)
    stock.close()
    assert wanted["choices"] == got["choices"]
    assert wanted["usage"] == got["usage"]


def test_chunks_add_up_to_the_whole_and_end_with_the_reason(llm):
    whole = llm(PROMPT, max_tokens=30, temperature=1.0, seed=9)
    chunks = list(llm(PROMPT, max_tokens=30, temperature=1.0, seed=9, stream=True))
    assert "".join(map(text_of, chunks)) == text_of(whole)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_a_stop_string_is_not_shown(llm):
    text = text_of(llm(PROMPT, max_tokens=30, temperature=0))
    stop = text[8:11]
    for stream in (False, True):
        answer = llm(PROMPT, max_tokens=30, temperature=0, stop=[stop], stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(map(text_of, parts)) == text[: text.index(stop)]
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_logprobs_need_no_logits_all(llm):
    logprobs = llm(PROMPT, max_tokens=6, temperature=0, logprobs=3)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 6
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=False
    ):
        assert value <= 0
        assert top[token] == value == max(top.values())


def test_a_grammar_holds_and_a_broken_one_is_refused(llm):
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("a" | "b")+ "."', verbose=False)
    text = text_of(llm(PROMPT, max_tokens=24, temperature=1.0, grammar=grammar))
    assert set(text) <= set("ab.")
    with pytest.raises(SettingsError, match="bad grammar"):
        llm.engine.model.open_grammar("root ::= (((")


def test_a_json_schema_gives_json(llm):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    answer = llm.create_chat_completion(
        [{"role": "user", "content": "Give JSON."}],
        max_tokens=64,
        temperature=1.0,
        response_format={"type": "json_object", "schema": schema},
    )
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("x", "y")


def test_a_logit_bias_forces_and_bans(llm):
    (forced,) = llm.tokenize(b"x", add_bos=False)
    assert text_of(llm(PROMPT, max_tokens=5, temperature=0, logit_bias={forced: 1000})) == "xxxxx"
    banned = llm.tokenize(PROMPT.encode()) and next(llm.generate(llm.tokenize(PROMPT.encode()), temp=0))
    assert next(llm.generate(llm.tokenize(PROMPT.encode()), temp=0)) == banned
    text = llm(PROMPT, max_tokens=1, temperature=0, logit_bias={banned: -1000})
    assert text_of(text) != llm.detokenize([banned]).decode()


def test_a_chat_streams_its_role_first(llm):
    chunks = list(llm.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=8, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_a_saved_state_goes_on_where_it_was(llm):
    tokens = llm.tokenize(PROMPT.encode())
    stream = llm.generate(tokens, temp=0)
    first = [next(stream) for _ in range(10)]
    state = llm.save_state()
    rest = [next(stream) for _ in range(10)]
    llm.reset()
    assert llm.n_tokens == 0
    llm.load_state(state)
    assert llm.input_ids.tolist()[: len(tokens) + 10] == tokens + first
    again = llm.generate([], reset=False, temp=0)
    n_ahead = llm.n_tokens - len(tokens) - 10
    assert [next(again) for _ in range(10 - n_ahead)] == rest[n_ahead:]


def test_logits_processors_are_applied(llm):
    def only_x(ids, scores):
        scores[:] = -1e9
        scores[forced] = 0
        return scores

    (forced,) = llm.tokenize(b"x", add_bos=False)
    processors = llama_cpp.LogitsProcessorList([only_x])
    assert text_of(llm(PROMPT, max_tokens=4, temperature=1.0, logits_processor=processors)) == "xxxx"


@pytest.mark.parametrize("option", [{"embedding": True}, {"rope_freq_base": 1e4}, {"swa_full": True}, {"typo": 1}])
def test_a_constructor_argument_that_isnt_served_is_refused(option):
    with pytest.raises(SettingsError, match=f"{next(iter(option))} is not served"):
        step35.Llama(str(tiny_gguf()), verbose=False, **option)


def test_what_isnt_served_says_so(llm):
    for call in (
        lambda: llm.embed("x"),
        lambda: llm.scores,
        llm.sample,
        lambda: llm(PROMPT, mirostat_mode=2),
    ):
        with pytest.raises(SettingsError, match="not served|not kept"):
            call()
    with pytest.raises(ContextFull, match="holds 1024 tokens"):
        llm([1] * 1024)


def test_a_context_of_262144_tokens_opens():
    """Two full layers of 2 heads x 64, f16: 1 KiB a token, so 256 MiB, not the 2 GiB of an (n_ctx, n_vocab) array."""
    llm = step35.Llama(str(tiny_gguf()), n_ctx=0, n_threads=1, verbose=False, draft="off")
    assert llm.n_ctx() == 262144
    llm.close()
