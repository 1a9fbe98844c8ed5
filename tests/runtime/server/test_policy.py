"""The scheduler's rules as numbers: who waits, how many rows of prompts a step reads, and whose time it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.chat.prompt_builder import LEAST_PIECE
from step35.server.policy import BURST_S, PREFILL_CHUNK, ROWS_PER_ANSWER, Limits, PrefillPolicy, waits_again

SECONDS = st.floats(1e-4, 10)


def test_as_many_jobs_are_taken_as_may_run_and_wait():
    assert Limits(4, 32).n_jobs == 36
    assert Limits(1, 0).n_jobs == 1


@pytest.mark.parametrize(
    ("n_batch", "n_rows", "has_answers", "n_read"),
    [
        (2048, 100, False, 2048),  # all that fits
        (2048, 5000, False, 2048),
        (2048, 5000, True, PREFILL_CHUNK),
        (128, 5000, True, 128),
        (512, 512, False, 512),  # no remainder
        (512, 512 + 1, False, 512 - LEAST_PIECE),
        (512, 512 + LEAST_PIECE - 1, False, 512 - LEAST_PIECE),
        (512, 512 + LEAST_PIECE, False, 512),  # a remainder that is worth a decode
        (LEAST_PIECE, LEAST_PIECE + 1, False, LEAST_PIECE),  # a batch that can't be made smaller
    ],
)
def test_a_step_reads_all_that_fits_and_leaves_no_remainder_of_a_few(
    n_batch: int, n_rows: int, has_answers: bool, n_read: int
):
    assert PrefillPolicy(n_batch).chunk(n_rows, has_answers) == n_read


@given(st.integers(1, 4096), st.integers(1, 20000), st.booleans())
def test_a_prompt_is_read_to_its_end_in_pieces_that_fit(n_batch: int, n_rows: int, has_answers: bool):
    policy, pieces = PrefillPolicy(n_batch), []
    while (n_left := n_rows - sum(pieces)) > 0:
        pieces.append(min(policy.chunk(n_left, has_answers), n_left))
        assert 0 < pieces[-1] <= n_batch
    if n_rows >= LEAST_PIECE and n_batch >= 2 * LEAST_PIECE:
        assert pieces[-1] >= LEAST_PIECE, "no remainder of a few rows"


def test_the_first_quarter_of_a_second_is_free_and_then_the_answers_have_their_half():
    policy, reads = PrefillPolicy(512), []
    for _ in range(40):
        reads.append(policy.reads_prompts(has_answers=True))
        policy.charge(0.05, read_prompts=reads[-1], has_answers=True)
    n_free = reads.index(False)
    assert n_free == 6, "0.25 s are not more than 0.25 s"
    assert reads[n_free:] == [False, True] * 17


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=60))
def test_prompts_take_half_of_the_time_a_burst_and_a_step_at_most(steps: list[tuple[float, float]]):
    policy = PrefillPolicy(512)
    with_prompts_s = alone_s = 0.0
    for prompt_s, answer_s in steps:
        if policy.reads_prompts(has_answers=True):
            policy.charge(prompt_s, read_prompts=True, has_answers=True)
            with_prompts_s += prompt_s
        else:
            policy.charge(answer_s, read_prompts=False, has_answers=True)
            alone_s += answer_s
        assert with_prompts_s <= alone_s + BURST_S + max(step for step, _ in steps) + 1e-6


def test_without_answers_there_is_nobody_to_wait_for():
    policy = PrefillPolicy(512)
    policy.charge(60.0, read_prompts=True, has_answers=True)
    assert not policy.reads_prompts(has_answers=True)
    assert policy.reads_prompts(has_answers=False)
    policy.charge(60.0, read_prompts=True, has_answers=False)
    assert policy.reads_prompts(has_answers=True), "what nobody waited for isn't counted"


def test_time_that_answers_had_alone_is_no_credit():
    policy = PrefillPolicy(512)
    policy.charge(60.0, read_prompts=False, has_answers=True)
    policy.charge(BURST_S + 0.1, read_prompts=True, has_answers=True)
    assert not policy.reads_prompts(has_answers=True)


def test_a_step_wants_cells_for_what_fits_into_its_batch_and_for_drafts():
    assert PrefillPolicy(512).cells_wanted(10, 3) == 10 + 3 * ROWS_PER_ANSWER
    assert PrefillPolicy(512).cells_wanted(9000, 2) == 512 + 2 * ROWS_PER_ANSWER


def test_the_youngest_prompt_waits_again_unless_it_is_alone():
    assert waits_again(n_prompts=1, n_running=2)
    assert not waits_again(n_prompts=1, n_running=1), "it would only begin again"
    assert not waits_again(n_prompts=0, n_running=3)
