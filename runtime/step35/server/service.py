"""What the routes need of the server: a request to a running job, texts to tokens and back, the state of all."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from step35.chat.chat_prompts import ChatPrompts, chat_prompts
from step35.chat.errors import BadConversation
from step35.chat.messages import Conversation
from step35.chat.prompt_builder import Prompt
from step35.chat.reasoning_budget import budget_of, reasoning_so_far
from step35.chat.sampled_turns import TurnMap
from step35.chat.session_key import session_key
from step35.engine.engine import Engine
from step35.planning.memory_usage import MemoryUsage, Pool
from step35.sampling.sampler import Sampling
from step35.server.api.sampling_presets import shipped_presets
from step35.server.cache.session_disk import SessionDisk
from step35.server.cache.session_pool import SessionPool, SessionSlot
from step35.server.errors import TOO_LONG, api_error, bad_request
from step35.server.event_log import EventLog
from step35.server.generation_request import GenerationRequest
from step35.server.grammar.tool_grammar import grammar_of
from step35.server.job import Job, Run
from step35.server.metrics import Metrics, resident_bytes
from step35.server.policy import Limits
from step35.server.scheduler import Scheduler

NO_TEMPLATE = "no chat template: the model file has none; convert it again, or use /v1/completions"


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served."""

    name: str
    limits: Limits = field(default_factory=Limits)
    session_dir: Path | None = None
    session_bytes: int = 20 << 30


@dataclass(frozen=True, slots=True)
class OpenModel:
    """What there is once the model is loaded."""

    engine: Engine
    pool: SessionPool
    prompts: ChatPrompts | None
    """None if the file has no chat template."""


