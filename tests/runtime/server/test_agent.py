"""An agent's conversation as clients send it back: the cache holds, and what it gives is what a cold start gives."""

import asyncio
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from narrowed import present
from real_engine import open_engine
from server_fakes import GREEDY, events_of, serve
from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.chat.prompt_builder import Prompt
from step35.options import EngineOptions
from step35.server import run_start
from step35.server.api.collected import collect
from step35.server.generation_request import GenerationRequest
from step35.server.job import Job, Run
from step35.server.policy import Limits
from step35.server.run_start import GrammarTokens
from step35.server.service import Service, Serving
from tiny_model import tiny_gguf

TOOLS = (
    Tool("ls", "Lists.", {"type": "object", "properties": {"p": {"type": "string"}, "n": {"type": "integer"}}}),
    Tool("sh", "Runs.", {"type": "object", "properties": {"c": {"type": "string"}}}),
)
# The bundled model seldom calls tools by itself: a grammar over the whole turn makes it, and leaves it the words.
TURN = r"""
root ::= [a-z ]{1,5} "\n</think>\n" [A-Za-z]{0,3} (ls | sh)
ls ::= "<tool_call>\n<function=ls>\n<parameter=p>\n" [a-z]{1,4} "\n</parameter>\n<parameter=n>\n" [1-9] "\n</parameter>\n" end
sh ::= "<tool_call>\n<function=sh>\n<parameter=c>\n" [a-z]{1,4} "\n</parameter>\n" end
end ::= "</function>\n</tool_call>"
"""
SYSTEM = "You are an agent. " + " ".join(f"Rule {i}: keep the file number {i} as it is, and say so." for i in range(60))


