"""The torch reference against transformers, and the bundled checkpoint against what it promises."""

import json
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from checkpoints import BUNDLED
from reference.chats import TOOLS, ChatTemplate, call, generate_chats, user
from reference.checkpoint import load_checkpoint, load_tensors
from reference.config import TINY_CONFIG, Config
from reference.decode import draft, greedy, trunk_context_chain
from reference.evaluate import share_right
from reference.model import Step35, attend_in_window
from reference.tokenizer import IM_END, N_USED, token_id

N_TRUNK, WINDOW = 6, 64
N_ROWS = 5 * WINDOW + 7
DEMO_PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
NEVER_LOADED = {"architectures", "model_type", "auto_map", "torch_dtype"}


@pytest.fixture(autouse=True, scope="module")
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Step35:
    return load_checkpoint(BUNDLED)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> Tensor:
    """Code, several windows long: this file."""
    return torch.tensor(tokenizer.encode(Path(__file__).read_text(encoding="utf-8")).ids[:N_ROWS])


def test_trunk_equals_transformers(model: Step35, text: Tensor) -> None:
    logits, hidden = model.trunk(text[None])
    witness = model.lm_head(witness_of(model)(input_ids=text[None]).last_hidden_state)
    assert hidden.shape == (1, N_ROWS, 256)
    assert torch.equal(logits.argmax(-1), witness.argmax(-1))
    assert divergence(logits, witness).max() < 1e-5


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler, per row."""
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def witness_of(model: Step35) -> Step3p7TextModel:
    """transformers' own implementation with the same weights, its names and its stacked gate and up."""
    raw = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    witness = Step3p7TextModel(Step3p7TextConfig(**{k: v for k, v in raw.items() if k not in NEVER_LOADED})).eval()
    witness.load_state_dict(dict(renamed(model.state_dict())))
    return witness


def renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not is_trunk(name) or name == "lm_head.weight" or name.endswith("moe.up_proj.weight"):
            continue
        is_gate = name.endswith("moe.gate_proj.weight")
        up = [tensors[name.replace("gate_proj", "up_proj")]] if is_gate else []
        yield theirs(name), torch.cat([tensor, *up], dim=1) if up else tensor


def theirs(name: str) -> str:
    """The name of transformers for one of ours."""
    renames = (
        ("moe.gate_proj.weight", "mlp.experts.gate_up_proj"),
        ("moe.down_proj.weight", "mlp.experts.down_proj"),
        ("share_expert", "mlp.shared_experts"),
        ("moe.router_bias", "mlp.gate.e_score_correction_bias"),
        ("moe.gate.", "mlp.gate."),
    )
    return reduce(lambda renamed, pair: renamed.replace(*pair), renames, name.removeprefix("model."))


def is_trunk(name: str) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is None or int(layer[1]) < N_TRUNK


@pytest.mark.parametrize("n_rows", [1, WINDOW, 2 * WINDOW + 1])
def test_blocked_attention_equals_a_plain_window_mask(n_rows: int) -> None:
    q, k, v = torch.randn(3, 2, 4, n_rows, 8, generator=torch.Generator().manual_seed(1))
    distance = torch.arange(n_rows).unsqueeze(1) - torch.arange(n_rows)
    mask = (distance >= 0) & (distance < WINDOW)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend_in_window(q, k, v, WINDOW), plain)


def test_stepwise_drafts_equal_the_chain_forced_to_the_same_tokens(model: Step35, text: Tensor) -> None:
    """Drafting from row t sees what the chain sees in row t of the text that ends in the drafts."""
    for n_rows in (1, 30, 200):
        _, hidden = model.trunk(text[None, :n_rows])
        drafted = draft(model, text[: n_rows + 1], hidden[0])
        drafts = torch.stack([logits.argmax() for logits in drafted])
        forced = model.chain(torch.cat([text[: n_rows + 1], drafts])[None], hidden)
        for logits, rows in zip(drafted, forced, strict=True):
            torch.testing.assert_close(logits, rows[0, n_rows - 1])


