"""What sessions and the decode loop may touch of an engine."""

from collections.abc import Callable
from typing import Protocol

from step35.drafting.drafter import Drafter
from step35.engine.budget import Budget
from step35.native.interface import ContextInterface
from step35.options import EngineOptions
from step35.planning.memory_pressure import Level


class EngineInterface(Protocol):
    """A loaded model as its sessions see it; engine.Engine is one."""

    options: EngineOptions
    trunk: ContextInterface
    drafter: Drafter
    budget: Budget
    """For all that is kept for later."""
    clock: Callable[[], float]
    n_ctx: int
    """Tokens of the context that all sessions share."""
    window: int
    """Positions that a sliding-window layer sees, the token's own included."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def turn_start(self) -> int | None:
        """The token that begins a message; None in a vocabulary without chat tokens."""
        ...

    @property
    def n_free_cells(self) -> int:
        """Tokens that still fit into the context."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        ...

    def check_pressure(self, most: Level) -> None:
        """Raises DoesNotFit if the memory is shorter than `most` tolerates."""
        ...

    def release(self, seq: int) -> None:
        """Takes back the sequence of a session that is closed."""
        ...
