"""How many rows the engine's decodes have: what a context is opened for, measured with and counted with."""

MEASURED_WIDTHS = (1, 2, 3, 4, 8)
"""Rows of the trunk's decodes whose time is measured when an engine opens."""
VERIFY_ROWS = max(MEASURED_WIDTHS)
"""Rows of logits that one decode of the trunk is asked for, a session."""
HEAD_ROWS = 32
"""Rows of a head's decode at most: its output matrix may run for all of them."""
REPLAYED_ROWS = 4
"""Rows of a head's usual run: the new one, and those that read drafts of the round before, which may have been
rejected."""


def verify_rows(n_batch: int, n_sessions: int) -> int:
    """Returns the most rows of logits that the trunk's context returns at once."""
    return min(n_batch, VERIFY_ROWS * n_sessions)


def head_rows(n_sessions: int) -> int:
    """Returns the batch of a head's context."""
    return max(HEAD_ROWS, REPLAYED_ROWS * n_sessions)
