"""The depth controller in a simulated world: it finds the better depth and never pays much for looking."""

import numpy as np
import pytest

from step35.drafting.acceptance import Drafted
from step35.drafting.decode_costs import Costs
from step35.drafting.depth_controller import (
    CAUTION,
    COOLDOWN,
    DECISION_SHARE,
    LEAST_READ,
    LONGEST_COOLDOWN,
    READ_SHARE,
    DepthController,
)

PLAIN_S = 0.040


class World:
    """Verification and head times, and heads whose drafts are accepted at a rate that margins tell."""

    def __init__(self, growth: float, draft_s: float, skill: float, jump: float = 0.0, seed: int = 0) -> None:
        self.growth, self.draft_s, self.skill, self.jump = growth, draft_s, skill, jump
        self.rng = np.random.default_rng(seed)
        self.controller = DepthController(3)
        for width in (1, 2, 3, 4):
            self.controller.costs.observe_verify(width, self.verify_s(width))
        for head in range(3):
            self.controller.costs.observe_draft(head, draft_s)
        self.depths: list[int] = []

    def verify_s(self, width: int) -> float:
        return PLAIN_S * (1 + self.growth * (width - 1) + self.jump * (width > 1))

    def run(self, n_rounds: int, depth: int | None = None) -> float:
        """Returns the seconds per token of rounds drafted by the controller, or at a fixed depth."""
        n_tokens = seconds = 0.0
        for _ in range(n_rounds):
            tokens, elapsed = self._round(depth)
            n_tokens, seconds = n_tokens + tokens, seconds + elapsed
        return seconds / n_tokens

    def _round(self, depth: int | None) -> tuple[int, float]:
        c, drafts, chain_rate, elapsed = self.controller, [], 1.0, 0.0
        is_considered = c.begin_round()
        for head in range(3 if is_considered or depth is not None else 0):
            if not (head < depth if depth is not None else c.rows_to_read(head, chain_rate) is not None):
                break
            elapsed += self.draft_s
            margin = self.rng.exponential(3.0 * self.skill + 0.05)
            if depth is None and not c.keeps(head, chain_rate, margin):
                break
            drafts.append(Drafted(0, margin))
            chain_rate *= c.rate(head, margin)
        if is_considered:
            c.end_proposal(len(drafts))
        n_accepted = self._n_accepted(drafts)
        verify = self.verify_s(len(drafts) + 1)
        c.costs.observe_verify(len(drafts) + 1, verify)
        c.learn_heads(drafts, n_accepted)
        c.learn_round(n_accepted + 1, elapsed + verify)
        self.depths.append(len(drafts))
        return n_accepted + 1, elapsed + verify

    def _n_accepted(self, drafts: list[Drafted]) -> int:
        for i, draft in enumerate(drafts):
            if self.rng.random() > self.skill * (1 - np.exp(-draft.margin)):
                return i
        return len(drafts)


