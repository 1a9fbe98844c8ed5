"""What fits on a machine, where it goes and how fast it runs: from a GGUF's header to llama.cpp's options."""
