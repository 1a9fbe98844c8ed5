"""Reads ranges of files into memory: past the page cache, ahead of the workers, as float32 rows of tensors."""
