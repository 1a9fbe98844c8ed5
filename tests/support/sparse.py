"""Sparse BF16 GGUF files of any shape, the real one included: exact headers over holes.

Upstream's quantizer, asked for a dry run over one, tells the type it gives every tensor of the
399 GB model in a fraction of a second, from a file of some 50 kB on disk.
"""

import math
import os
from pathlib import Path

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter

from checkpoints import Shape, layer_shapes

LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.g_proj.weight": "attn_gate.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "moe.gate.weight": "ffn_gate_inp.weight",
    "moe.router_bias": "exp_probs_b.bias",
    "moe.gate_proj.weight": "ffn_gate_exps.weight",
    "moe.up_proj.weight": "ffn_up_exps.weight",
    "moe.down_proj.weight": "ffn_down_exps.weight",
    "share_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "share_expert.up_proj.weight": "ffn_up_shexp.weight",
    "share_expert.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "transformer.shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "transformer.shared_head.output.weight": "nextn.shared_head_head.weight",
}


def gguf_shapes(shape: Shape, *, trunk: bool = True) -> dict[str, tuple[int, ...]]:
    """Returns every GGUF tensor's name and shape, the slowest dimension first as in numpy.

    Without the trunk, the tensors of a file that holds only the MTP layers.
    """
    d, v = shape.hidden_size, shape.vocab_size
    shapes = {"token_embd.weight": (v, d), "output_norm.weight": (d,), "output.weight": (v, d)}
    shapes["rope_freqs.weight"] = (shape.head_dim // 2,)
    for layer in range(0 if trunk else shape.num_hidden_layers, shape.n_layers):
        shapes |= {f"blk.{layer}.{LAYER_NAMES[k]}": s for k, s in layer_shapes(shape, layer).items()}
    return shapes


def write_sparse_gguf(path: Path, shape: Shape, *, trunk: bool = True) -> Path:
    """Writes a BF16 GGUF of a shape whose tensor data are holes, and returns `path`."""
    writer = GGUFWriter(path, "step35")
    _add_settings(writer, shape)
    n_data = sum(_add_tensor(writer, name, dims) for name, dims in gguf_shapes(shape, trunk=trunk).items())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, _aligned(path.stat().st_size) + n_data)
    return path


def _add_tensor(writer: GGUFWriter, name: str, dims: tuple[int, ...]) -> int:
    kept = len(dims) == 1 or "ffn_gate_inp" in name
    kind = GGMLQuantizationType.F32 if kept else GGMLQuantizationType.BF16
    n_bytes = math.prod(dims) * (4 if kept else 2)
    writer.add_tensor_info(name, dims, np.dtype(np.float32), n_bytes, raw_dtype=kind)
    return _aligned(n_bytes)


def _aligned(n_bytes: int) -> int:
    return n_bytes + -n_bytes % GGUF_DEFAULT_ALIGNMENT


def _add_settings(writer: GGUFWriter, shape: Shape) -> None:
    """Adds what the loader needs before it can look at the tensors; no tokenizer."""
    layers = range(shape.n_layers)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count([shape.n_heads(i) for i in layers])
    writer.add_head_count_kv([shape.num_attention_groups for _ in layers])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(shape.sliding_window)
    writer.add_sliding_window_pattern([shape.is_sliding(i) for i in layers])
    writer.add_expert_count(shape.moe_num_experts)
    writer.add_expert_used_count(shape.moe_top_k)
    writer.add_expert_feed_forward_length(shape.moe_intermediate_size)
    writer.add_vocab_size(shape.vocab_size)
    if shape.num_nextn_predict_layers:
        writer.add_uint32("step35.nextn_predict_layers", shape.num_nextn_predict_layers)
