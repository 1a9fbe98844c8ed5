"""The rules of drafting, proved on a fake llama.cpp that checks what every row was computed from."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_native import EOG, N_VOCAB, FakeContext, Script, exact_marks, loader, next_token
from step35.drafting.depth_controller import LEAST_READ
from step35.drafting.draft_round import DraftState
from step35.drafting.mtp_heads import REPLAYED_ROWS
from step35.engine.decode_loop import begin, generate, step
from step35.engine.engine import Engine
from step35.engine.session import Session
from step35.errors import Cancelled, ContextFull, SettingsError
from step35.options import EngineOptions
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser

GREEDY = Sampling(temperature=0)


class Ticks:
    """A clock that moves by one millisecond at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def engine(
    script: Script,
    draft: str = "3",
    clock: Ticks | None = None,
    *,
    n_ctx: int = 1024,
    n_batch: int = 32,
    n_sessions: int = 1,
) -> Engine:
    """An engine past its calibration; on such a clock a run of a head takes the same time with any number of rows."""
    options = EngineOptions(Path("fake"), draft=draft, n_ctx=n_ctx, n_batch=n_batch, n_sessions=n_sessions)
    e = Engine(options, loading=loader(script), clock=clock or Ticks())
    for context in script.contexts:
        context.decodes.clear()
    return e


def prompt_of(n: int) -> list[int]:
    return [(7 * i + 2) % EOG for i in range(n)]


def run(e: Engine, prompt: list[int], n: int, sampling: Sampling = GREEDY) -> list[int]:
    with e.open_session() as session:
        return list(generate(begin(session, prompt, Chooser(sampling), n)))


def expected(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens[-1], len(tokens) - 1))
    return tokens[len(prompt) :]


def check_heads(script: Script, session: Session) -> None:
    """Every row that a head's cache calls final equals the exact chain."""
    contexts = [context for context in script.contexts if context.head is not None]
    for head, (context, state) in enumerate(zip(contexts, session.draft_state.heads, strict=True)):
        exact = exact_marks(session.tokens, head)
        final = {p: c.digest for p, c in context.cells.get(session.seq, {}).items() if p < state.n_final}
        assert final == {p: exact[p] for p in final}


@pytest.mark.parametrize("draft", ["off", "1", "2", "3", "auto", "ngram"])
def test_text_is_the_trunks_own_however_it_is_drafted(draft):
    script = Script(is_wrong=lambda head, position: position % 3 == 0)
    assert run(engine(script, draft), prompt_of(20), 100) == expected(prompt_of(20), 100)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_right_heads_are_always_accepted_and_a_round_runs_each_head_once(depth):
    script = Script()
    e = engine(script, str(depth))
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), 1 + 10 * (depth + 1))
        list(generate(turn))
        assert turn.stats.accepted_per_head == turn.stats.drafted_per_head == [10] * depth
    heads = [c for c in script.contexts if c.head is not None]
    assert len(heads) == depth
    warm_up = 1  # the prompt's window, 8 rows, takes a decode more than the usual
    assert [len(c.decodes) for c in heads] == [10 + warm_up] * depth


@pytest.mark.parametrize("returns_all_rows", [False, True])
@pytest.mark.parametrize("n_least", [1, REPLAYED_ROWS])
@pytest.mark.parametrize("rejected", [0, 1, 2])
def test_after_a_rejection_at_any_place_the_chain_is_exact_again(rejected, n_least, returns_all_rows):
    script = Script(
        is_wrong=lambda head, position: head == rejected and position % 3 == 0, returns_all_rows=returns_all_rows
    )
    e = engine(script)
    e.drafter.heads.n_least = n_least
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), 60)
        while turn.finish is None:
            step(e, [turn])
            check_heads(script, session)
        assert turn.generated == expected(prompt_of(20), 60)
        assert 0 < turn.stats.n_accepted < turn.stats.n_drafted


def test_where_rows_cost_nothing_a_head_decodes_a_constant_number_of_them():
    script = Script(is_wrong=lambda head, position: position % 3 == 0)
    e = engine(script)
    run(e, prompt_of(20), 100)
    for context in script.contexts[1:]:
        assert {len(rows[0].tokens) for rows in context.decodes[3:]} == {REPLAYED_ROWS}


def test_where_rows_cost_time_a_head_decodes_no_more_than_it_must():
    """On a CPU four rows take four times as long as one, and each round paid for four."""
    clock = Ticks()

    def spend(context: FakeContext) -> None:
        clock.now += 1e-2 * context.n_rows

    script = Script(is_wrong=lambda head, position: True, on_decode=spend)
    assert run(engine(script, clock=clock), prompt_of(20), 100) == expected(prompt_of(20), 100)
    for head, context in enumerate(script.contexts[1:]):
        # the new row, and those that read rejected drafts of the heads before
        assert {len(rows[0].tokens) for rows in context.decodes[3:]} == {1 + head}


