"""What a sync keeps of a cached timeline."""

from hypothesis import given
from hypothesis import strategies as st

from step35.engine.prefix import Cached, SyncPlan, common_prefix, plan_sync

tokens = st.lists(st.integers(0, 3), max_size=40)


@given(
    cached=tokens, prompt=tokens.filter(len), window_start=st.integers(0, 40), window=st.integers(1, 16), data=st.data()
)
def test_a_plan_never_keeps_a_timeline_whose_window_is_lost(cached, prompt, window_start, window, data):
    window_start = min(window_start, len(cached))
    checkpoints = data.draw(st.sets(st.integers(1, max(len(cached), 1))))
    plan = plan_sync(Cached(cached, window_start, checkpoints), prompt, window)
    assert cached[: plan.n_keep] == prompt[: plan.n_keep]
    assert plan.n_keep < len(prompt)
    if plan.restore:
        assert plan.n_keep in checkpoints
    elif 0 < plan.n_keep < len(cached):
        assert window_start <= max(0, plan.n_keep - window + 1)


@given(cached=tokens, prompt=tokens.filter(len))
def test_with_nothing_lost_the_whole_common_prefix_is_kept(cached, prompt):
    plan = plan_sync(Cached(cached, 0, ()), prompt, 8)
    assert plan.n_keep == min(common_prefix(cached, prompt), len(prompt) - 1)


def test_the_nearest_checkpoint_before_the_fork_is_put_back():
    cached = Cached(list(range(100)), 80, {10, 30, 60})
    assert plan_sync(cached, [*range(50), 999, 999], 8) == SyncPlan(30, True, 50)
    assert plan_sync(cached, [*range(5), 999], 8) == SyncPlan(0, False, 5)
    assert plan_sync(cached, [*range(90), 999], 8) == SyncPlan(90, False, 90)
