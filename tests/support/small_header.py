"""A whole Step-3.5 file of a few kilobytes: every kind of layer and tensor, dimensions that mean nothing."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from step35.planning.machine import find_machine
from step35.planning.model_header import Header, read_header
from step35.planning.placement import Constraints, place

V = GGUFValueType
Entry = tuple[object, GGUFValueType]
N_TRUNK, N_HEADS, N_EMBD = 2, 1, 8

ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
MOE = ("ffn_gate_inp", *(f"{name}_exps" for name in DENSE), *(f"{name}_shexp" for name in DENSE))
HEAD = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", *ATTENTION, *DENSE)
TENSORS = (
    "token_embd",
    *(f"blk.0.{name}" for name in (*ATTENTION, *DENSE)),
    *(f"blk.1.{name}" for name in (*ATTENTION, *MOE)),
    *(f"blk.2.{name}" for name in HEAD),
    "output_norm",
    "output",
)

COUNTS = {
    "block_count": N_TRUNK + N_HEADS,
    "nextn_predict_layers": N_HEADS,
    "context_length": 1024,
    "embedding_length": N_EMBD,
    "feed_forward_length": 16,
    "expert_feed_forward_length": 4,
    "expert_count": 4,
    "expert_used_count": 2,
    "attention.key_length": 64,
    "attention.sliding_window": 16,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
}
ENTRIES: dict[str, Entry] = {f"step35.{name}": (value, V.UINT32) for name, value in COUNTS.items()}
ENTRIES["step35.attention.sliding_window_pattern"] = ([False, True, True], V.ARRAY)
ENTRIES["step35.swiglu_clamp_exp"] = ([0.0, 7.0, 0.0], V.ARRAY)
ENTRIES["tokenizer.ggml.tokens"] = (["a", "b", "é"], V.ARRAY)


def write(path: Path, changes: Mapping[str, Entry | None] = {}, tensors: tuple[str, ...] = TENSORS) -> bytes:
    """Writes the file with some keys changed, or left out (None); returns its bytes."""
    writer = GGUFWriter(path, "step35")
    for key, entry in {**ENTRIES, **changes}.items():
        if entry is not None:
            writer.add_key_value(key, *entry)
    for name in tensors:
        writer.add_tensor(f"{name}.weight", np.zeros((2, N_EMBD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


_BOXES = tuple(map(find_machine, ("rtx4090-24+128", "cpu-192")))


def read_and_plan(path: Path) -> Header:
    """Returns a file's header once a plan has been made of it, on one box with a GPU and on one without."""
    header = read_header(path)
    if header.has_trunk:
        for box in _BOXES:
            place(header, box, Constraints(n_ctx=min(512, header.shape.n_ctx_train)))
    return header
