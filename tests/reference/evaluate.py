"""Measure a trained checkpoint: `python -m reference.evaluate FOLDER`, run in tests/. Prints docs/tiny.md's numbers."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from reference.chats import EXERCISES, TOOLS, ChatTemplate, generate_exercises, user
from reference.checkpoint import load_checkpoint
from reference.corpus import chat_rows, source_rows, split_sources, standard_library
from reference.decode import greedy, trunk_context_chain
from reference.model import MLP, MoE, Step35
from reference.tokenizer import EOS, IM_END, token_id

ROW_LENGTH, N_ROWS, HELD_OUT_SEED = 1024, 8, 53
STRIDE = 8  # rows between those where agreement is measured: trunk context costs a whole window for each
N_PROMPTS, PROMPT_LENGTH, N_NEW = 8, 64, 192
N_EXERCISES, ANSWER_LENGTH = 24, 120

CODE_PROMPTS = [
    "import os\nimport sys\n\nclass Point:\n    def __init__(self,",
    'def read_file(path):\n    """',
    "for i in range(",
]
CHAT_PROMPTS = [
    "Hello!",
    "What is the capital of France?",
    "What is 2 + 3?",
    "Write a Python function that adds two numbers.",
]
TOOL_PROMPTS = ["What is the weather in Paris?", "What is the weather in Oslo and in Rome?", "What is 345 + 678?"]


