"""Builds of llama.cpp of our own: the pinned sources, our patches on them, the self-test."""