WORLDS = {
    "one memory": (0.45, 0.07, 0.9),
    "overlapping experts": (0.28, 0.07, 0.9),
    "experts on the CPU": (0.88, 0.10, 0.9),
    "poor heads": (0.45, 0.10, 0.3),
    "wrecked heads": (0.45, 0.10, 0.0),
    "free verification": (0.02, 0.02, 0.95),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_it_is_never_slower_than_plain_and_close_to_the_best_fixed_depth(name):
    growth, draft, skill = WORLDS[name]
    seconds = World(growth, draft * PLAIN_S, skill).run(3000)
    assert PLAIN_S / seconds > 0.98
    fixed = [World(growth, draft * PLAIN_S, skill).run(3000, depth) for depth in range(4)]
    assert seconds < 1.03 * min(fixed)


@pytest.mark.parametrize("skill", [0.99, 0.5, 0.0])
def test_an_expensive_second_token_does_not_hide_the_cheap_third_and_fourth(skill):
    """Two tokens took 1.9 plain decodes, four took 2.1: three drafts won, one lost, and so none was drafted."""
    seconds = World(0.1, 0.1 * PLAIN_S, skill, jump=0.8).run(3000)
    fixed = [World(0.1, 0.1 * PLAIN_S, skill, jump=0.8).run(3000, depth) for depth in range(4)]
    assert seconds < 1.03 * min(fixed)


def test_heads_that_never_agree_are_soon_left_alone():
    world = World(0.45, 0.1 * PLAIN_S, 0.0)
    world.run(1000)
    assert np.mean(world.depths[500:]) < 0.05


def test_it_comes_back_to_drafting_when_the_text_becomes_predictable():
    world = World(0.45, 0.07 * PLAIN_S, 0.0)
    world.run(1500)
    world.skill = 0.95
    world.run(1500)
    assert np.mean(world.depths[-300:]) > 0.8


def test_it_stops_drafting_when_verification_becomes_expensive():
    world = World(0.1, 0.05 * PLAIN_S, 0.9)
    world.run(500)
    assert np.mean(world.depths[-100:]) > 1
    world.growth = 1.5
    world.run(1500)
    assert np.mean(world.depths[-300:]) < 0.3


def test_unmeasured_widths_lie_on_the_line_of_their_neighbours():
    costs = Costs()
    for width, seconds in ((1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)):
        costs.observe_verify(width, seconds)
    assert [costs.verify(width) for width in (1, 2, 3, 4, 6, 8, 10)] == [1.0, 1.5, 2.0, 2.5, 3.5, 4.5, 5.5]


def test_one_slow_sample_changes_nothing():
    costs = Costs()
    for seconds in (1.0, 1.0, 90.0, 1.0):
        costs.observe_verify(1, seconds)
    assert costs.verify(1) == 1.0


def test_fewer_tokens_never_cost_more():
    """A machine that stalled once while it was calibrated: the wider decodes tell the truth."""
    costs = Costs()
    costs.observe_verify(1, 900.0)
    costs.observe_verify(2, 0.5)
    assert costs.verify(1) == costs.verify(2) == 0.5


def test_looking_up_gives_way_to_heads_that_are_right():
    """The first round of heads in an answer reads the prompt, too: by its speed any look-up seemed faster."""
    world = World(0.3, 0.05 * PLAIN_S, 0.97)
    world.run(300)
    assert world.controller.lookup_depth(match_length=2, n_available=7) == 0
    world = World(0.3, 0.5 * PLAIN_S, 0.0)
    world.run(300)
    assert world.controller.lookup_depth(match_length=16, n_available=7) > 0


def expensive_rows() -> tuple[DepthController, float]:
    """Returns a controller of one head, and the seconds that a round with it is believed to gain."""
    controller = DepthController(1)
    for width, seconds in ((1, 0.050), (2, 0.055)):
        controller.costs.observe_verify(width, seconds)
    controller.costs.observe_draft(0, 0.005)
    controller.costs.row_s = 0.001
    return controller, CAUTION * (controller._heads[0].mean_rate() * 0.050 - 0.005) - 0.005


def n_read(controller: DepthController, n_behind: int) -> int:
    """Returns how many of the rows that it missed the head reads; it must run."""
    n = controller.rows_to_read(0, 1.0, n_behind)
    assert n is not None
    return n


def test_a_head_reads_as_many_of_the_rows_it_missed_as_it_is_likely_to_win_back():
    """A head that was worth it in one round of seven read each time all that it had missed, and lost by that."""
    controller, gain_s = expensive_rows()
    n_paid = int(READ_SHARE * 10 * gain_s / 0.001)
    assert controller.rows_to_read(0, 1.0, n_paid) == n_paid, "at first it is trusted for ten rounds"
    assert controller.rows_to_read(0, 1.0, n_paid + 100) == pytest.approx(n_paid, abs=1), "and reads the last ones"
    for i in range(70):
        controller.begin_round()
        if i % 7 == 0:
            controller.rows_to_read(0, 1.0)
        controller.learn_round(1, 0.050)
    assert n_read(controller, n_paid) < n_paid / 5, "it will soon have a gap again"
    assert controller.rows_to_read(0, 1.0) == 0, "a head that is caught up runs for this round alone"


def test_a_head_that_could_read_next_to_nothing_does_not_run():
    controller, gain_s = expensive_rows()
    controller.costs.row_s = READ_SHARE * 10 * gain_s / (LEAST_READ - 1)
    assert controller.rows_to_read(0, 1.0, 100) is None
    controller.costs.row_s = READ_SHARE * 10 * gain_s / (LEAST_READ + 1)
    assert controller.rows_to_read(0, 1.0, 100) in (LEAST_READ, LEAST_READ + 1)


def test_drafting_is_in_cooldown_while_a_head_has_too_much_to_catch_up_with():
    """On a small model each token of a short answer paid for decisions about heads that were not going to run."""
    controller, _ = expensive_rows()
    controller.costs.row_s = 1.0
    considered = []
    for _ in range(20):
        considered.append(controller.begin_round())
        if considered[-1]:
            assert controller.rows_to_read(0, 1.0, 100) is None
            controller.end_proposal(0)
        controller.learn_round(1, 0.050)
    assert considered == ([True] + [False] * COOLDOWN + [True] + [False] * COOLDOWN + [True, False])


def test_expensive_decisions_make_a_long_cooldown():
    """On a model of 0.6 ms a token, the decision took 0.15 ms of every ninth."""
    controller, _ = expensive_rows()
    controller.begin_round()
    plain_s = controller.costs.verify(1)
    controller.end_proposal(0, seconds=plain_s / 5)
    assert next(n for n in range(1000) if controller.begin_round()) == LONGEST_COOLDOWN
    controller.end_proposal(0, seconds=plain_s * DECISION_SHARE)
    assert next(n for n in range(1000) if controller.begin_round()) == COOLDOWN


def test_short_answers_are_no_reason_to_read_a_long_prompt():
    """Every answer of ten tokens paid for a window of rows."""
    controller, _ = expensive_rows()
    at_first = n_read(controller, 512)
    for _ in range(20):
        for _ in range(5):
            controller.learn_round(2, 0.060)
        controller.resume()
    assert n_read(controller, 512) < 0.7 * at_first


def test_a_new_text_is_not_measured_by_the_speed_of_the_last():
    """After text that look-ups drafted at three tokens a decode, no head seemed worth its time in the next chat."""
    controller = DepthController(1)
    controller.costs.observe_verify(1, 0.050)
    for _ in range(100):
        controller.learn_round(7, 0.070)
    assert controller.token_value_s() == pytest.approx(0.010)
    controller.resume()
    assert controller.token_value_s() == 0.050


def test_plain_probes_are_paid_for_and_need_heads():
    """After a new prompt a plain decode seemed to cost nothing: it was probed without end, and nothing looked up."""
    for n_heads in (0, 1):
        controller = DepthController(n_heads)
        controller.costs.observe_verify(1, 0.050)
        controller._budget_s, n_probes = 1.0, 0
        for _ in range(200):
            controller.begin_round()
            n_probes += controller._probe_depth == 0
            controller.learn_round(1, 0.050)
        assert n_probes <= 1.0 / 0.050 + 1 if n_heads else n_probes == 0
