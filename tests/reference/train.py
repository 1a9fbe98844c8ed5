"""Train the bundled tiny Step-3.5 from scratch: `python -m reference.train OUT`, run in tests/.

First the tokenizer, then trunk and heads together on the text, then the heads alone on what the trunk makes of it. The
learning rates follow the clock, so a slower machine takes fewer steps within the same time.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from reference.chats import TEMPLATE_PATH, generate_chats
from reference.checkpoint import save_checkpoint, write_json
from reference.config import TINY_CONFIG, Config
from reference.corpus import Rows, batches, chat_rows, drill_rows, source_rows, split_sources, standard_library
from reference.initial import initialise
from reference.model import MoE, Step35
from reference.tokenizer import EOS, IM_END, PAD, tokenizer_config, train_tokenizer

SEED = 35
N_CHATS, N_TOKENIZER_CHATS, N_DRILLS = 16_000, 15_000, 1_000
ROW_LENGTH = 1024 + 4  # four more than the trunk's rows: the last row of the third head looks at t+3, predicts t+4
MUON_RATE, ADAM_RATE, EMBEDDING_RATE = 2e-2, 2e-3, 5e-3
WARM_UP, DECAY = 0.02, 0.6  # shares of the time
TOGETHER_WEIGHTS, HEADS_WEIGHTS = (1.0, 0.3, 0.3, 0.3), (1.0, 1.0, 1.0)  # of the losses in the two phases
BALANCE_RATE = 2e-3
SAVE_EVERY_S, REPORT_EVERY = 300, 20


@dataclass(frozen=True, slots=True)
class Clock:
    """How much of the time to spend has passed."""

    start: float
    budget_s: float

    def share(self) -> float:
        return (time.monotonic() - self.start) / self.budget_s


def compile_layers(model: Step35) -> None:
    """Fuse what is between the matrix products; routing stays as it is, since its shapes change at every step."""
    for layer in (*model.decoders, *model.heads):
        for part in (layer.self_attn, layer.share_expert) if layer.is_moe else (layer,):
            part.compile()


def make_optimizers(model: Step35) -> list[torch.optim.Optimizer]:
    """Muon for the layers' plain matrices, whose attention AdamW hardly trains in so few steps; AdamW for the rest."""
    matrices, embeddings, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim == 2 and min(parameter.shape) > model.config.n_experts
            layer = "layers" in name and not name.endswith("output.weight")
            (embeddings if "embed" in name else matrices if plain and layer else others).append(parameter)
    groups = [{"params": others, "lr": ADAM_RATE}, {"params": embeddings, "lr": EMBEDDING_RATE}]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.1),
        torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]


def rate_factor(share: float) -> float:
    """Linear warm-up, constant, linear decay to nothing, over the share of the time that has passed."""
    return max(0.0, min(share / WARM_UP, 1.0, (1.0 - share) / DECAY))


def text_losses(model: Step35, batch: Rows) -> list[Tensor]:
    """Cross entropy of the trunk over rows of T+4 tokens, and of each head along the exact chain over the first row.

    One row will do for the heads here: they are hardly better than bigrams before their own phase.
    """
    tokens, weights = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weights)
    n_rows = tokens.shape[1] - 1 - len(model.heads)
    logits, hidden = model.trunk(tokens[:, :n_rows])
    return [
        cross_entropy(rows, *(x[: len(rows), k + 1 : k + 1 + n_rows] for x in (tokens, weights)))
        for k, rows in enumerate([logits, *model.chain(tokens[:1], hidden[:1])])
    ]


@torch.compile
def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean within each row, so that a row counts the same however much of it does; then over the rows."""
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(weights)
    return ((each * weights).sum(-1) / weights.sum(-1)).mean()


def draft_losses(model: Step35, batch: Rows) -> list[Tensor]:
    """How far each head is from saying what the trunk says a few tokens later, over rows of T+4 tokens."""
    tokens, weights = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weights)
    n_rows = tokens.shape[1] - 1 - len(model.heads)
    with torch.no_grad():
        logits, hidden = model.trunk(tokens)
    return [
        divergence(rows, logits[:, k + 1 : k + 1 + n_rows], weights[:, k + 2 : k + 2 + n_rows])
        for k, rows in enumerate(model.chain(tokens, hidden[:, :n_rows]))
    ]


@torch.compile
def divergence(logits: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Kullback-Leibler, of what is said from what is wanted; means as in cross_entropy."""
    wanted = wanted.float().log_softmax(-1)
    each = (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)
    return ((each * weights).sum(-1) / weights.sum(-1)).mean()


