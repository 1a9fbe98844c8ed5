"""How long the model may reason: a budget for each user request, and when to close the reasoning. Pure.

Past the soft share of what is left of the budget, the reasoning is closed at the next end of a line or a
sentence; at the budget itself it is closed wherever it is. Without a budget nothing is ever forced.

A full stop ends a sentence if white space follows. That comes with the next word, as one token, so the next
token is looked at before it is taken: `self.` and `3.` end nothing.
"""

import re
from dataclasses import dataclass
from math import inf

from step35.chat.messages import Conversation
from step35.markup import THINK_END

BUDGETS: dict[str | None, int | None] = {"none": 0, "low": 1024, "medium": 8192, "high": None, None: None}
"""Tokens of reasoning for one user request, over its whole tool loop."""
SOFT_SHARE = 0.75
ENDS = ("\n", ". ", "! ", "? ", "。", "！", "？")
_MAY_END = re.compile(r"""[.!?]["')\]*`]*$""")


def budget_of(effort: str | None, n_tokens: int | None) -> int | None:
    """Returns the tokens of reasoning that a user request may take in all; None is without end.

    `n_tokens` is a budget that the client gave; it goes before any effort but "none".
    """
    return BUDGETS[effort] if n_tokens is None or effort == "none" else n_tokens


def reasoning_so_far(conversation: Conversation) -> tuple[str, ...]:
    """Returns the reasoning of this user request's earlier turns: after the last message of the user."""
    messages = conversation.messages
    after = next((i + 1 for i in range(len(messages) - 1, -1, -1) if messages[i].role == "user"), 0)
    return tuple(m.reasoning for m in messages[after:] if m.role == "assistant" and m.reasoning)


@dataclass(slots=True)
class ReasoningWatch:
    """Watches one turn's reasoning; `n_left` tokens of the budget are left by earlier turns, inf without a budget."""

    n_left: float
    n_spent: int = 0
    _tail: str = ""

    def add(self, text: str, n_tokens: int = 1) -> str | None:
        """Takes what a token added and returns the text to force now, if the reasoning must end."""
        self.n_spent += n_tokens
        self._tail = (self._tail + text)[-4:]
        return self.due()

    @property
    def depends_on_next(self) -> bool:
        """Whether the next token's text decides if it is time."""
        return self._is_soft and _MAY_END.search(self._tail) is not None

    def due(self, following: str = "") -> str | None:
        """Returns the text that ends the reasoning if it is time: on a line of its own, as the template has it.

        `following` is what would come next otherwise.
        """
        if not self._is_soft or (self.n_spent < self.n_left and not self._is_boundary(following)):
            return None
        return f"{THINK_END}\n" if self._tail.endswith("\n") else f"\n{THINK_END}\n"

    @property
    def _is_soft(self) -> bool:
        return self.n_spent >= SOFT_SHARE * self.n_left

    def _is_boundary(self, following: str) -> bool:
        return self._tail.endswith(ENDS) or (following[:1].isspace() and _MAY_END.search(self._tail) is not None)


def watch(budget: int | None, n_spent_before: int) -> ReasoningWatch:
    """Returns the watch of a turn, given its user request's budget and the tokens that `reasoning_so_far` took."""
    return ReasoningWatch(inf if budget is None else max(budget - n_spent_before, 0))
