"""Which session serves a prompt: the rules, on views of sessions."""

from typing import Any

from step35.server.cache.slots import Choice, SlotView, choose_slot, eviction_order, why_broken

LONG, SHORT = 5000, 100


def slot(index: int, n_tokens: int = 0, **facts: Any) -> SlotView:
    return SlotView(index, n_tokens, **facts)


def test_the_next_turn_goes_where_its_conversation_is():
    slots = [slot(0, LONG, n_common=4000, last_start=4500), slot(1, 4800, n_common=4800, n_here=4800, last_start=4700)]
    assert choose_slot(5200, slots, 1000, 2) == Choice(1)


def test_a_side_request_never_takes_a_long_timeline():
    slots = [slot(0, LONG, last_used_s=1), slot(1, LONG, last_used_s=2), slot(2, SHORT, last_used_s=3)]
    assert choose_slot(200, slots, 1000, 2) == Choice(2)
    assert choose_slot(200, [*slots[:2], slot(2, SHORT, is_busy=True)], 1000, 2) is None
    assert choose_slot(6000, slots, 1000, 2) == Choice(0), "the longest unused, and one place stays for short ones"


def test_idle_conversations_dont_keep_the_last_answers_from_running():
    """Four short requests beside four idle conversations ran two at a time: the others waited for a short one's session."""
    slots = [slot(i, LONG, last_used_s=9 - i) for i in range(3)] + [slot(i, SHORT, is_busy=True) for i in (3, 4)]
    assert choose_slot(200, slots, 1000, 3) is None, "so many are kept"
    assert choose_slot(200, slots, 1000, 2) == Choice(2), "the longest unused goes"


def test_a_new_conversation_shares_the_prefix_and_leaves_the_old_one_alone():
    slots = [slot(0, LONG, n_common=3000, n_here=2500, n_fork=2500, last_start=4900), slot(1), slot(2, SHORT)]
    assert choose_slot(4000, slots, 1000, 2) == Choice(1, source=0, n_fork=2500)


def test_a_prompt_waits_for_a_prefix_that_is_on_its_way():
    slots = [slot(0, LONG, n_common=900, n_coming=3000, is_busy=True), slot(1)]
    assert choose_slot(4000, slots, 1000, 2) is None
    assert choose_slot(4000, [slot(0, LONG, n_common=3000, n_fork=3000, is_busy=True), slot(1)], 1000, 2) == Choice(
        1, 0, 3000
    )


def test_room_is_made_from_the_short_ones_first():
    slots = [
        slot(0, LONG, last_used_s=1),
        slot(1, SHORT, last_used_s=9),
        slot(2),
        slot(3, LONG, is_busy=True),
        slot(4, LONG, last_used_s=0),
    ]
    assert [view.index for view in eviction_order(slots, 1000)] == [1, 4, 0]


def test_a_broken_prefix_is_told_with_both_sides():
    told = why_broken([1, 2, 3, 4], [1, 2, 9, 4, 5], lambda tokens: " ".join(map(str, tokens)))
    assert told == "prompt parts from the cache at token 2 of 4: cached '1 2 3 4', asked '1 2 9 4 5'"