def balance_experts(model: Step35) -> None:
    """Move router biases towards equal loads, without a loss term (DeepSeek-V3, section 2.1.2); not of frozen routers."""
    for module in model.modules():
        if isinstance(module, MoE) and module.gate.weight.requires_grad:
            module.router_bias.add_(BALANCE_RATE * torch.sign(module.load.mean() - module.load))


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: its text, the losses of a batch, and how much each of them counts."""

    minutes: float
    data: Iterator[Rows]
    losses: Callable[[Step35, Rows], list[Tensor]]
    weights: Sequence[float]


def train(model: Step35, phase: Phase, save: Callable[[], None]) -> None:
    """What of the model isn't frozen."""
    clock, optimizers = Clock(time.monotonic(), 60 * phase.minutes), make_optimizers(model)
    schedules = [LambdaLR(optimizer, lambda _: rate_factor(clock.share())) for optimizer in optimizers]
    saved_at, step, recent = time.monotonic(), 0, []
    while clock.share() < 1.0:
        recent.append(train_step(model, phase, optimizers))
        for schedule in schedules:
            schedule.step()
        step += 1
        if step % REPORT_EVERY == 0:
            print(progress_line(step, clock, recent), flush=True)
            recent.clear()
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            save()
            saved_at = time.monotonic()
    save()


def train_step(model: Step35, phase: Phase, optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """One update; the losses before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = phase.losses(model, next(phase.data))
    torch.stack([weight * loss for weight, loss in zip(phase.weights, losses, strict=True)]).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        balance_experts(model)
    return [loss.item() for loss in losses]


def progress_line(step: int, clock: Clock, recent: list[list[float]]) -> str:
    elapsed = time.monotonic() - clock.start
    losses = " ".join(f"{loss:.3f}" for loss in np.mean(recent, axis=0))
    return f"step {step:5} {100 * clock.share():5.1f} % {elapsed / step:5.2f} s/step  losses {losses}"


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


def build(folder: Path, minutes: float, heads_minutes: float) -> None:
    """The whole checkpoint in folder, written every five minutes and at the end of each phase."""
    torch.manual_seed(SEED)
    sources, _ = split_sources(standard_library())
    tokenizer = train_tokenizer([*sources, *generate_chats(N_TOKENIZER_CHATS, SEED)])
    save_tokenizer(tokenizer, folder)
    code = source_rows(tokenizer, sources, ROW_LENGTH)
    chats, drills = chat_rows(tokenizer, N_CHATS, SEED, ROW_LENGTH), drill_rows(tokenizer, N_DRILLS, SEED, ROW_LENGTH)
    print(f"rows of {ROW_LENGTH} tokens: {len(code)} of code, {len(chats)} of chats, {len(drills)} drills", flush=True)
    config = raw_config(tokenizer)
    model = Step35(Config.from_dict(config))
    initialise(model)
    compile_layers(model)
    together = Phase(minutes, batches(code, chats, drills, SEED), text_losses, TOGETHER_WEIGHTS)
    train(model, together, lambda: save_checkpoint(model, config, folder))
    freeze_trunk(model)
    alone = Phase(heads_minutes, batches(code, chats, None, SEED + 1), draft_losses, HEADS_WEIGHTS)
    train(model, alone, lambda: save_checkpoint(model, config, folder))


def freeze_trunk(model: Step35) -> None:
    model.requires_grad_(False)
    for head in model.heads:
        head.requires_grad_(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--minutes", type=float, default=54, help="for trunk and heads (default: %(default)s)")
    parser.add_argument("--heads-minutes", type=float, default=13, help="for the heads alone (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.folder, arguments.minutes, arguments.heads_minutes)


if __name__ == "__main__":
    main()
