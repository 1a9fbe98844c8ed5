"""Finished files: what is in them, what is wrong with them, and whether they are what the checkpoint gives."""
