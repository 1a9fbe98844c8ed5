"""The checkpoint: its files, its architecture, its tokenizer, and which GGUF tensors its tensors become."""
