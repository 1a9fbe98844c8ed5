"""The start of a run: what chooses the answer's tokens, what reads them, and the turn that extends the session."""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from step35.chat.answer import Answer
from step35.chat.messages import Conversation
from step35.chat.output_parser import OutputParser
from step35.chat.reasoning_budget import budget_of, watch
from step35.engine.decode_loop import begin
from step35.engine.engine import Engine
from step35.markup import THINK_END, TOOL_CALL
from step35.server.cache.session_pool import SessionSlot
from step35.server.constrained_chooser import ConstrainedChooser, LazyGrammar, ReasoningEnd
from step35.server.job import Job, Run


@dataclass(frozen=True, slots=True)
class GrammarTokens:
    """`trigger` puts a lazy grammar in force; the `forbidden` ones may not come before it."""

    trigger: int | None
    forbidden: frozenset[int]


def grammar_tokens(engine: Engine) -> GrammarTokens:
    """Returns the token that ends the reasoning, and those that would end the answer or begin a call there."""
    single = {
        text: ids[0]
        for text in (THINK_END, TOOL_CALL)
        if len(ids := engine.tokenize(text, add_bos=False)) == 1
    }  # fmt: skip
    ends = {token for token in range(engine.n_vocab) if engine.is_end(token)}
    calls = {single[TOOL_CALL]} if TOOL_CALL in single else set[int]()
    return GrammarTokens(single.get(THINK_END), frozenset(ends | calls))


class RunStarter:
    """Starts runs on an engine's sessions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # asked for every token of an answer: a look-up takes half as long as the engine's own
        self._text_piece: Callable[[int], bytes] = cache(partial(engine.piece, special=False))
        self._markup_piece: Callable[[int], bytes] = cache(partial(engine.piece, special=True))

    def start(self, job: Job, slot: SessionSlot) -> Run:
        """Syncs the session to the job's prompt; raises Step35Error if the turn can't begin."""
        prompt, chooser = job.prompt, self._chooser(job)
        try:
            turn = begin(slot.session, prompt.tokens, chooser, job.request.n_predict, prompt.checkpoints_after)
        except BaseException:
            chooser.close()
            raise
        return Run(job, slot, turn, chooser, self._answer(job), turn.stats.n_reused, len(prompt.tokens))

    def _answer(self, job: Job) -> Answer:
        request = job.request
        if not isinstance(request.prompt, Conversation):
            return Answer(self._text_piece, None, request.stop, request.parallel_tool_calls)
        tools = request.prompt.tools if request.tool_choice != "none" else ()
        parser = OutputParser(tools, job.prompt.opens_reasoning, lambda: f"call_{uuid.uuid4().hex[:24]}")
        return Answer(self._markup_piece, parser, request.stop, request.parallel_tool_calls)

    def _chooser(self, job: Job) -> ConstrainedChooser:
        request = job.request
        sampling = request.sampling
        return ConstrainedChooser(
            sampling if request.has_seed else replace(sampling, seed=random.getrandbits(64)),
            self._engine.eos,
            grammar=self._grammar(job.grammar, job.prompt.opens_reasoning) if job.grammar is not None else None,
            n_logprobs=request.n_logprobs,
            reasoning_end=self._reasoning_end(job) if job.prompt.opens_reasoning else None,
        )

    def _grammar(self, gbnf: str, opens_reasoning: bool) -> LazyGrammar:
        tokens = self._grammar_tokens
        grammar = self._engine.open_grammar(gbnf)
        return LazyGrammar(grammar, tokens.trigger if opens_reasoning else None, tokens.forbidden)

    @cached_property
    def _grammar_tokens(self) -> GrammarTokens:
        return grammar_tokens(self._engine)  # looks through the whole vocabulary

    def _reasoning_end(self, job: Job) -> ReasoningEnd:
        budget = budget_of(job.request.effort, job.request.reasoning_budget)
        tokenize = partial(self._engine.tokenize, add_bos=False)
        return ReasoningEnd(watch(budget, job.n_reasoned), self._markup_piece, tokenize)