@pytest.fixture(autouse=True)
def grammar_from_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is waited for, and none is forbidden before it."""
    monkeypatch.setattr(run_start, "grammar_tokens", lambda engine: GrammarTokens(None, frozenset()))


@dataclass(frozen=True, slots=True)
class Played:
    """A turn that was played: its job, and the tokens that were sampled."""

    job: Job
    run: Run
    events: list
    tokens: list[int]

    @property
    def prompt(self) -> Prompt:
        return self.job.prompt

    @property
    def n_cached(self) -> int:
        return self.run.n_cached


def tiny_service(session_dir: Path | None = None, **options) -> Service:
    defaults = {"draft": "off", "n_ctx": 12288, "n_batch": 128, "n_sessions": 3, "n_threads": 1, "kv_type": "f32"}
    engine_options = EngineOptions(tiny_gguf("F32"), **defaults | options)
    return Service(Serving("tiny", Limits(2, 8), session_dir), lambda: open_engine(engine_options))


async def ask_model(service: Service, prompt, name: str = "r") -> Played:
    request = GenerationRequest(prompt, GREEDY, 120)
    job = replace(await asyncio.to_thread(service.prepare, request, name), grammar=TURN)
    service.scheduler.submit(job)
    events = await events_of(job)
    run = present(job.status.run)
    return Played(job, run, events, run.turn.session.tokens[len(job.prompt.tokens) : run.n_seen])


def kept(message: Message) -> Message:
    return message


def dropped(message: Message) -> Message:
    return replace(message, reasoning=None)


def respelt(message: Message) -> Message:
    """As a client that parses the arguments and writes them anew, in another order, and trims the reasoning."""
    calls = []
    for call in message.tool_calls:
        items = reversed(json.loads(call.arguments).items())
        calls.append(replace(call, arguments=json.dumps(dict(items), indent=1, ensure_ascii=True)))
    return replace(message, tool_calls=tuple(calls), reasoning=present(message.reasoning).strip() + "\n")


def sent_back(events: list, variant) -> Message:
    answer = collect(events)
    return variant(Message("assistant", answer.content, answer.reasoning, tuple(answer.calls)))


def tool_result(call: ToolCall, turn: int) -> Message:
    return Message("tool", f"done {turn}", tool_call_id=call.id)


async def talk(service: Service, variant, n_turns: int, messages: list[Message] | None = None) -> list[Played]:
    """Plays an agent: a user's wish every ten turns, a tool's result in all the others."""
    turns = []
    messages = messages if messages is not None else beginning()
    for turn in range(n_turns):
        turns.append(await ask_model(service, Conversation(tuple(messages), TOOLS), name=f"turn {turn}"))
        message = sent_back(turns[-1].events, variant)
        messages.append(message)
        messages += [tool_result(call, turn) for call in message.tool_calls]
        if turn % 10 == 9:
            messages.append(Message("user", f"Now {turn}."))
    return turns


def beginning() -> list[Message]:
    return [Message("system", SYSTEM), Message("user", "Begin.")]


def cold_tokens(prompts: list[list[int]]) -> list[list[int]]:
    """What a session that has seen nothing continues each prompt with."""

    async def run(service: Service) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            for slot in service.model.pool.slots:
                slot.reset(keeps_cells=False)
            turn = await ask_model(service, tuple(prompt))
            assert turn.n_cached == 0
            answers.append(turn.tokens)
        return answers

    return serve(tiny_service(), run)


@pytest.mark.parametrize("variant", [kept, dropped, respelt])
def test_forty_turns_come_from_the_cache_and_go_on_as_from_a_cold_start(variant):
    turns = serve(tiny_service(), lambda service: talk(service, variant, 40))
    n_prompt = sum(len(turn.prompt.tokens) for turn in turns[1:])
    n_cached = sum(turn.n_cached for turn in turns[1:])
    assert n_cached >= 0.99 * n_prompt, f"{n_cached} of {n_prompt}"
    for before, turn in pairwise(turns):
        assert turn.n_cached >= len(before.prompt.tokens) + len(before.tokens) - 1, (
            "only the last token is decoded again"
        )
        assert turn.prompt.n_known == len(turn.prompt.turns)
    chosen = [turns[i] for i in (1, 11, 39)]
    assert cold_tokens([turn.prompt.tokens for turn in chosen]) == [turn.tokens for turn in chosen]


def test_a_new_conversation_shares_the_systems_text_and_tools():
    async def run(service: Service) -> Played:
        await talk(service, kept, 3)
        other = [Message("system", SYSTEM), Message("user", "Something else entirely.")]
        turn = await ask_model(service, Conversation(tuple(other), TOOLS))
        assert turn.n_cached >= 0.9 * len(turn.prompt.tokens)
        assert sum(slot.session.n_shared > 0 for slot in service.model.pool.slots) == 2
        small = await ask_model(service, Conversation((Message("user", "A title, please."),)))
        again = await ask_model(service, Conversation(tuple(other), TOOLS))
        assert small.n_cached < 20
        assert again.n_cached >= len(again.prompt.tokens) - 10, "the side request took another place"
        return turn

    shared = serve(tiny_service(), run)
    assert cold_tokens([shared.prompt.tokens]) == [shared.tokens]


def test_another_answer_to_the_last_message_costs_that_message_only():
    async def run(service: Service) -> None:
        messages = beginning()
        turns = await talk(service, kept, 4, messages)
        while messages[-1].role != "assistant":
            messages.pop()
        messages[-1] = Message("user", "No, stop.")
        turn = await ask_model(service, Conversation(tuple(messages), TOOLS))
        assert turn.n_cached >= turns[-1].prompt.last_start - 5

    serve(tiny_service(), run)


def test_a_session_comes_back_from_disk_and_a_damaged_one_is_set_aside(tmp_path):
    messages = beginning()
    turns = serve(tiny_service(tmp_path), lambda service: talk(service, dropped, 5, messages))
    (path,) = tmp_path.glob("*.session")
    assert path.stat().st_mode & 0o077 == 0
    whole = path.read_bytes()

    async def go_on(service: Service) -> Played:
        return await ask_model(service, Conversation(tuple(messages), TOOLS))

    back = serve(tiny_service(tmp_path), go_on)
    assert back.n_cached >= len(turns[-1].prompt.tokens), "the whole last turn"
    assert back.prompt.n_known == 5, "reasoning that the client dropped came back with it"
    assert cold_tokens([back.prompt.tokens]) == [back.tokens]

    for file in tmp_path.iterdir():
        file.unlink()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    assert serve(tiny_service(tmp_path), go_on).n_cached == 0
    assert list(tmp_path.glob("*.damaged")), "set aside, never trusted"
    for file in tmp_path.iterdir():
        file.unlink()
    path.write_bytes(whole)
    assert serve(tiny_service(tmp_path, kv_type="f16"), go_on).n_cached == 0, "cells of another type are no use"
    assert path.exists()
