"""Step-3.5 in plain torch: trunk and MTP heads, with the checkpoint's own tensor names as attribute paths.

Written to be compared against, and fast enough to train a tiny model on a CPU. Shapes: B batch, T rows, C hidden size,
H heads, D head size, V vocabulary, E experts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import Config, LayerConfig, RopeScaling


class RMSNorm(nn.Module):
    """Zero-centred: the stored weight is the gain minus one. Computes in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


def inverse_frequencies(layer: LayerConfig) -> Tensor:
    """RoPE's angle per position, [n_rotated / 2], llama3-scaled where the layer asks for it."""
    exponent = torch.arange(0, layer.n_rotated, 2, dtype=torch.float32) / layer.n_rotated
    frequencies = 1.0 / layer.rope_theta**exponent
    return frequencies if layer.rope_scaling is None else _llama3_scaled(frequencies, layer.rope_scaling)


def _llama3_scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are slowed down by `factor`, short ones kept, those between blended."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of x [B, H, T, D], first half against second half; the rest pass through."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def attend_in_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys, in blocks of one window: each sees itself and the one before."""
    batch, _, rows, _ = q.shape
    pad = -rows % window
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, window)) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_window_mask(batch, (rows + pad) // window, window))
    return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :rows]


def _window_mask(batch: int, n_blocks: int, window: int) -> Tensor:
    """[batch * n_blocks, 1, window, 2 * window]; the first block has nothing before it."""
    distance = torch.arange(window).unsqueeze(1) + window - torch.arange(2 * window)
    mask = ((distance >= 0) & (distance < window)).repeat(n_blocks, 1, 1)
    mask[0, :, :window] = False
    return mask.repeat(batch, 1, 1).unsqueeze(1)


class Attention(nn.Module):
    """Grouped-query attention with q/k norms, partial RoPE and a sigmoid gate per head."""

    inv_freq: Tensor

    def __init__(self, config: Config, layer: LayerConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.head_dim, self.n_heads, self.window = d, layer.n_heads, layer.window
        self.q_proj = nn.Linear(c, layer.n_heads * d, bias=False)
        self.k_proj = nn.Linear(c, config.n_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(c, config.n_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(layer.n_heads * d, c, bias=False)
        self.g_proj = nn.Linear(c, layer.n_heads, bias=False)
        self.q_norm = RMSNorm(d, config.norm_eps)
        self.k_norm = RMSNorm(d, config.norm_eps)
        self.register_buffer("inv_freq", inverse_frequencies(layer), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = torch.arange(x.shape[1], dtype=torch.float32).unsqueeze(1) * self.inv_freq
        q = rotate(self.q_norm(q), angles.cos(), angles.sin())
        k = rotate(self.k_norm(k), angles.cos(), angles.sin())
        k, v = (y.repeat_interleave(self.n_heads // y.shape[1], dim=1) for y in (k, v))
        if self.window:
            out = attend_in_window(q, k, v, self.window)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gated = out.transpose(1, 2) * torch.sigmoid(self.g_proj(x)).unsqueeze(-1)
        return self.o_proj(gated.flatten(2))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up; a limit caps the activated gate from above and the up projection on both sides."""
    gate = F.silu(gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


class MLP(nn.Module):
    """The dense feed-forward layer, and the shared expert."""

    def __init__(self, hidden_size: int, size: int, limit: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class ExpertStack(nn.Module):
    """One projection of every expert, [E, out, in]."""

    def __init__(self, n_experts: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))


class MoE(nn.Module):
    """Routed experts. The router bias takes part in choosing experts, not in weighing them."""

    def __init__(self, config: Config, limit: float) -> None:
        super().__init__()
        c, size, n = config.hidden_size, config.expert_size, config.n_experts
        self.gate = nn.Linear(c, n, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(n), requires_grad=False)
        self.gate_proj = ExpertStack(n, size, c)
        self.up_proj = ExpertStack(n, size, c)
        self.down_proj = ExpertStack(n, c, size)
        self.top_k, self.scale, self.limit = config.top_k, config.expert_scale, limit
        self.load = torch.zeros(n)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights for rows x [N, C], both [N, top_k]; in float32 even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate.weight.float()))
        chosen = (scores + self.router_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, self.scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        chosen, weights = self.route(rows)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.router_bias.numel())
        self.load = counts.float() / counts.sum()
        source = order // self.top_k
        out = self._experts(rows[source], counts.tolist())
        out = out * weights.flatten()[order].unsqueeze(-1).to(out.dtype)
        return torch.zeros_like(rows, dtype=out.dtype).index_add(0, source, out).view(x.shape)

    def _experts(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, counts of them for each."""
        stacks = zip(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, strict=True)
        return torch.cat(
            [
                F.linear(swiglu(F.linear(part, gate), F.linear(part, up), self.limit), down)
                for part, (gate, up, down) in zip(rows.split(counts), stacks, strict=True)
            ]
        )


class Block(nn.Module):
    """A pre-norm residual block: attention, then a dense MLP or routed experts plus the shared one."""

    def __init__(self, config: Config, layer: LayerConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.input_layernorm = RMSNorm(c, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(c, config.norm_eps)
        if layer.is_moe:
            self.moe = MoE(config, layer.expert_limit)
            self.share_expert = MLP(c, config.shared_size, layer.shared_limit)
        else:
            self.mlp = MLP(c, config.intermediate_size, layer.shared_limit)
        self.is_moe = layer.is_moe

    def decode(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        normed = self.post_attention_layernorm(x)
        return x + (self.moe(normed) + self.share_expert(normed) if self.is_moe else self.mlp(normed))


class DecoderLayer(Block):
    """A layer of the trunk."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(x)


class SharedHead(nn.Module):
    """An MTP head's norm and output matrix."""

    def __init__(self, norm: RMSNorm, output: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.output = output


class HeadTransformer(nn.Module):
    """Carries the name `transformer.shared_head`."""

    def __init__(self, shared_head: SharedHead) -> None:
        super().__init__()
        self.shared_head = shared_head


class MtpLayer(Block):
    """A multi-token-prediction head: joins a token's embedding with a hidden state, then one decoder layer."""

    def __init__(self, config: Config, layer: LayerConfig) -> None:
        super().__init__(config, layer)
        c = config.hidden_size
        self.enorm = RMSNorm(c, config.norm_eps)
        self.hnorm = RMSNorm(c, config.norm_eps)
        self.eh_proj = nn.Linear(2 * c, c, bias=False)
        norm, output = RMSNorm(c, config.norm_eps), nn.Linear(c, config.vocab_size, bias=False)
        self.transformer = HeadTransformer(SharedHead(norm, output))

    def forward(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """The head's own hidden state, before its norm: what the next head of the chain takes."""
        joined = torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)
        return self.decode(self.eh_proj(joined))

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.transformer.shared_head
        return head.output(head.norm(hidden))


class Trunk(nn.Module):
    """Carries the names `model.embed_tokens`, `model.layers` (MTP heads last) and `model.norm`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n = config.n_trunk
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, layer) for layer in config.layers[:n]]
            + [MtpLayer(config, layer) for layer in config.layers[n:]]
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Step35(nn.Module):
    """The whole model; its state_dict has the checkpoint's names and shapes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def decoders(self) -> list[DecoderLayer]:
        """The trunk's layers."""
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

    @property
    def heads(self) -> list[MtpLayer]:
        return [layer for layer in self.model.layers if isinstance(layer, MtpLayer)]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens)

    def trunk(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] for tokens [B, T], and the hidden states [B, T, C] before the final norm."""
        hidden = self.embed(tokens)
        for layer in self.decoders:
            hidden = layer(hidden)
        return self.lm_head(self.model.norm(hidden)), hidden

    def chain(self, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
        """Each head's logits along the exact chain, for tokens [B, N] and the trunk's hidden states [B, T, C], T <= N.

        Row t of head k takes token t+1+k and head k-1's hidden state of row t (the trunk's for k = 0), and predicts
        token t+2+k. A head has as many rows as there are tokens for: min(T, N-1-k).
        """
        logits = []
        for k, head in enumerate(self.heads):
            embedding = self.embed(tokens[:, 1 + k : 1 + k + hidden.shape[1]])
            hidden = head(embedding, hidden[:, : embedding.shape[1]])
            logits.append(head.logits(hidden))
        return logits
