"""step35.Llama serves what scripts written for llama_cpp.Llama ask for."""

import inspect
import json
from typing import Any

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
    stock: Any = llama_cpp.Llama(str(tiny_gguf()), n_ctx=1024, n_threads=1, verbose=False)
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


def user(text: str) -> dict:
    return {"role": "user", "content": text}


TOOL = {"type": "function", "function": {"name": "ls", "description": "Lists.", "parameters": {"type": "object"}}}
CHATS = {
    "a question": ([user(" Hello! \n")], {}),
    "a system message": ([{"role": "system", "content": "Be brief."}, user("Hello!")], {}),
    "a history": ([user("Hello!"), {"role": "assistant", "content": "Hm.\n</think>\nHi."}, user("What is 2 + 2?")], {}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}], {}),
    "tools": ([user("List the files.")], {"tools": [TOOL]}),
    "a forced call": (
        [user("List the files.")],
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "ls"}}},
    ),
}


@pytest.fixture(scope="module")
def stock():
    stock = llama_cpp.Llama(str(tiny_gguf()), n_ctx=1024, n_threads=1, verbose=False)
    yield stock
    stock.close()


def without_ids(answer: object) -> object:
    """An answer without what differs from call to call."""
    if isinstance(answer, dict):
        return {key: without_ids(value) for key, value in answer.items() if key not in ("id", "created")}
    if isinstance(answer, list):
        return [without_ids(value) for value in answer]
    return answer


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_answers_as_the_stock_class_does(llm, stock, name, stream):
    messages, options = CHATS[name]
    answers = []
    for model in (stock, llm):
        sent = [{**m, "content": m["content"].strip()} if isinstance(m["content"], str) else m for m in messages]
        answer = model.create_chat_completion(sent, max_tokens=40, temperature=0, stream=stream, **options)
        answers.append(without_ids(list(answer) if stream else answer))
    if stream:
        answers = [deltas_joined(answer) for answer in answers]
    assert answers[1] == answers[0]


def test_a_chat_has_the_log_probabilities_of_its_tokens(llm):
    answer = llm.create_chat_completion([user("Hello!")], max_tokens=40, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def deltas_joined(chunks: list[dict]) -> dict:
    """What a stream says in all: how its text is cut into chunks is each class's own."""
    joined: dict = {"kinds": {chunk["object"] for chunk in chunks}, "model": {chunk["model"] for chunk in chunks}}
    for choice in (chunk["choices"][0] for chunk in chunks):
        for key, value in [*choice["delta"].items(), ("finish_reason", choice["finish_reason"])]:
            if isinstance(value, str) and key != "role":
                joined[key] = joined.get(key, "") + value
            elif isinstance(value, list):
                joined[key] = joined.get(key, "") + "".join(call["function"]["arguments"] for call in value)
            elif value is not None:
                joined[key] = value
    return joined


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_of_an_answer_that_comes_back_is_reused(llm, monkeypatch, stream):
    """The template drops the reasoning of older turns: each turn decoded the answer before it again."""
    reused, messages, sync = [], [], llm._session.sync

    def counted(prompt):
        plan = sync(prompt)
        reused.append(plan.n_keep)
        return plan

    monkeypatch.setattr(llm._session, "sync", counted)
    llm.reset()
    for question in ("Hello!", "What is 2 + 2?", "Thanks.", "Bye."):
        n_decoded = llm._session.n_past
        messages.append(user(question))
        answer = llm.create_chat_completion(messages, max_tokens=60, temperature=0.8, seed=4, stream=stream)
        if stream:
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answer)
        else:
            text = answer["choices"][0]["message"]["content"]
        assert reused.pop() == n_decoded
        messages.append({"role": "assistant", "content": text})


def test_an_answer_that_a_stop_string_cut_is_rendered_as_the_caller_has_it(llm):
    """Its ids say more than the caller has heard."""
    messages = [user("Hello!")]
    text = llm.create_chat_completion(messages, max_tokens=60, temperature=0)["choices"][0]["message"]["content"]
    cut = llm.create_chat_completion(messages, max_tokens=60, temperature=0, stop=[text[-8:]])
    content = cut["choices"][0]["message"]["content"]
    assert content == text[:-8]
    llm.create_chat_completion([*messages, {"role": "assistant", "content": content}, user("More")], max_tokens=1)
    prompt = llm.detokenize(llm.eval_tokens, special=True).decode()
    answer = content.rpartition("</think>\n")[2]
    assert f"<|im_start|>assistant\n{answer.strip()}<|im_end|>\n<|im_start|>user\nMore" in prompt


@pytest.mark.parametrize(
    "message",
    [{"role": "function", "name": "f", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}],
)
def test_a_message_that_the_template_would_drop_is_refused(llm, message):
    """It was left out of the prompt, and nobody heard of it."""
    with pytest.raises(SettingsError, match="bad role|not served"):
        llm.create_chat_completion([user("Hi"), message], max_tokens=1)


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