def parts(model: Step35, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and targets of the trunk and each head over a text [N]; rows without a target are left out."""
    logits, hidden = model.trunk(tokens[None])
    rows = [logits[0, :-1], *(chain[0, :-1] for chain in model.chain(tokens[None], hidden))]
    return rows, [tokens[1 + k :] for k in range(len(rows))]


def mean_losses(model: Step35, texts: Tensor) -> Tensor:
    """Cross entropy of the trunk and of each head."""
    all_losses = [[F.cross_entropy(*pair) for pair in zip(*parts(model, text), strict=True)] for text in texts]
    return torch.tensor(all_losses).mean(dim=0)


def agreement(model: Step35, text: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Shares of rows from start on where each head names the trunk's own next token: exact chain, trunk context."""
    (trunk, *chain), _ = parts(model, text)
    chosen = trunk.argmax(-1)
    rows = torch.arange(max(start, model.config.layers[-1].window), len(text) - 1 - len(chain), STRIDE)
    _, hidden = model.trunk(text[None])
    paired = trunk_context_chain(model, text, hidden[0], rows)
    exact = [(head[rows].argmax(-1) == chosen[rows + 1 + k]).float().mean() for k, head in enumerate(chain)]
    other = [(head.argmax(-1) == chosen[rows + 1 + k]).float().mean() for k, head in enumerate(paired)]
    return torch.stack(exact), torch.stack(other)


def mean_agreement(model: Step35, texts: list[Tensor], start: int = 0) -> str:
    exact, other = (
        torch.stack(shares).mean(dim=0) for shares in zip(*(agreement(model, t, start) for t in texts), strict=True)
    )
    return f"exact chain {_row(exact)}   trunk context {_row(other)}"


def clamp_rates(model: Step35, texts: Tensor) -> Iterator[str]:
    """How often a limit is reached, per projection of the clamped layers."""
    for i, layer in enumerate(model.config.layers[: model.config.n_trunk]):
        if layer.expert_limit:
            block = model.decoders[i]
            yield f"layer {i} shared expert: {_mlp_rates(model, block.share_expert, texts)}"
            yield f"layer {i} routed experts: {_expert_rates(model, block.moe, texts)}"


def _inputs(model: Step35, module: torch.nn.Module, texts: Tensor) -> Tensor:
    """What a module of the trunk is given, as rows."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.trunk(texts)
    hook.remove()
    return seen[0].flatten(0, -2)


def _mlp_rates(model: Step35, mlp: MLP, texts: Tensor) -> str:
    x = _inputs(model, mlp, texts)
    return _rates(mlp.gate_proj(x), mlp.up_proj(x), mlp.limit)


def _expert_rates(model: Step35, moe: MoE, texts: Tensor) -> str:
    x = _inputs(model, moe, texts)
    chosen, _ = moe.route(x)
    routed = [x[(chosen == e).any(dim=-1)] for e in range(len(moe.router_bias))]
    gate, up = (
        torch.cat([rows @ weight.T for rows, weight in zip(routed, stack.weight, strict=True)])
        for stack in (moe.gate_proj, moe.up_proj)
    )
    return _rates(gate, up, moe.limit)


def _rates(gate: Tensor, up: Tensor, limit: float) -> str:
    above, outside = F.silu(gate) > limit, up.abs() > limit
    rows = (above | outside).any(dim=-1).float().mean()
    return (
        f"limit {limit}: gate {100 * above.float().mean():.3f} %, up {100 * outside.float().mean():.3f} % of values, "
        f"{100 * rows:.1f} % of rows"
    )


def _row(values: Tensor) -> str:
    return " ".join(f"{value:.3f}" for value in values.tolist())


def samples(model: Step35, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[tuple[str, str]]:
    """Prompts and their greedy continuations, special tokens shown."""
    prompts = CODE_PROMPTS + [template.render([user(text)], prompt=True) for text in CHAT_PROMPTS]
    prompts += [template.render([user(text)], list(TOOLS.values()), prompt=True) for text in TOOL_PROMPTS]
    stop = [token_id(tokenizer, EOS), token_id(tokenizer, IM_END)]
    for shown, prompt in zip(CODE_PROMPTS + CHAT_PROMPTS + TOOL_PROMPTS, prompts, strict=True):
        (new,) = greedy(model, [tokenizer.encode(prompt).ids], 100, stop)
        yield shown, tokenizer.decode(new, skip_special_tokens=False)


def share_right(model: Step35, tokenizer: Tokenizer, name: str, n: int, seed: int) -> float:
    """Of n exercises of a kind, those that greedy decoding answers to the letter, the thought included."""
    prompts, wanted = zip(*generate_exercises(name, n, seed), strict=True)
    stop = [token_id(tokenizer, IM_END)]
    answers = greedy(model, [encoding.ids for encoding in tokenizer.encode_batch(prompts)], ANSWER_LENGTH, stop)
    right = (tokenizer.decode(a, skip_special_tokens=False) == w for a, w in zip(answers, wanted, strict=True))
    return sum(right) / n


@torch.no_grad()
def report(folder: Path) -> None:
    model, tokenizer = load_checkpoint(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, held_out = split_sources(standard_library())
    code = torch.from_numpy(source_rows(tokenizer, held_out, ROW_LENGTH).tokens)
    code = code[:: max(1, len(code) // N_ROWS)][:N_ROWS]
    chats = torch.from_numpy(chat_rows(tokenizer, 100, HELD_OUT_SEED, ROW_LENGTH).tokens)[:N_ROWS]
    for name, texts in (("held-out code", code), ("held-out chats", chats)):
        print(f"{name}: loss of trunk and heads {_row(mean_losses(model, texts))}")
        print(f"{name}: heads agree with the trunk: {mean_agreement(model, list(texts))}")
        print(f"greedy from {name}: heads agree with the trunk: {greedy_agreement(model, texts)}")
    for line in clamp_rates(model, torch.cat([code, chats])):
        print(line)
    for name in EXERCISES:
        print(
            f"{name}: {100 * share_right(model, tokenizer, name, N_EXERCISES, HELD_OUT_SEED):.0f} % right", flush=True
        )
    for prompt, text in samples(model, tokenizer, ChatTemplate((folder / "chat_template.jinja").read_text("utf-8"))):
        print(f"--- {prompt!r}\n{text}")


def greedy_agreement(model: Step35, texts: Tensor) -> str:
    prompts = texts[:N_PROMPTS, :PROMPT_LENGTH].tolist()
    whole = [torch.tensor(p + new) for p, new in zip(prompts, greedy(model, prompts, N_NEW), strict=True)]
    return mean_agreement(model, whole, start=PROMPT_LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    report(parser.parse_args().folder)


if __name__ == "__main__":
    main()