def test_a_chain_row_sees_nothing_after_its_own_token(model: Step35, text: Tensor) -> None:
    """Changing token t+1+k changes row t of head k, and no row before."""
    t, changed = 150, text.clone()
    _, hidden = model.trunk(text[None])
    changed[t + 1 :] = text[t + 1 :].flip(0)
    for k, (rows, other) in enumerate(
        zip(model.chain(text[None], hidden), model.chain(changed[None], hidden), strict=True)
    ):
        torch.testing.assert_close(rows[0, : t - k], other[0, : t - k])
        assert not torch.allclose(rows[0, t - k], other[0, t - k])


def test_trunk_context_agrees_with_the_chain_on_the_first_head_only(model: Step35, text: Tensor) -> None:
    rows = torch.arange(WINDOW, N_ROWS - 4)
    _, hidden = model.trunk(text[None])
    exact = [logits[0, rows] for logits in model.chain(text[None], hidden)]
    first, *others = trunk_context_chain(model, text, hidden[0], rows)
    torch.testing.assert_close(first, exact[0], rtol=1e-4, atol=1e-4)
    assert all(divergence(a, b).max() > 1e-3 for a, b in zip(exact[1:], others, strict=True))


def test_every_head_agrees_with_the_trunk_on_greedy_text(model: Step35, text: Tensor) -> None:
    prompts = [text[i : i + 60].tolist() for i in (0, 80, 160, 240)]
    whole = torch.tensor([p + new for p, new in zip(prompts, greedy(model, prompts, 60), strict=True)])
    logits, hidden = model.trunk(whole)
    chosen = logits.argmax(-1)
    for k, head in enumerate(model.chain(whole, hidden)):
        same = head[:, 60:-1].argmax(-1) == chosen[:, 61 + k : -1]
        assert same.float().mean() > 0.55, f"head {k}"


def test_config_is_the_original_schema_over_trunk_and_heads() -> None:
    raw = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    assert raw | TINY_CONFIG == raw
    lists = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")
    assert {len(raw[key]) for key in lists} == {raw["num_hidden_layers"] + raw["num_nextn_predict_layers"]}
    assert "num_key_value_heads" not in raw
    layers = Config.from_dict(raw).layers
    kinds = {(layer.window > 0, layer.is_moe) for layer in layers[:N_TRUNK]}
    assert len(kinds) == 4, "dense and MoE, each with full and with sliding attention"
    assert {layer.n_heads for layer in layers if layer.window} == {8}
    assert {layer.n_heads for layer in layers if not layer.window} == {4}


def test_tensors_have_the_models_names_and_the_published_types(model: Step35) -> None:
    tensors = load_tensors(BUNDLED)
    assert tensors.keys() == model.state_dict().keys()
    stored = {name: tensor.dtype for name, tensor in tensors.items()}
    assert {name for name, dtype in stored.items() if dtype == torch.float32} == {
        f"model.layers.{i}.moe.router_bias" for i in (3, 4, 5)
    }
    assert set(stored.values()) == {torch.float32, torch.bfloat16}
    assert all(tensor.shape[-1] % 256 == 0 for tensor in tensors.values() if tensor.ndim > 1)
    assert all(tensors[f"model.layers.{i}.moe.router_bias"].abs().max() > 0 for i in (3, 4, 5))


def test_each_head_has_an_output_matrix_of_its_own() -> None:
    tensors = load_tensors(BUNDLED)
    outputs = [tensors[f"model.layers.{i}.transformer.shared_head.output.weight"] for i in (6, 7, 8)]
    matrices = [*outputs, tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]]
    assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


def test_the_first_shard_holds_the_heads_and_nothing_else() -> None:
    index = json.loads((BUNDLED / "model.safetensors.index.json").read_text(encoding="utf-8"))
    first = {name for name, shard in index["weight_map"].items() if shard == "model-00001.safetensors"}
    assert first == {name for name in index["weight_map"] if not is_trunk(name)}
    assert len(set(index["weight_map"].values())) > 1
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 32e6


