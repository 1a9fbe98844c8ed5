"""ggml's tensor types: which can be made, and how many weights and bytes a block and a row of each have."""

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GgmlType

QUANTIZABLE = (
    *(GgmlType.F32, GgmlType.F16, GgmlType.BF16),
    *(GgmlType.Q1_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0),
    *(GgmlType.MXFP4, GgmlType.NVFP4),
    *(GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K),
    *(GgmlType.TQ1_0, GgmlType.TQ2_0),
    *(GgmlType.IQ1_S, GgmlType.IQ1_M, GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S),
    *(GgmlType.IQ3_XXS, GgmlType.IQ3_S, GgmlType.IQ4_NL, GgmlType.IQ4_XS),
)
"""The types that llama.cpp's loader takes as weights and ggml_quantize_chunk can make."""


def block_size(kind: GgmlType) -> int:
    """Weights in one block of this type."""
    return GGML_QUANT_SIZES[kind][0]


def row_bytes(kind: GgmlType, n_weights: int) -> int:
    """Bytes of a row of `n_weights`, a multiple of the block size."""
    n_per_block, n_bytes = GGML_QUANT_SIZES[kind]
    return n_weights // n_per_block * n_bytes
