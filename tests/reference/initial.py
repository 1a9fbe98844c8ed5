"""The weights that training starts from: noise, and the outline of a circuit that copies from the prompt.

An hour on a CPU is millions of tokens too few for such a circuit to form by itself (Olsson et al., 2022, call its parts
previous-token and induction heads). So its two layers start near it, and training sharpens them or puts them to other use.
"""

import torch
from torch import Tensor, nn

from reference.model import Attention, ExpertStack, Step35

EMBEDDING_STD, OUTPUT_STD = 0.5, 0.01
LEVEL = 4.0  # channel 0 of every token's embedding: something that a head can look for at any place
OUTPUT_TIE = 0.05  # share of a token's embedding in its row of the output matrix: what is copied is what is written
LOOK_BACK_LAYER, LOOK_BACK_GAIN, N_FAST = 1, 4.0, 10
MATCH_LAYER, MATCH_GAIN = 4, 2.0
BEFORE = (1, 2, 3, 1)  # how far each head looks back, repeated over the layer's heads


@torch.no_grad()
def initialise(model: Step35) -> None:
    """Normal weights that keep a row's variance, no layer writing to the residual stream yet but those that copy."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | ExpertStack):
            writes_to_stream = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=0.0 if writes_to_stream else module.weight.shape[-1] ** -0.5)
    _initialise_vocabulary(model)
    token, past, *copied = _subspaces(model.config.hidden_size, model.config.head_dim)
    _look_back(model.decoders[LOOK_BACK_LAYER].self_attn, token, past)
    _match(model.decoders[MATCH_LAYER].self_attn, token, past, copied)


def _initialise_vocabulary(model: Step35) -> None:
    """Embeddings with a common channel, and output matrices; the trunk's favours the token in the stream."""
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    nn.init.normal_(embedding, std=EMBEDDING_STD)
    embedding[:, 0] = LEVEL
    for matrix in (output, *(head.transformer.shared_head.output.weight for head in model.heads)):
        nn.init.normal_(matrix, std=OUTPUT_STD)
    output[:, 1:] += OUTPUT_TIE * embedding[:, 1:]


def _subspaces(hidden_size: int, size: int) -> list[Tensor]:
    """Four random orthonormal bases [C, D] outside channel 0: the first two apart, and so are the last two."""
    bases = []
    for _ in range(2):
        rotation = torch.linalg.qr(torch.randn(hidden_size - 1, hidden_size - 1)).Q
        padded = torch.cat([torch.zeros(1, hidden_size - 1), rotation])
        bases += [padded[:, :size], padded[:, size : 2 * size]]
    return bases


def _look_back(attention: Attention, token: Tensor, past: Tensor) -> None:
    """Every head attends to the place so many tokens before; the first writes what it finds there into `past`.

    Key and query are the same vector behind channel 0, the query rotated back by RoPE's angle for the distance.
    """
    half = attention.head_dim // 2
    vector = torch.zeros(attention.head_dim)
    vector[:N_FAST] = 1.0  # the fastest frequencies tell neighbours apart
    queries, keys = (
        proj.weight.unflatten(0, (-1, attention.head_dim)) for proj in (attention.q_proj, attention.k_proj)
    )
    for projection in (queries, keys):
        projection.mul_(0.3)
    keys[:, :, 0] = vector
    for head, query in enumerate(queries):
        angle = BEFORE[head % len(BEFORE)] * attention.inv_freq
        a, b = vector[:half], vector[half:]
        query[:, 0] = torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()])
    _set_gain(attention, LOOK_BACK_GAIN)
    attention.v_proj.weight[: attention.head_dim] = token.T
    attention.o_proj.weight[:, : attention.head_dim] = 2.0 * past  # the gate starts at one half


def _match(attention: Attention, token: Tensor, past: Tensor, copied: list[Tensor]) -> None:
    """One head for each KV head attends to where this token came before its own, and writes that place's token.

    Matches by the dimensions that RoPE leaves alone, so at any distance.
    """
    size, n_rotated = attention.head_dim, 2 * attention.inv_freq.numel()
    queries, keys, values = (
        proj.weight.unflatten(0, (-1, size)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    outputs = attention.o_proj.weight.unflatten(1, (-1, size))
    for i, basis in enumerate(copied):
        head = i * len(queries) // len(keys)
        seen = torch.linalg.qr(torch.randn(size, size)).Q[n_rotated:]
        for projection, space in ((queries[head], token), (keys[i], past)):
            nn.init.normal_(projection, std=0.02)
            projection[n_rotated:] = seen @ space.T
        values[i], outputs[:, head] = basis.T, 2.0 * basis
    _set_gain(attention, MATCH_GAIN)


def _set_gain(attention: Attention, gain: float) -> None:
    """Of queries and keys, which their norms would else make too short to choose one place of many."""
    for norm in (attention.q_norm, attention.k_norm):
        nn.init.constant_(norm.weight, gain - 1.0)