@pytest.mark.parametrize(("returns_all_rows", "wanted"), [(False, {0: 36, 1: 36, 2: 1}), (True, {0: 1, 1: 1, 2: 1})])
def test_only_new_rows_have_logits_where_hidden_states_come_without_them(returns_all_rows, wanted):
    """The output matrix is two thirds of a head; stock llama.cpp runs it for every row that the next head reads."""
    script = Script(n_swa=36, returns_all_rows=returns_all_rows)
    e = engine(script, "3")
    with e.open_session() as session:
        step_to_first_draft(e, session, prompt_of(40))
    heads = {context.head: context.decodes for context in script.contexts if context.head is not None}
    n_outputs = {head: sum(r.outputs for rows in decodes[-2:] for r in rows) for head, decodes in heads.items()}
    assert n_outputs == wanted


def step_to_first_draft(e: Engine, session: Session, prompt: list[int]) -> None:
    turn = begin(session, prompt, Chooser(GREEDY), 9)
    while not turn.stats.n_drafted:
        step(e, [turn])


def test_where_rows_are_expensive_a_head_reads_the_end_of_the_prompt_only():
    """A short answer never won back what reading the whole window had taken."""
    clock = Ticks()

    def spend(context: FakeContext) -> None:
        clock.now += 0.1 if context.head is None else 0.01 + 0.02 * context.n_rows

    script = Script(n_swa=36, on_decode=spend)
    e = engine(script, "auto", clock=clock)
    assert run(e, prompt_of(60), 100) == expected(prompt_of(60), 100)
    first = script.contexts[1].decodes[0][0]
    assert 60 - 36 < first.start < 60 - LEAST_READ
    assert first.start + len(first.tokens) == 60


def test_reading_a_prompt_is_no_reason_for_a_cooldown():
    """Nothing was drafted while a prompt was read, and so each answer began with eight plain steps."""
    clock = Ticks()

    def spend(context: FakeContext) -> None:
        clock.now += 1.0 if context.head is None else 1e-2

    e = engine(Script(on_decode=spend), "auto", clock)
    with e.open_session() as session:
        turn = begin(session, prompt_of(70), Chooser(GREEDY), 20)
        while session.n_past < 70:
            step(e, [turn])
        assert not turn.stats.n_drafted
        step(e, [turn])
        assert turn.stats.accepted_per_head == [1, 1, 1]


def test_the_heads_see_the_prompts_last_window_only():
    script = Script(n_swa=8)
    e = engine(script, n_batch=16)
    run(e, prompt_of(300), 8)
    assert sum(len(r.tokens) for rows in script.contexts[1].decodes[:2] for r in rows) == 8
    assert min(r.start for rows in script.contexts[1].decodes for r in rows) == 300 - 8


def test_off_asks_for_no_hidden_states_and_loads_no_heads():
    script = Script(on_decode=lambda context: None)
    e = engine(script, "off")
    run(e, prompt_of(20), 10)
    assert [c.head for c in script.contexts] == [None]
    assert not script.contexts[0]._extracts


def test_a_file_without_heads_runs_plain_and_says_so():
    e = engine(Script(n_heads=0), "auto")
    assert run(e, prompt_of(20), 30) == expected(prompt_of(20), 30)
    assert e.notes == ["fake has no MTP heads: running without them"]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    n_batch=st.integers(16, 40),
    slack=st.integers(0, 6),
    wrong=st.integers(2, 5),
    data=st.data(),
)
def test_sequences_of_unequal_length_in_one_batch_dont_touch_each_other(lengths, n_batch, slack, wrong, data):
    """Prompts in chunks, generation and rewinds, interleaved at random over the ring's end."""
    script = Script(is_wrong=lambda head, position: position % wrong == 0, ring_slack=8 + slack)
    e = engine(script, n_sessions=len(lengths), n_batch=n_batch)
    turns = [begin(e.open_session(), prompt_of(n), Chooser(GREEDY), 30) for n in lengths]
    while live := [turn for turn in turns if turn.finish is None]:
        chosen = data.draw(st.lists(st.sampled_from(range(len(live))), min_size=1, unique=True))
        step(e, [live[i] for i in chosen])
        for turn in turns:
            check_heads(script, turn.session)
    for turn, n in zip(turns, lengths, strict=True):
        assert turn.generated == expected(prompt_of(n), 30)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**64 - 1), temperature=st.floats(0.1, 3), wrong=st.integers(2, 6), flatness=st.floats(0, 2))