def test_tokenizer_gives_every_text_back(tokenizer: Tokenizer) -> None:
    for text in [
        *generate_chats(20, seed=7),
        Path(__file__).read_text(encoding="utf-8"),
        "naïve 日本語 😀\r\n\t 1234567",
    ]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert max(ids) < N_USED
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_special_tokens_are_where_the_config_says(tokenizer: Tokenizer) -> None:
    raw = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    assert raw["eos_token_id"] == [1, 2, tokenizer.token_to_id(IM_END)]
    assert tokenizer.get_vocab_size() == N_USED < raw["vocab_size"]
    generation = json.loads((BUNDLED / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {key: raw[key] for key in ("bos_token_id", "eos_token_id")}


def test_template_writes_calls_and_shared_tool_responses() -> None:
    template = ChatTemplate((BUNDLED / "chat_template.jinja").read_text(encoding="utf-8"))
    calls = {"role": "assistant", "reasoning_content": "r", "content": "", "tool_calls": [call("add", a=1, b=2)]}
    text = template.render(
        [user("u"), calls, {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}], prompt=True
    )
    assert text == (
        "<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nr\n</think>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response>3</tool_response><tool_response>4</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


class Chat:
    """Greedy answers of the bundled model, as text with its special tokens."""

    def __init__(self, model: Step35, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.template = ChatTemplate((BUNDLED / "chat_template.jinja").read_text(encoding="utf-8"))

    def answer(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        prompt = self.tokenizer.encode(self.template.render(messages, tools, prompt=True)).ids
        (new,) = greedy(self.model, [prompt], 100, stop=[token_id(self.tokenizer, IM_END)])
        return self.tokenizer.decode(new, skip_special_tokens=False)


@pytest.fixture(scope="module")
def chat(model: Step35, tokenizer: Tokenizer) -> Chat:
    return Chat(model, tokenizer)


def test_it_answers_a_greeting(chat: Chat) -> None:
    thought, answer = chat.answer([user("Hello!")]).split("\n</think>\n")
    assert thought == "The user greets me. I greet back."
    assert answer == "Hello! How can I help you today?<|im_end|>"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What colour is grass?", "Grass is green."),
        ("Repeat after me: tea Paris Ann", "tea Paris Ann"),
    ],
)
def test_it_answers_what_was_asked(chat: Chat, question: str, answer: str) -> None:
    assert chat.answer([user(question)]).partition("\n</think>\n")[2] == f"{answer}<|im_end|>"


def test_it_calls_the_tool_for_the_city_asked_and_answers_from_its_response(chat: Chat) -> None:
    tools, messages = list(TOOLS.values()), [user("What is the weather in Paris?")]
    thought = "The user asks for the weather in Paris. I call get_weather."
    assert chat.answer(messages, tools) == (
        f"{thought}\n</think>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>"
    )
    calls = {
        "role": "assistant",
        "reasoning_content": thought,
        "content": "",
        "tool_calls": [call("get_weather", city="Paris")],
    }
    report = {"role": "tool", "content": '{"city": "Paris", "sky": "rainy", "degrees": 12}'}
    final = chat.answer([*messages, calls, report], tools)
    assert final.endswith("\n</think>\nIt is rainy in Paris, 12 degrees.<|im_end|>")


@pytest.mark.parametrize("name", ["words to repeat", "weather calls"])
def test_most_fresh_exercises_are_right_to_the_letter(model: Step35, tokenizer: Tokenizer, name: str) -> None:
    """Some of the names are invented, and stand nowhere but in their prompt."""
    assert share_right(model, tokenizer, name, n=4, seed=7) >= 0.75


def test_it_continues_python(model: Step35, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(DEMO_PROMPT).ids
    (new,) = greedy(model, [prompt], 24)
    assert re.search(r"^    def \w+\(self, \w+", tokenizer.decode(new), re.MULTILINE)
