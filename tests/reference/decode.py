"""Greedy text from the reference model, and what its MTP heads draft along the way.

No cache: every step runs the whole sequence again, which a tiny model can afford and a mistake can't hide in.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from reference.model import Step35


@torch.no_grad()
def greedy(model: Step35, prompts: Sequence[list[int]], n_new: int, stop: Collection[int] = ()) -> list[list[int]]:
    """Each prompt's continuation by up to n_new tokens, ended after a stop token."""
    sequences = [list(prompt) for prompt in prompts]
    open_ = list(range(len(prompts)))
    for _ in range(n_new):
        for i, token in zip(open_, _next_tokens(model, [sequences[i] for i in open_]), strict=True):
            sequences[i].append(token)
        open_ = [i for i in open_ if sequences[i][-1] not in stop]
        if not open_:
            break
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


def _next_tokens(model: Step35, sequences: list[list[int]]) -> list[int]:
    """Padded on the right, which causal attention never sees."""
    longest = max(map(len, sequences))
    logits, _ = model.trunk(torch.tensor([s + [0] * (longest - len(s)) for s in sequences]))
    return [int(logits[i, len(s) - 1].argmax()) for i, s in enumerate(sequences)]


@torch.no_grad()
def draft(model: Step35, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
    """One drafting cycle along the exact chain: each head's logits [V] for the token after the last draft.

    tokens [T+1] are committed, their last sampled from the trunk's row T-1; hidden [T, C] is the trunk's, before its
    norm. Head k drafts from row T-1, whose token is the draft before it; so are the tokens of the k-1 rows before.
    """
    logits = []
    for k, head in enumerate(model.heads):
        hidden = head(model.embed(tokens[1 + k :])[None], hidden.view(1, -1, hidden.shape[-1]))[0]
        logits.append(head.logits(hidden[-1]))
        tokens = torch.cat([tokens, logits[-1].argmax().view(1)])
    return logits


@torch.no_grad()
def trunk_context_chain(model: Step35, tokens: Tensor, hidden: Tensor, rows: Tensor) -> list[Tensor]:
    """Each head's logits [R, V] as llama.cpp's draft-mtp pairs tokens and hidden states, for some rows t of a text.

    Every head's context is (token p, trunk's hidden p-1) up to p = t+1; only behind it come (token t+1+j, head j-1's
    hidden), j = 1..k. A head is one layer, so a window of context is all its last row can see. tokens [N], hidden
    [N, C]; each t must lie between window-1 and N-4.
    """
    window = model.config.layers[-1].window
    before = rows.unsqueeze(1) + torch.arange(1 - window, 1)
    states, logits = hidden[before], []
    for k, head in enumerate(model.heads):
        after = rows.unsqueeze(1) + torch.arange(2 - window, 2 + k)
        last = head(model.embed(tokens[after]), states)[:, -1:]
        states = torch.cat([states, last], dim=1)
        logits.append(head.logits(last[:, 0]))
    return logits
