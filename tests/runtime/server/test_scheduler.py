"""The scheduler on a fake llama.cpp: who runs when, what a leaving client stops, and what a broken sequence loses."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fake_native import FakeContext, Script, next_token
from narrowed import of, present
from server_fakes import Gate, answer, ask, events_of, fake_service, serve
from step35.chat.events import ContentDelta, Finished
from step35.chat.prompt_builder import LEAST_CHECKPOINT
from step35.server import run_start
from step35.server.constrained_chooser import LazyGrammar, is_endless
from step35.server.errors import ApiError
from step35.server.event_log import EventBridge
from step35.server.events import Event, Failed, Progress
from step35.server.service import Service


def greedy(prompt: list[int], n: int) -> str:
    """What the fake trunk writes after a prompt."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens[-1], len(tokens) - 1))
    return "".join(f"{token} " for token in tokens[len(prompt) :])


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ContentDelta))


def end_of(events: list[Event]) -> Finished:
    return of(Finished, events[-1])


def prompts(n: int, length: int = 20) -> list[list[int]]:
    return [[1, *(int(t) for t in np.random.default_rng(i).integers(2, 60, length))] for i in range(n)]


def test_many_answers_at_once_are_each_what_they_are_alone():
    async def talk(service: Service) -> None:
        results = await asyncio.gather(*(answer(service, ask(p, 12), f"r{i}") for i, p in enumerate(prompts(9))))
        for prompt, (_, events) in zip(prompts(9), results, strict=True):
            assert text_of(events) == greedy(prompt, 12)
            assert end_of(events).reason == "length"

    serve(fake_service(n_waiting=20), talk)


def test_the_next_turn_is_cached_and_a_side_request_takes_another_place():
    async def talk(service: Service) -> None:
        first = prompts(1, 120)[0]
        _, events = await answer(service, ask(first, 6))
        longer = [*first, *map(int, text_of(events).split()), 5, 6, 7]
        await answer(service, ask(prompts(2)[1], 3))
        _, events = await answer(service, ask(longer, 6))
        assert text_of(events) == greedy(longer, 6)
        assert end_of(events).usage.n_cached == len(longer) - 4, "all but the last sampled token and what came after"
        assert events[0] == Progress(len(longer) - 4, len(longer))

    serve(fake_service(), talk)


def test_a_text_asked_for_again_or_typed_on_is_cached():
    """A text without messages had no checkpoint and no place of its own: the same prompt was processed anew each time."""

    async def talk(service: Service) -> None:
        [text, other] = prompts(2, 300)
        _, events = await answer(service, ask(text, 90))
        whole = text_of(events)
        for prompt, n_cached in ((text, 297), ([*text[:-2], 5, 6, 7], 297), (text, 297)):
            await answer(service, ask(other[:40], 60))  # the ring goes on
            _, events = await answer(service, ask(prompt, 90))
            assert text_of(events) == greedy(prompt, 90)
            assert end_of(events).usage.n_cached == n_cached
        assert text_of(events) == whole

    serve(fake_service(n_ctx=1000), talk)


def test_a_few_common_tokens_are_no_checkpoint():
    """Two conversations have the first token in common: its checkpoint took the place of the one after the system's text."""

    async def talk(service: Service) -> None:
        for length in (8, 40):
            for prompt in prompts(5, length):
                await answer(service, ask([7, 8, *prompt[1:]], 3))
        checkpoints = [n for slot in service.model.pool.slots for n in slot.session.checkpoints]
        assert all(n >= LEAST_CHECKPOINT for n in checkpoints)

    serve(fake_service(), talk)


def clock_of_decodes(script: Script, decode_s: float) -> Callable[[], float]:
    """A clock that only decodes move."""
    return lambda: decode_s * sum(len(context.decodes) for context in script.contexts)


