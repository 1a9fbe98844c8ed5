"""What decodes cost on this machine, measured before the first round: the depth controller decides by it."""

from collections.abc import Callable

import numpy as np

from step35.drafting.decode_costs import Costs
from step35.drafting.mtp_heads import Heads
from step35.native.interface import ContextInterface
from step35.native.rows import Rows
from step35.row_counts import MEASURED_WIDTHS, REPLAYED_ROWS

USUAL_ROWS = 2
"""Of a head's run: the new one, and one that was accepted or is replayed."""

Clock = Callable[[], float]


def calibrate(trunk: ContextInterface, n_vocab: int, heads: Heads, costs: Costs, clock: Clock) -> None:
    """Measures a decode of each width and a run of each head; on a busy machine the fastest is the truest."""
    for width in MEASURED_WIDTHS:
        tokens = [i * n_vocab // width for i in range(width)]  # unlike ones touch other experts
        costs.observe_verify(width, _least_s(trunk, Rows(0, 0, tokens, outputs=width), clock))
    if heads:
        _calibrate_heads(heads, costs, clock)


def _calibrate_heads(heads: Heads, costs: Costs, clock: Clock) -> None:
    n_usual = max(USUAL_ROWS, heads.n_least)
    for head, context in enumerate(heads.contexts):
        costs.observe_draft(head, _least_s(context, _head_rows(heads, head, n_usual), clock))
    first = heads.contexts[0]
    many_s = _least_s(first, _head_rows(heads, 0, first.n_batch), clock)
    costs.row_s = max(0.0, many_s - costs.draft(0)) / (first.n_batch - n_usual)


def choose_padding(heads: Heads, clock: Clock) -> None:
    """Pads a head's runs to one shape where that is faster than to build a graph for each number of rows.

    It is where a row costs next to nothing. On a CPU it costs what a row of a prompt does.
    """
    context = heads.contexts[0]
    padded_s = _least_s(context, _head_rows(heads, 0, REPLAYED_ROWS), clock)
    varied = [[_decode_s(context, _head_rows(heads, 0, n), clock) for n in range(1, REPLAYED_ROWS)] for _ in range(3)]
    if sum(map(min, zip(*varied, strict=True))) < padded_s * (REPLAYED_ROWS - 1):
        heads.n_least = 1


def _head_rows(heads: Heads, head: int, n: int) -> Rows:
    n_outputs = heads.n_outputs(head, n, has_new=True)
    return Rows(0, 0, [0] * n, n_outputs, np.zeros((n, heads.n_embd), np.float32))


def _least_s(context: ContextInterface, rows: Rows, clock: Clock) -> float:
    """Returns the seconds of a decode: the least of three, after one that builds the graph."""
    _decode_s(context, rows, clock)
    return min(_decode_s(context, rows, clock) for _ in range(3))


def _decode_s(context: ContextInterface, rows: Rows, clock: Clock) -> float:
    started = clock()
    context.decode([rows])
    context.logits()
    seconds = clock() - started
    context.truncate(rows.seq, 0)
    return seconds
