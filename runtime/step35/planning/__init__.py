"""What fits on a machine, where it goes and how fast it runs: from a GGUF header and a machine to llama.cpp's options."""