def read_beside_an_answer(n_prompt: int, decode_s: float) -> FakeContext:
    """Reads a prompt that comes after 30 decodes of an answer, on a clock of decodes; returns the trunk's context."""
    gate = Gate(30)
    script = Script(on_decode=gate)

    async def talk(service: Service) -> None:
        running, _ = await service.submit(ask(prompts(1)[0], 200), "answer", None)
        await gate.reached()
        job, _ = await service.submit(ask(prompts(2, n_prompt)[1], 2), "prompt", None)
        gate.open()
        await asyncio.gather(events_of(job), events_of(running))

    serve(fake_service(script, n_ctx=1000, draft="off", clock=clock_of_decodes(script, decode_s)), talk)
    [trunk] = [context for context in script.contexts if context.head is None]
    return trunk


def test_short_prompts_beside_an_answer_are_read_at_once_until_they_take_too_long():
    """Of four requests that came together the last waited while the first ones answered, for as long as it took to read them."""
    trunk = read_beside_an_answer(300, decode_s=0.03)
    has_prompt = [any(len(r.tokens) > 1 for r in rows) for rows in trunk.decodes[31:]]
    n_free = has_prompt.index(False)
    assert 0.25 / 0.03 <= n_free <= 0.25 / 0.03 + 2
    last = len(has_prompt) - has_prompt[::-1].index(True)
    assert not any(a and b for a, b in pairwise(has_prompt[n_free:last])), "then the answer has its half"


def test_the_log_counts_an_answers_own_tokens():
    """An answer's session had begun the next one's when its line was written: n_generated was -30."""

    async def talk(service: Service) -> None:
        first, second = prompts(2, 20)
        job, _ = await answer(service, ask(first, 5))
        await answer(service, ask(second, 9))
        assert present(job.status.run).n_generated == 5

    serve(fake_service(n_sessions=1, n_parallel=1), talk)


@pytest.mark.parametrize(("n_prompt", "pieces"), [(128, [128]), (172, [64, 108]), (200, [128, 72])])
def test_a_prompt_leaves_no_rest_of_a_few_rows(n_prompt: int, pieces: list[int]):
    """The last 51 rows of 563 took as long as 140 others."""
    script = Script()

    async def talk(service: Service) -> None:
        await answer(service, ask([1, *range(2, 50), *[7] * (n_prompt - 49)], 1))

    serve(fake_service(script, draft="off", n_batch=128), talk)
    [trunk] = [context for context in script.contexts if context.head is None]
    assert [len(rows[0].tokens) for rows in trunk.decodes] == pieces


@pytest.mark.parametrize(("decode_s", "n_apart"), [(0.0005, 4), (0.003, 1)])
def test_tokens_of_quick_decodes_go_out_together(decode_s: float, n_apart: int, monkeypatch: pytest.MonkeyPatch):
    """To call the event loop for every token took as long as to decode one of a small model."""
    script, sent = Script(), []
    send = EventBridge.send

    def count(bridge: EventBridge) -> None:
        sent.append(1)
        send(bridge)

    async def talk(service: Service) -> int:
        monkeypatch.setattr(EventBridge, "send", count)
        await answer(service, ask(prompts(1)[0], 80))
        return len(sent)

    n_sent = serve(fake_service(script, draft="off", clock=clock_of_decodes(script, decode_s)), talk)
    assert 80 / n_apart <= n_sent <= 80 / n_apart + 8, "the prompt, the first token and the end wait for nothing"


def test_a_full_queue_is_refused_and_a_drained_server_too():
    gate = Gate()

    async def talk(service: Service) -> None:
        jobs = [(await service.submit(ask(p, 40), f"r{i}", None))[0] for i, p in enumerate(prompts(3))]
        with pytest.raises(ApiError, match="too many requests: expected at most 1 running and 2 waiting") as caught:
            await service.submit(ask(prompts(1)[0]), "late", None)
        assert caught.value.status == 429
        service.scheduler.drain(1000)
        with pytest.raises(ApiError, match="the server is draining") as caught:
            await service.submit(ask(prompts(1)[0]), "late", None)
        assert caught.value.status == 503
        gate.open()
        for job in jobs:
            assert isinstance((await events_of(job))[-1], Finished), "what was taken is finished"

    serve(fake_service(Script(on_decode=gate), n_parallel=1, n_waiting=2), talk)


