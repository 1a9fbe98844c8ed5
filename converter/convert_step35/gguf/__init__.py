"""GGUF files and ggml's types: headers to write, files to read, metadata, importance matrices."""