def test_the_same_seed_gives_the_same_text_at_any_depth(seed, temperature, wrong, flatness):
    sampling = Sampling(temperature=temperature, top_p=0.9, seed=seed)
    texts = []
    for draft in ("off", "1", "3", "auto", "ngram"):
        script = Script(is_wrong=lambda head, position: position % wrong == 0, flatness=flatness)
        texts.append(run(engine(script, draft), prompt_of(12), 40, sampling))
    assert texts == [texts[0]] * len(texts)


def test_the_end_token_inside_a_draft_ends_the_turn_there():
    script = Script(ends_at=30)
    e = engine(script)
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), 100)
        assert list(generate(turn)) == expected(prompt_of(20), 10)
        assert (turn.finish, session.tokens[-1], session.n_past) == ("stop", EOG, 30)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 17])
def test_exactly_n_tokens_are_generated(n):
    e = engine(Script())
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), n)
        assert list(generate(turn)) == expected(prompt_of(20), n)
        assert turn.finish == "length"


def test_a_cancelled_step_leaves_the_timeline_as_it_was():
    script = Script()
    e = engine(script)
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), 50)
        step(e, [turn])
        tokens = list(session.tokens)
        e.cancel()
        with pytest.raises(Cancelled):
            step(e, [turn])
        assert session.tokens == tokens
        list(generate(turn))
        assert turn.generated == expected(prompt_of(20), 50)


def test_a_head_cancelled_in_its_decode_drafts_on_correctly():
    script = Script()
    e = engine(script)
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), 50)
        for _ in range(3):
            step(e, [turn])
        script.contexts[2].cancel()
        with pytest.raises(Cancelled):
            step(e, [turn])
        while turn.finish is None:
            step(e, [turn])
            check_heads(script, session)
        assert turn.generated == expected(prompt_of(20), 50)


def test_the_context_fills_to_its_last_token_and_no_further():
    e = engine(Script(), n_ctx=64)
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), -1)
        assert list(generate(turn)) == expected(prompt_of(20), 44)
        assert (turn.finish, len(session.tokens)) == ("length", 64)


def test_a_full_shared_context_is_an_error_with_numbers():
    e = engine(Script(), n_ctx=64, n_sessions=2)
    turns = [begin(e.open_session(), prompt_of(30), Chooser(GREEDY), -1) for _ in range(2)]
    with pytest.raises(ContextFull, match=r"context full: .* left of 64"):
        while True:
            step(e, turns)


def test_lookup_drafts_a_repetition():
    """A timeline that repeats with period 16 is drafted from its own past, and accepted."""
    script = Script(n_heads=0)
    e = engine(script, "ngram")
    prompt = [t for _ in range(4) for t in range(1, 17)]
    with e.open_session() as session:
        chooser = Chooser(Sampling(temperature=0, logit_bias={}))
        chooser.choose = lambda logits, history: history[-16]
        turn = begin(session, prompt, chooser, 200)
        list(generate(turn))
        assert session.tokens == [t for _ in range(17) for t in range(1, 17)][: 64 + 200]
        assert turn.stats.n_accepted > 100


def test_a_rewind_reuses_what_the_ring_holds_and_drafts_exactly():
    script = Script(n_swa=8, ring_slack=12)
    e = engine(script)
    with e.open_session() as session:
        turn = begin(session, prompt_of(20), Chooser(GREEDY), 30)
        list(generate(turn))
        n_decodes = len(script.contexts[0].decodes)
        prompt = [*session.tokens[:45], 5, 6]
        turn = begin(session, prompt, Chooser(GREEDY), 30)
        assert turn.stats.n_reused == 45
        while turn.finish is None:
            step(e, [turn])
            check_heads(script, session)
        assert turn.generated == expected(prompt, 30)
        assert script.contexts[0].decodes[n_decodes][0].start == 45


def test_token_ids_outside_the_vocabulary_are_refused():
    with engine(Script()).open_session() as session, pytest.raises(SettingsError, match="bad token"):
        session.sync([1, N_VOCAB])


def test_look_ups_reach_farther_in_a_text_while_they_are_right():
    """In a text that only resembled itself, seven wrong tokens were verified at a time."""
    state = DraftState([])
    reached = [state.reach]
    for n_accepted in (2, 4, 7, 7, 3, 3, 0, 1):
        state.learn_reach(state.reach, n_accepted)
        reached.append(state.reach)
    assert reached == [2, 4, 7, 7, 7, 3, 6, 1, 2]
