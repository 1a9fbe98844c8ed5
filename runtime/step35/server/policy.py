"""Who runs, and how much of a step goes to prompts: the scheduler's rules, as numbers. Pure.

A prompt's prefill may fill a whole step. Where answers are running, steps with prompts take at most
half of the time: as long as such a step took, the answers then go on alone. The first BURST_S are free, so that
short prompts that come together begin together.
"""

from dataclasses import dataclass

from step35.chat.prompt_builder import LEAST_PIECE

PREFILL_CHUNK = 512
"""Rows of prompts in a step beside running answers."""
ROWS_PER_ANSWER = 8
"""Cells that a step may need for one turn, drafts included."""
BURST_S = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """How much runs and waits at a time."""

    n_parallel: int = 4
    n_waiting: int = 32

    @property
    def n_jobs(self) -> int:
        """Jobs that are taken at most."""
        return self.n_parallel + self.n_waiting


class PrefillPolicy:
    """Shares the time between prompts and running answers.

    `debt_s` is what steps with prompts have taken from running answers, less what these have had alone since.
    """

    def __init__(self, n_batch: int) -> None:
        self.n_batch = n_batch
        self.debt_s = 0.0

    def reads_prompts(self, has_answers: bool) -> bool:
        """Whether the next step reads prompts; else the running answers go on alone."""
        return not (has_answers and self.debt_s > BURST_S)

    def chunk(self, n_rows: int, has_answers: bool) -> int:
        """Returns how many rows of prompts a step reads of `n_rows`: all that fit, but no remainder of a few.

        On a CPU llama.cpp's attention takes rows by 64, and several times as long a row where there are fewer.
        """
        most = min(PREFILL_CHUNK, self.n_batch) if has_answers else self.n_batch
        return most - LEAST_PIECE if 0 < n_rows - most < LEAST_PIECE < most else most

    def charge(self, step_s: float, *, read_prompts: bool, has_answers: bool) -> None:
        """Counts the time of a step; without answers there is no debt."""
        change_s = step_s if read_prompts else -step_s
        self.debt_s = max(0.0, self.debt_s + change_s) if has_answers else 0.0

    def cells_wanted(self, n_pending: int, n_turns: int) -> int:
        """Returns the cells that a step of turns with so many undecoded tokens may need."""
        return min(n_pending, self.n_batch) + ROWS_PER_ANSWER * n_turns


def waits_again(n_prompts: int, n_running: int) -> bool:
    """Whether the youngest prompt waits again when a context is full of running turns; else an answer ends."""
    return n_prompts > 0 and n_running > 1
