"""A converted file serves users of plain llama-cpp-python: it loads, writes, chats and tokenizes.

Nothing of this project's runtime takes part.
"""

import subprocess
import sys
from collections.abc import Iterator

import llama_cpp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import Llama
from tokenizers import Tokenizer

from checkpoints import BUNDLED

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "\tif x >= 10 and y != 2:\n\t\tprint(f'{x!r:>8}')  # done\n\n\n",
    "The quick brown fox — “jumps” over 13 lazy dogs… isn't it?",
    "1 12 123 1234 12345678 3.14159 1e-9 0xFF ½ ٣٤ Ⅷ",
    "Grüße, naïve café, Ελληνικά, русский язык, עברית, العربية, हिन्दी, ไทย",
    "你好，世界！今天天气很好。ひらがな カタカナ 한국어 漢字かな交じり文 ABC日本123",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é, zero\u200bwidth, nbsp\u00a0here, ideographic\u3000space",
    "trailing spaces   \n   leading\r\n\r\nCRLF \t mixed \x0b\x0c",
    "a_b-c.d/e\\f @user #tag $x ^y `z` ~w <p>html</p> &amp; \"quoted\" 'single'",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\nhello<|im_end|>\n",
    "<tool_call>\n<function=f>\n<parameter=p>\n1\n</parameter>\n</function>\n</tool_call>",
    "<｜begin▁of▁sentence｜>x<｜end▁of▁sentence｜> <|im_end <|not_special|>",
    "x" * 300 + " " * 50 + "\n" * 20,
    "",
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """Returns the bundled checkpoint at Q8_0, loaded by plain llama-cpp-python."""
    out = tmp_path_factory.mktemp("stock") / "model.gguf"
    subprocess.run(
        [sys.executable, "-m", "convert_step35", "run", str(BUNDLED), str(out), "--type", "Q8_0"],
        check=True,
        capture_output=True,
    )
    # One thread: two that wait for each other by spinning crawl on a machine that has other work.
    model = Llama(str(out), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, seed=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def test_it_continues_a_prompt(llm):
    done = llm.create_completion("import os\n\ndef read_file(path):\n", max_tokens=24, temperature=0)
    assert done["choices"][0]["text"].strip()
    assert done["usage"]["completion_tokens"] == 24


def test_it_chats_through_the_files_own_template(llm):
    messages = [{"role": "user", "content": "Hello, who are you?"}]
    answer = llm.create_chat_completion(messages, max_tokens=24, temperature=0)
    assert answer["choices"][0]["message"]["content"].strip()
    prompt = "<｜begin▁of▁sentence｜><|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert answer["usage"]["prompt_tokens"] == len(llm.tokenize(prompt.encode(), add_bos=False, special=True))


def test_every_end_of_generation_token_is_one_to_llama_cpp(llm, tokenizer):
    vocab = llm._model.vocab
    for text in ("<｜end▁of▁sentence｜>", "<|im_end|>"):
        assert llama_cpp.llama_vocab_is_eog(vocab, tokenizer.token_to_id(text)), text


def original_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_it_tokenizes_as_the_original_tokenizer(text, llm, tokenizer):
    assert llm.tokenize(text.encode(), add_bos=False, special=True) == original_ids(text, tokenizer)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_it_tokenizes_any_text_as_the_original_tokenizer(text, llm, tokenizer):
    assert llm.tokenize(text.encode(), add_bos=False, special=True) == original_ids(text, tokenizer)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_its_tokens_read_back_as_the_text(text, llm):
    tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
    assert llm.detokenize(tokens, special=True).decode() == text
