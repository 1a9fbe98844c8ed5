"""A made-up Step-3.5 of some megabytes, the same everywhere: what `doctor` runs where no real weights are needed.

It has every kind of layer (full and sliding attention, dense and MoE, clamped and not), and weights from a fixed
stream of random bits. Its logits are known from an implementation that shares nothing with llama.cpp: the torch
reference of the tests (bench/known_logits.py writes known_logits.json).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter

from step35.planning.model_header import ARCHITECTURE

N_EMBD, N_FF, HEAD_DIM, N_HEAD_KV = 128, 256, 64, 2
N_EXPERT, N_EXPERT_USED, N_FF_EXPERT, EXPERT_SCALE = 8, 2, 64, 3.0
WINDOW, N_VOCAB, EPS = 32, 320, 1e-5
ROPE_BASE, ROPE_BASE_SLIDING = 5e6, 1e4
SEED = 35


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's kind; a clamp of 0 is none."""

    is_sliding: bool
    is_moe: bool
    clamp_experts: float = 0.0
    clamp_shared: float = 0.0

    @property
    def n_head(self) -> int:
        return 4 if self.is_sliding else 2


LAYERS = (Layer(False, False), Layer(True, True), Layer(True, True, 0.5, 0.7), Layer(False, True))
PROMPT = tuple((7 * i * i + 3 * i + 1) % 256 for i in range(3 * WINDOW))
"""Three windows long: the ring of the sliding layers turns over."""


@dataclass(frozen=True, slots=True)
class KnownLogits:
    """Some of the logits after the prompt, and the greatest one's token."""

    best: int
    logits: dict[int, float]
    spread: float
    """The standard deviation of all of them."""


def known_logits() -> KnownLogits:
    """Returns what the made-up model must give after PROMPT."""
    data = json.loads(resources.files("step35.selftest").joinpath("known_logits.json").read_text(encoding="utf-8"))
    return KnownLogits(data["best"], {int(token): value for token, value in data["logits"].items()}, data["spread"])


def tensors() -> dict[str, np.ndarray]:
    """Returns the weights by their GGUF names, float32, output dimension first; norms hold the gain itself."""
    bits = np.random.PCG64(SEED)  # the stream of bits is fixed for all versions, unlike a distribution's

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        raw = bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)

    return {name: (_weight if len(shape) > 1 else _vector)(name, uniform(shape)) for name, shape in _shapes()}


def _weight(name: str, values: np.ndarray) -> np.ndarray:
    if name == "token_embd.weight":
        return values
    scale = (3 / values.shape[-1]) ** 0.5  # keeps the size of what passes through
    return values * np.float32(4 * scale if "ffn_gate_inp" in name else scale)


def _vector(name: str, values: np.ndarray) -> np.ndarray:
    return values * np.float32(0.02) if "exp_probs" in name else 1 + values * np.float32(0.25)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (N_VOCAB, N_EMBD)
    for i, layer in enumerate(LAYERS):
        for name, shape in (*_attention(layer), *(_experts() if layer.is_moe else _dense())):
            yield f"blk.{i}.{name}", shape
    yield "output_norm.weight", (N_EMBD,)
    yield "output.weight", (N_VOCAB, N_EMBD)


def _attention(layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attn_norm.weight", (N_EMBD,)
    yield "attn_q.weight", (layer.n_head * HEAD_DIM, N_EMBD)
    for name in ("attn_k", "attn_v"):
        yield f"{name}.weight", (N_HEAD_KV * HEAD_DIM, N_EMBD)
    yield "attn_output.weight", (N_EMBD, layer.n_head * HEAD_DIM)
    yield "attn_gate.weight", (layer.n_head, N_EMBD)
    yield "attn_q_norm.weight", (HEAD_DIM,)
    yield "attn_k_norm.weight", (HEAD_DIM,)
    yield "ffn_norm.weight", (N_EMBD,)


def _dense(suffix: str = "", n_ff: int = N_FF) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"ffn_gate{suffix}.weight", (n_ff, N_EMBD)
    yield f"ffn_up{suffix}.weight", (n_ff, N_EMBD)
    yield f"ffn_down{suffix}.weight", (N_EMBD, n_ff)


def _experts() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "ffn_gate_inp.weight", (N_EXPERT, N_EMBD)
    yield "exp_probs_b.bias", (N_EXPERT,)
    for name, shape in _dense("_exps", N_FF_EXPERT):
        yield name, (N_EXPERT, *shape)
    yield from _dense("_shexp", N_FF_EXPERT)


def write(path: Path) -> None:
    """Writes the model as a GGUF file of F32 tensors."""
    writer = GGUFWriter(path, ARCHITECTURE)
    _add_shape(writer)
    _add_vocabulary(writer)
    for name, values in tensors().items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: GGUFWriter) -> None:
    writer.add_name("made up")
    writer.add_block_count(len(LAYERS))
    writer.add_context_length(1024)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count([layer.n_head for layer in LAYERS])
    writer.add_head_count_kv([N_HEAD_KV] * len(LAYERS))
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_sliding_window(WINDOW)
    writer.add_array(f"{ARCHITECTURE}.attention.sliding_window_pattern", [layer.is_sliding for layer in LAYERS])
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_float32(f"{ARCHITECTURE}.rope.freq_base_swa", ROPE_BASE_SLIDING)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_EXPERT_USED)
    writer.add_expert_feed_forward_length(N_FF_EXPERT)
    writer.add_expert_shared_feed_forward_length(N_FF_EXPERT)
    writer.add_expert_weights_scale(EXPERT_SCALE)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(1)
    writer.add_array(f"{ARCHITECTURE}.swiglu_clamp_exp", [layer.clamp_experts for layer in LAYERS])
    writer.add_array(f"{ARCHITECTURE}.swiglu_clamp_shexp", [layer.clamp_shared for layer in LAYERS])


def _add_vocabulary(writer: GGUFWriter) -> None:
    """A byte-level vocabulary with one merge; the prompt is given as ids."""
    words = [f"<{i}>" for i in range(N_VOCAB - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*words, "a", "b", "ab"])
    writer.add_token_types([1] * N_VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
