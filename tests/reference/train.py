"""Train the bundled tiny Step-3.5 from scratch: `python -m reference.train OUT --minutes 60`, run in tests/.

Tokenizer, trunk and the three MTP heads, jointly. The learning rate follows the clock, so a slower machine takes fewer
steps within the same time.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reference.chats import TEMPLATE_PATH, generate_chats
from reference.checkpoint import save_checkpoint, write_json
from reference.config import TINY_CONFIG, Config
from reference.corpus import batches, chat_rows, source_rows, split_sources, standard_library
from reference.model import ExpertStack, MoE, Step35
from reference.tokenizer import EOS, IM_END, PAD, tokenizer_config, train_tokenizer

SEED = 35
N_CHATS = 12_000
BATCH_SIZE = 2
ROW_LENGTH = 1024 + 4  # four more than the trunk's rows: the last row of the third head looks at t+3, predicts t+4
PEAK_RATE, LAST_RATE = 3e-3, 1e-4
WARM_UP, DECAY = 0.02, 0.5  # shares of the time
MTP_WEIGHT = 0.3
BALANCE_RATE = 2e-3
OUTPUTS = ("lm_head", "output")
SAVE_EVERY_S, REPORT_EVERY = 300, 20


@dataclass(frozen=True, slots=True)
class Clock:
    """How much of the time to spend has passed."""

    start: float
    budget_s: float

    def share(self) -> float:
        return (time.monotonic() - self.start) / self.budget_s


def initialise(model: Step35) -> None:
    """Normal weights that keep a row's variance; what writes to the residual stream is scaled down with depth."""
    depth = math.sqrt(2 * model.config.n_trunk)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | ExpertStack):
            writes_to_stream = name.endswith(("o_proj", "down_proj"))
            std = module.weight.shape[-1] ** -0.5 / (depth if writes_to_stream else 1.0)
            nn.init.normal_(module.weight, std=0.02 if name.endswith(OUTPUTS) else std)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)


def compile_layers(model: Step35) -> None:
    """Fuse what is between the matrix products; routing stays as it is, since its shapes change at every step."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.share_expert) if layer.is_moe else (layer,):
            part.compile()


def make_optimizer(model: Step35) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True)


def learning_rate(share: float) -> float:
    """Linear warm-up, constant, linear decay, over the share of the time that has passed."""
    if share < WARM_UP:
        return PEAK_RATE * share / WARM_UP
    left = min(1.0, (1.0 - share) / DECAY)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * max(0.0, left)


def losses(model: Step35, tokens: Tensor) -> list[Tensor]:
    """Cross entropy of the trunk and of each head along the exact chain, all over the same rows of tokens [B, T+4]."""
    n_rows = tokens.shape[1] - 1 - len(model.heads)
    logits, hidden = model.trunk(tokens[:, :n_rows])
    all_logits = [logits, *model.chain(tokens, hidden)]
    return [cross_entropy(rows, tokens[:, k + 1 : k + 1 + n_rows]) for k, rows in enumerate(all_logits)]


@torch.compile
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def balance_experts(model: Step35) -> None:
    """Move router biases towards equal loads, without a loss term (DeepSeek-V3, section 2.1.2)."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.router_bias += BALANCE_RATE * torch.sign(module.load.mean() - module.load)


def train(model: Step35, data: Iterator[np.ndarray], clock: Clock, save: Callable[[], None]) -> None:
    optimizer, saved_at, step, recent = make_optimizer(model), time.monotonic(), 0, []
    while clock.share() < 1.0:
        recent.append(train_step(model, optimizer, torch.from_numpy(next(data)), learning_rate(clock.share())))
        step += 1
        if step % REPORT_EVERY == 0:
            print(progress_line(step, clock, recent), flush=True)
            recent.clear()
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            save()
            saved_at = time.monotonic()
    save()


def train_step(model: Step35, optimizer: torch.optim.Optimizer, tokens: Tensor, rate: float) -> list[float]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = losses(model, tokens)
    (parts[0] + MTP_WEIGHT * sum(parts[1:])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        balance_experts(model)
    return [part.item() for part in parts]


def progress_line(step: int, clock: Clock, recent: list[list[float]]) -> str:
    trunk, *heads = np.mean(recent, axis=0)
    elapsed = time.monotonic() - clock.start
    return (
        f"step {step:5} {100 * clock.share():5.1f} % {elapsed / step:5.2f} s/step  trunk {trunk:.3f}  heads "
        + " ".join(f"{loss:.3f}" for loss in heads)
    )


def raw_config(tokenizer: Tokenizer) -> dict:
    """TINY_CONFIG with the end-of-generation ids, which depend on the tokenizer."""
    return TINY_CONFIG | {"eos_token_id": [tokenizer.token_to_id(token) for token in (EOS, PAD, IM_END)]}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, the chat template and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    template = TEMPLATE_PATH.read_text(encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, template))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = raw_config(tokenizer)
    write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})


def build(folder: Path, minutes: float) -> None:
    """The whole checkpoint in folder, written every five minutes and at the end."""
    torch.manual_seed(SEED)
    sources, _ = split_sources(standard_library())
    tokenizer = train_tokenizer([*sources, *generate_chats(2000, SEED)])
    save_tokenizer(tokenizer, folder)
    rows = source_rows(tokenizer, sources, ROW_LENGTH), chat_rows(tokenizer, N_CHATS, SEED, ROW_LENGTH)
    print(f"rows of {ROW_LENGTH} tokens: {len(rows[0])} of code, {len(rows[1])} of chats", flush=True)
    config = raw_config(tokenizer)
    model = Step35(Config.from_dict(config))
    initialise(model)
    compile_layers(model)
    clock = Clock(time.monotonic(), 60 * minutes)
    train(model, batches(*rows, BATCH_SIZE, SEED), clock, lambda: save_checkpoint(model, config, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--minutes", type=float, default=60, help="time to train (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.folder, arguments.minutes)


if __name__ == "__main__":
    main()