def test_a_drain_ends_long_answers_at_its_limit_with_what_they_have():
    gate = Gate(20)

    async def talk(service: Service) -> None:
        job, _ = await service.submit(ask(prompts(1)[0], 300), "r", None)
        await gate.reached()
        service.scheduler.drain(0)
        gate.open()
        events = await events_of(job)
        assert end_of(events).reason == "length" and 0 < end_of(events).usage.n_generated < 300

    serve(fake_service(Script(on_decode=gate)), talk)


def test_a_client_that_leaves_stops_the_work_and_the_cells_stay():
    gate = Gate(6)

    async def talk(service: Service) -> None:
        prompt = prompts(1, 200)[0]
        job, _ = await service.submit(ask(prompt, 150), "r", None)
        await gate.reached()
        job.events.leave()
        gate.open()
        await events_of(job)
        assert job.status.end == "cancelled" and present(job.status.run).turn.n_generated == 0
        _, events = await answer(service, ask(prompt, 4))
        assert 64 <= end_of(events).usage.n_cached < 200
        assert text_of(events) == greedy(prompt, 4)

    serve(fake_service(Script(on_decode=gate)), talk)


def test_a_retry_joins_the_running_job_and_hears_it_from_the_start():
    async def talk(service: Service) -> None:
        prompt = prompts(1)[0]
        (one, events), (other, again) = await asyncio.gather(
            answer(service, ask(prompt, 20), "a", "key"), answer(service, ask(prompt, 20), "b", "key")
        )
        assert one is other and events == again
        assert service.metrics.joined._value.get() == 1

    serve(fake_service(), talk)


def test_a_row_that_is_no_number_ends_that_answer_alone():
    good, bad = prompts(2)

    def poison(context: FakeContext) -> None:
        context.logits = lambda: np.where(poisoned(context), np.nan, context._logits)

    def poisoned(context: FakeContext) -> np.ndarray:
        rows = [r for r in context.decodes[-1] for _ in range(r.outputs)]
        return np.array([[bad[1:4] == seqs.get(r.seq) and r.start > 24] for r in rows]).reshape(-1, 1)

    seqs: dict[int, list[int]] = {}

    def watch(context: FakeContext) -> None:
        if context.head is None:
            for seq, cells in context.cells.items():
                if set(cells) >= {1, 2, 3}:
                    seqs[seq] = [cells[p].token for p in (1, 2, 3)]
            poison(context)

    async def talk(service: Service) -> None:
        (_, fine), (_, broken) = await asyncio.gather(answer(service, ask(good, 20)), answer(service, ask(bad, 20)))
        assert text_of(fine) == greedy(good, 20)
        assert isinstance(broken[-1], Failed) and "isn't a number" in broken[-1].error.message
        assert not any(slot.session.tokens[:4] == bad[:4] for slot in service.model.pool.slots), "its cells are gone"

    serve(fake_service(Script(on_decode=watch), draft="off"), talk)


def test_a_request_that_breaks_at_its_start_leaves_its_session_to_others(monkeypatch: pytest.MonkeyPatch):
    """Its session counted as running for ever: after as many such requests as sessions nobody was served any more."""

    def broken(*_: object) -> None:
        raise ValueError("a bug")

    async def talk(service: Service) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(run_start, "begin", broken)
            _, events = await answer(service, ask(prompts(1)[0]))
            assert isinstance(events[-1], Failed) and "can't begin: ValueError" in events[-1].error.message
        _, events = await asyncio.wait_for(answer(service, ask(prompts(1)[0], 8)), 60)
        assert text_of(events) == greedy(prompts(1)[0], 8)

    serve(fake_service(n_sessions=1, n_parallel=1), talk)


