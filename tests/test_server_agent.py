"""An agent's conversation as clients send it back: the cache holds, and what it gives is what a cold start gives."""

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from server_fakes import GREEDY, events_of, serve
from step35.engine import Engine
from step35.options import EngineOptions
from step35.server.collected import collect
from step35.server.conversation import Ask, Conversation, Message, Tool, ToolCall
from step35.server.job import Feed, Job
from step35.server.scheduler import Limits
from step35.server.service import Service, Serving
from tiny_model import tiny_gguf

TOOLS = (
    Tool(
        "read",
        "Reads a file.",
        {"type": "object", "properties": {"path": {"type": "string"}, "line": {"type": "integer"}}},
    ),
    Tool("run", "Runs a command.", {"type": "object", "properties": {"command": {"type": "string"}}}),
)
# The bundled model seldom calls tools by itself: a grammar over the whole turn makes it, and leaves it the words.
TURN = r"""
root ::= [a-z ]{2,6} "\n</think>\n" [A-Za-z]{0,3} (read | run)
read ::= "<tool_call>\n<function=read>\n<parameter=path>\n" [a-z]{1,4} "\n</parameter>\n<parameter=line>\n" [1-9] "\n</parameter>\n" end
run ::= "<tool_call>\n<function=run>\n<parameter=command>\n" [a-z]{1,4} "\n</parameter>\n" end
end ::= "</function>\n</tool_call>"
"""
SYSTEM = "You are an agent. " + " ".join(
    f"Rule {i}: keep the file number {i} as it is, and say so." for i in range(120)
)


def tiny_service(session_dir: Path | None = None, **options) -> Service:
    defaults = {"draft": "off", "n_ctx": 12288, "n_batch": 128, "n_sessions": 3, "n_threads": 1, "kv_type": "f32"}
    engine_options = EngineOptions(tiny_gguf("F32"), **defaults | options)
    service = Service(Serving("tiny", Limits(2, 8), session_dir), lambda: Engine(engine_options))
    service.scheduler._special_ids = lambda: (None, frozenset())  # the grammar holds from the first token
    return service


async def ask_model(service: Service, prompt, n_predict: int = 120, name: str = "r") -> tuple[Job, list]:
    request = Ask(prompt, GREEDY, n_predict)
    feed = Feed(asyncio.get_running_loop())
    job = await asyncio.to_thread(service._prepare, request, name, feed)
    job.grammar = TURN
    service.scheduler.submit(job)
    return job, await events_of(job)


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
    return replace(message, tool_calls=tuple(calls), reasoning=message.reasoning.strip() + "\n")


def sent_back(events: list, variant) -> Message:
    answer = collect(events)
    return variant(Message("assistant", answer.content, answer.reasoning, tuple(answer.calls)))


def tool_result(call: ToolCall, turn: int) -> Message:
    return Message("tool", f"done {turn}", tool_call_id=call.id)


async def talk(service: Service, variant, n_turns: int, messages: list[Message] | None = None) -> list[Job]:
    """Plays an agent: a user's wish every ten turns, a tool's result in all the others."""
    jobs = []
    messages = messages if messages is not None else [Message("system", SYSTEM), Message("user", "Begin.")]
    for turn in range(n_turns):
        job, events = await ask_model(service, Conversation(tuple(messages), TOOLS), name=f"turn {turn}")
        jobs.append(job)
        message = sent_back(events, variant)
        messages.append(message)
        messages += [tool_result(call, turn) for call in message.tool_calls]
        if turn % 10 == 9:
            messages.append(Message("user", f"Now {turn}."))
    return jobs


def cold_tokens(prompts: list[list[int]]) -> list[list[int]]:
    """What a session that has seen nothing continues each prompt with."""

    async def run(service: Service) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            for held in service.scheduler.conversations.held:
                held.begin_anew(keeps_cells=False)
            job, _ = await ask_model(service, tuple(prompt))
            assert job.n_cached == 0
            answers.append(job.turn.generated)
        return answers

    return serve(tiny_service(), run)


@pytest.mark.parametrize("variant", [kept, dropped, respelt])
def test_forty_turns_come_from_the_cache_and_go_on_as_from_a_cold_start(variant):
    async def run(service: Service) -> list[Job]:
        return await talk(service, variant, 40)

    jobs = serve(tiny_service(), run)
    n_prompt = sum(job.turn.n_prompt for job in jobs[1:])
    n_cached = sum(job.n_cached for job in jobs[1:])
    assert n_cached >= 0.99 * n_prompt, f"{n_cached} of {n_prompt}"
    for before, job in pairwise(jobs):
        whole = [*before.prompt.tokens, *before.turn.generated]
        assert job.n_cached >= len(whole) - 1 - (before.turn.finish == "stop"), (
            "only the end token may be decoded again"
        )
        assert job.prompt.n_known == len(job.prompt.turns)

    chosen = [jobs[i] for i in (1, 11, 39)]
    assert cold_tokens([job.prompt.tokens for job in chosen]) == [job.turn.generated for job in chosen]


def test_a_new_conversation_shares_the_systems_text_and_tools():
    async def run(service: Service) -> None:
        await talk(service, kept, 3)
        other = [Message("system", SYSTEM), Message("user", "Something else entirely.")]
        job, _ = await ask_model(service, Conversation(tuple(other), TOOLS))
        assert job.n_cached >= 0.9 * job.turn.n_prompt
        assert sum(held.session.n_shared > 0 for held in service.scheduler.conversations.held) == 2
        small, _ = await ask_model(service, Conversation((Message("user", "A title, please."),)))
        again, _ = await ask_model(service, Conversation(tuple(other), TOOLS))
        assert small.n_cached == 0 and again.n_cached >= again.turn.n_prompt - 5, "the side request took another place"

    serve(tiny_service(), run)


def test_another_answer_to_the_last_message_costs_that_message_only():
    async def run(service: Service) -> None:
        messages = [Message("system", SYSTEM), Message("user", "Begin.")]
        jobs = await talk(service, kept, 4, messages)
        while messages[-1].role != "assistant":
            messages.pop()
        messages[-1] = Message("user", "No, stop.")
        job, _ = await ask_model(service, Conversation(tuple(messages), TOOLS))
        assert job.n_cached >= jobs[-1].prompt.last_start - 5

    serve(tiny_service(), run)


def test_a_session_comes_back_from_disk_and_goes_on_alike(tmp_path):
    messages = [Message("system", SYSTEM), Message("user", "Begin.")]

    async def first(service: Service) -> list[Job]:
        return await talk(service, dropped, 5, messages)

    async def second(service: Service) -> Job:
        job, _ = await ask_model(service, Conversation(tuple(messages), TOOLS))
        return job

    jobs = serve(tiny_service(tmp_path), first)
    (path,) = tmp_path.glob("*.session")
    assert path.stat().st_mode & 0o077 == 0
    back = serve(tiny_service(tmp_path), second)
    assert back.n_cached >= len(jobs[-1].prompt.tokens), "the whole last turn"
    assert back.prompt.n_known == 5, "reasoning that the client dropped came back with it"

    assert cold_tokens([back.prompt.tokens]) == [back.turn.generated]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for extra in tmp_path.glob("*.session"):
        extra.write_bytes(bytes(data)) if extra == path else extra.unlink()
    damaged = serve(tiny_service(tmp_path), second)
    assert damaged.n_cached == 0
    assert list(tmp_path.glob("*.damaged")), "set aside, never trusted"
    other_kv = serve(tiny_service(tmp_path, kv_type="f16"), second)
    assert other_kv.n_cached == 0, "cells of another type are no use"
