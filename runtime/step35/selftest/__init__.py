"""Checks of an installation: a synthetic model with known logits, and `step35 doctor`."""