def test_a_context_full_of_answers_ends_the_youngest_and_a_waiting_prompt_gets_its_turn():
    async def talk(service: Service) -> None:
        results = await asyncio.gather(*(answer(service, ask(p, 90), f"r{i}") for i, p in enumerate(prompts(4, 40))))
        for prompt, (_, events) in zip(prompts(4, 40), results, strict=True):
            n = end_of(events).usage.n_generated
            assert n > 0 and text_of(events) == greedy(prompt, n)

    serve(fake_service(n_ctx=200, n_parallel=4), talk)


def test_a_long_prompt_takes_at_most_half_of_the_time_of_a_running_answer():
    trunk = read_beside_an_answer(250, decode_s=1.0)
    beside = [{r.seq: len(r.tokens) for r in rows} for rows in trunk.decodes[30:]]
    prompt_seq = max(beside[1].keys() | beside[2].keys(), key=lambda seq: max(sizes.get(seq, 0) for sizes in beside))
    has_prompt = [sizes.get(prompt_seq, 0) > 1 for sizes in beside]
    n_steps = max(i for i, has in enumerate(has_prompt) if has) + 1
    assert sum(has_prompt) >= 250 // 16
    assert not any(a and b for a, b in pairwise(has_prompt)), "after each piece of the prompt, the answer goes on alone"
    assert all(len(sizes) == 1 + has for sizes, has in zip(beside, has_prompt[:n_steps], strict=False)), (
        "never without it"
    )


def test_a_prompt_over_the_context_and_a_bias_out_of_range_are_refused_in_time():
    async def talk(service: Service) -> None:
        with pytest.raises(ApiError, match="prompt is too long: 401 tokens > 400 maximum"):
            await service.submit(ask([1] * 401), "r", None)
        request = ask([1, 2])
        with pytest.raises(ApiError, match="bad logit_bias: expected token ids 0 to 63, got 64"):
            await service.submit(replace(request, sampling=replace(request.sampling, logit_bias={64: 1.0})), "r", None)
        _, events = await answer(service, ask([1, 99]))
        assert isinstance(events[-1], Failed) and events[-1].error.status == 400

    serve(fake_service(), talk)


def test_stop_strings_end_an_answer_before_them():
    async def talk(service: Service) -> None:
        prompt = prompts(1)[0]
        whole = greedy(prompt, 12)
        stop = whole[8:13]
        _, events = await answer(service, ask(prompt, 40, stop=("nothing", stop)))
        assert text_of(events) == whole[: whole.find(stop)]
        assert (end_of(events).reason, end_of(events).stop_text) == ("stop", stop)

    serve(fake_service(), talk)


@pytest.mark.parametrize(
    ("tokens", "is_so"), [([7] * 1024, True), ([1, 2, 3] * 400, True), (list(range(2000)), False), ([7] * 1000, False)]
)
def test_endless_repetition_is_seen(tokens: list[int], is_so: bool):
    assert is_endless(tokens) == is_so


class OnlyTwos:
    """A grammar that wants 2, then nothing."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        return ids == (2 if not self.seen else -1)

    def accept(self, token: int) -> None:
        self.seen.append(token)

    def close(self) -> None:
        pass


def test_a_grammar_waits_for_the_reasonings_end_and_never_gets_stuck():
    grammar = LazyGrammar(OnlyTwos(), trigger_token=9, forbidden=[63])
    every = np.arange(64)
    assert grammar.allowed(every).sum() == 63 and not grammar.allowed(np.array([63]))[0], "no end before the answer"
    grammar.accept(5)
    grammar.accept(9)
    assert np.flatnonzero(grammar.allowed(every)).tolist() == [2]
    grammar.accept(2)
    assert np.flatnonzero(grammar.allowed(every)).tolist() == [63], "where nothing may follow, the answer ends"
    grammar.accept(63)
