"""Weights to quantized blocks, and their errors: libggml's quantizers and the native ones."""