class Service:
    """One engine behind any number of requests. All but `open` runs in the event loop or a thread of its pool."""

    def __init__(
        self, serving: Serving, open_engine: Callable[[], Engine], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` is the scheduler's."""
        self.serving = serving
        self.metrics = Metrics()
        self.turns = TurnMap()
        self.scheduler = Scheduler(serving.limits, self.metrics, self.turns, clock)
        self.created = int(time.time())
        self._open_engine = open_engine
        self._open_model: OpenModel | None = None
        self._starts: dict[str, asyncio.Future[Job]] = {}

    # opening, in the engine's thread

    def open(self) -> SessionPool:
        """Opens the engine, the template and the sessions on disk."""
        engine = self._open_engine()
        shipped_presets()  # read now, so that the first client doesn't wait for it
        prompts = None if engine.chat_template is None else chat_prompts(engine, self.turns)
        disk = self._open_disk(self.serving.session_dir, engine) if self.serving.session_dir else None
        pool = SessionPool(engine, self.text_of_tokens, disk, n_parallel=self.serving.limits.n_parallel)
        self._open_model = OpenModel(engine, pool, prompts)
        return pool

    def _open_disk(self, folder: Path, engine: Engine) -> SessionDisk:
        disk = SessionDisk(folder, session_key(engine), self.serving.session_bytes)
        for saved in disk.saved.values():
            for turn in saved.turns:
                self.turns.add(turn)
        return disk

    @property
    def model(self) -> OpenModel:
        """What was opened; raises ApiError until then."""
        if self._open_model is None:
            raise self.scheduler.not_ready()
        return self._open_model

    @property
    def engine(self) -> Engine:
        """The open engine; raises ApiError until there is one."""
        return self.model.engine

    # requests

    async def submit(self, request: GenerationRequest, request_id: str, join_key: str | None) -> tuple[Job, bool]:
        """Returns the job that answers a request, and whether it ran already for an earlier try of the same.

        The client is counted in; it must leave the job's events at its end.
        """
        self.scheduler.check_ready()
        start = self._starts.get(join_key) if join_key else None
        joined = start is not None and not _is_over(start)
        if start is None or not joined:
            start = asyncio.ensure_future(self._start(request, request_id))
            if join_key:
                others = {key: other for key, other in self._starts.items() if not _is_over(other)}
                self._starts = others | {join_key: start}
        job = await asyncio.shield(start)
        job.events.enter()
        self.metrics.joined.inc(joined)
        return job, joined

    async def _start(self, request: GenerationRequest, request_id: str) -> Job:
        job = await asyncio.to_thread(self.prepare, request, request_id)
        self.scheduler.submit(job)
        return job

    def prepare(self, request: GenerationRequest, request_id: str) -> Job:
        """Returns a request as a job for the scheduler; raises ApiError if it can't be served."""
        engine = self.engine
        unknown = [token for token in request.sampling.logit_bias if not 0 <= token < engine.n_vocab]
        if unknown:
            known = f"token ids 0 to {engine.n_vocab - 1}"
            raise bad_request(f"bad logit_bias: expected {known}, got {unknown[0]}", "logit_bias")
        prompt = self.prompt(request)
        if len(prompt.tokens) >= engine.n_ctx:
            # agents know these first words, and shorten their history
            raise bad_request(
                f"prompt is too long: {len(prompt.tokens)} tokens > {engine.n_ctx} maximum; shorten it, or serve "
                "with a larger --ctx",
                code=TOO_LONG,
            )
        events = EventLog(self.scheduler.bridge)
        n_reasoned, echo = self._n_reasoned(request, prompt), self._echo(request, prompt)
        return Job(request_id, request, prompt, events, grammar_of(request), n_reasoned, echo)

    def _echo(self, request: GenerationRequest, prompt: Prompt) -> str:
        if not request.echo:
            return ""
        return request.prompt if isinstance(request.prompt, str) else self.text_of_tokens(prompt.tokens)

    def _n_reasoned(self, request: GenerationRequest, prompt: Prompt) -> int:
        """Returns the tokens of reasoning that this user request took so far, those a client left out included."""
        conversation, budget = request.prompt, budget_of(request.effort, request.reasoning_budget)
        if not isinstance(conversation, Conversation) or budget is None:
            return 0
        ours = iter(prompt.turns)
        messages = [next(ours).message if m.role == "assistant" and prompt.turns else m for m in conversation.messages]
        texts = reasoning_so_far(replace(conversation, messages=tuple(messages)))
        return sum(len(self.engine.tokenize(text, add_bos=False)) for text in texts)

    def count(self, conversation: Conversation) -> int:
        """Returns how many tokens a conversation's prompt has."""
        return len(self.prompt(GenerationRequest(conversation, Sampling())).tokens)

    def prompt(self, request: GenerationRequest) -> Prompt:
        """Returns a request's tokens."""
        prompt = request.prompt
        try:
            if isinstance(prompt, Conversation):
                return self._chat_prompts().build(prompt, request.effort)
            tokens = self.engine.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        except UnicodeEncodeError as error:
            raise bad_request(f"bad text: {error.reason} at character {error.start}") from None
        except BadConversation as error:
            raise api_error(error) from error
        return Prompt(tokens or [self.engine.bos])

    def _chat_prompts(self) -> ChatPrompts:
        prompts = self.model.prompts
        if prompts is None:
            raise bad_request(NO_TEMPLATE)
        return prompts

    # texts

    def text_of_tokens(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, control tokens included."""
        piece = self.engine.piece
        return b"".join(piece(token, special=True) for token in tokens).decode(errors="replace")

    # the state of all

    def status(self) -> dict[str, Any]:
        """Returns what the page shows: the model, memory, sessions, requests and speeds."""
        scheduler = self.scheduler
        status: dict[str, Any] = {
            "state": scheduler.state,
            "model": self.serving.name,
            "memory": {"resident_bytes": resident_bytes()},
        }
        if scheduler.state not in ("ready", "draining") or self._open_model is None:
            return status
        engine, pool = self._open_model.engine, self._open_model.pool
        options = engine.options
        return status | {
            "memory": _memory_status(engine),
            "context": {"n_ctx": engine.n_ctx, "n_used": engine.n_ctx - engine.n_free_cells},
            "options": {
                "draft": options.draft,
                "n_batch": options.n_batch,
                "kv_type": options.kv_type,
                "n_sessions": options.n_sessions,
            },
            "notes": list(engine.notes),
            "sessions": [_session_status(slot) for slot in pool.slots],
            "requests": [_run_status(run) for run in list(scheduler.jobs.running)],
            "n_waiting": len(scheduler.jobs.waiting),
            "decode_tps": round(scheduler.decode_tps, 2),
            "acceptance": self.metrics.acceptance(),
            "n_turns_known": len(self.turns),
        }


def _is_over(start: "asyncio.Future[Job]") -> bool:
    """Whether a request has failed to start, has ended, or was left by its clients."""
    if not start.done():
        return False
    if start.cancelled() or start.exception():
        return True
    return start.result().events.is_ended or start.result().events.is_left


def _memory_status(engine: Engine) -> dict[str, Any]:
    """Returns what each memory was counted to hold, by purpose; no pools where the memory is unknown."""
    demand, budget = engine.demand, engine.budget
    return {
        "resident_bytes": resident_bytes(),
        "pressure": engine.pressure.name.lower(),
        "caches": {"used": budget.used, "limit": budget.limit},
        "pools": [
            {"name": pool.name, "budget": pool.budget, "parts": _parts(demand.usage, pool)} for pool in demand.pools
        ]
        if demand
        else [],
    }


def _parts(usage: MemoryUsage, pool: Pool) -> list[dict[str, Any]]:
    """Returns the bytes of a memory by purpose, its devices together."""
    sizes: dict[str, int] = {}
    for device in pool.devices:
        for purpose, n_bytes in usage.get(device, {}).items():
            sizes[purpose.value] = sizes.get(purpose.value, 0) + n_bytes
    return [{"what": what, "bytes": n_bytes} for what, n_bytes in sizes.items()]


def _session_status(slot: SessionSlot) -> dict[str, Any]:
    return {
        "id": slot.name[:8],
        "n_tokens": slot.session.n_past,
        "n_shared": slot.session.n_shared,
        "checkpoints": list(slot.session.checkpoints),
        "is_running": slot.is_running,
        "is_saved": not slot.is_unsaved,
        "idle_s": round(time.monotonic() - slot.last_used_s, 1) if slot.last_used_s else None,
    }


def _run_status(run: Run) -> dict[str, Any]:
    turn = run.turn
    return {
        "id": run.job.id,
        "phase": "prefill" if run.is_prefilling else "answer",
        "n_prompt": turn.n_prompt,
        "n_done": min(turn.session.n_past, turn.n_prompt),
        "n_cached": run.n_cached,
        "n_generated": turn.n_generated,
    }
