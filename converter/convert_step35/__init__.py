"""convert_step35: a Step-3.5 checkpoint to GGUF, in one pass, at any ggml type."""

__version__ = "0.1.0"
