"""`step35.Llama`: what scripts written for llama_cpp.Llama use, on this project's engine.

The same constructor and methods. What differs: drafting (`draft`, `mtp_path`); logprobs need no
logits_all; no (n_ctx, n_vocab) array exists; the sliding window stays a ring; a prompt's common
prefix is reused only as far as its cells still exist. What isn't given is planned for the box: GPUs are used, and
the context is 32768 tokens or what fits. What this model or engine can't do raises SettingsError instead of being
ignored.
"""

import inspect
import itertools
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from step35.chat.chat_prompts import chat_prompts
from step35.chat.sampled_turns import TurnMap
from step35.chat.stock_chat import stock_chat
from step35.choices import KV_TYPES
from step35.engine.decode_loop import begin, step
from step35.engine.detokenize import TextStream
from step35.engine.engine import Engine
from step35.engine.session import Snapshot
from step35.engine.turn import Turn
from step35.errors import SettingsError
from step35.native.library import LlamaGrammar, LlamaState, StockLlama
from step35.options import EngineOptions
from step35.planning.autoplan import EnginePlan, auto_plan, file_plan
from step35.planning.hardware import before_loading
from step35.planning.model_header import Headers, read_headers
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser, TokenLogprobs

CHAT_FORMAT = "chat_template.default"
"""llama_cpp's name for a chat by the file's own template."""
_KV_NAMES = {None: "f16"} | {kv_type.native: name for name, kv_type in KV_TYPES.items()}
_SERVED = {
    "n_gpu_layers", "use_mmap", "use_mlock", "seed", "n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch",
    "logits_all", "offload_kqv", "flash_attn", "op_offload", "no_perf", "last_n_tokens_size", "chat_format",
    "chat_handler", "type_k", "type_v", "verbose",
}  # fmt: skip

_FIELDS = {
    "n_gpu_layers": "n_gpu_layers", "use_mmap": "load_mode", "use_mlock": "load_mode", "n_ctx": "n_ctx",
    "n_batch": "n_batch", "n_ubatch": "n_batch", "n_threads": "n_threads", "n_threads_batch": "n_threads_batch",
    "offload_kqv": "offload_kqv", "flash_attn": "flash_attention", "op_offload": "op_offload",
    "type_k": "kv_type", "type_v": "kv_type",
}  # fmt: skip
"""What a plan decides: the stock constructor's names, and the engine's."""


class Llama(StockLlama):
    """A Step-3.5 model with one session, behind llama_cpp.Llama's interface."""

    def __init__(
        self,
        model_path: str,
        *,
        draft: str = "auto",
        mtp_path: str | None = None,
        plan: str | None = None,
        **options: Any,
    ) -> None:
        """`draft` is auto, off, 1, 2, 3 or ngram; `mtp_path` a file with the MTP heads; `plan` one of step35 plan."""
        settings = _settings(options)
        self.model_path, self.verbose = model_path, settings["verbose"]
        self.last_n_tokens_size = settings["last_n_tokens_size"]
        self._seed = settings["seed"]
        headers = read_headers(Path(model_path), Path(mtp_path) if mtp_path else None)
        if plan is None:
            planned = _auto_plan(headers, draft, settings, options)
        else:
            _refuse_beside_a_plan(options)
            planned = file_plan(headers, Path(plan), draft=draft)
        self.engine = Engine(planned.options, planned.headers)
        self._session = self.engine.open_session()
        self.metadata = self.engine.model.all_metadata()
        self.chat_format, self.chat_handler = settings["chat_format"], settings["chat_handler"]
        self._chat_handlers = {}
        self._read_template()
        self.cache = self.draft_model = None
        for line in [*filter(None, [planned.note]), *self.engine.notes] if self.verbose else ():
            print(f"step35: {line}", file=sys.stderr)

    def _read_template(self) -> None:
        if self.engine.chat_template is None:
            return
        self._chat_handlers[CHAT_FORMAT] = stock_chat(self._session, chat_prompts(self.engine, TurnMap()))
        if self.chat_format is None and self.chat_handler is None:
            self.chat_format = CHAT_FORMAT

    def close(self) -> None:
        """Frees the model and its contexts."""
        if engine := self.__dict__.pop("engine", None):
            engine.close()

    # the model

    @property
    def ctx(self) -> object:
        return self.engine.trunk.handle

    @property
    def model(self) -> object:
        return self.engine.model.handle

    def n_ctx(self) -> int:
        return self.engine.n_ctx

    def n_embd(self) -> int:
        return self.engine.model.n_embd

    def n_vocab(self) -> int:
        return self.engine.model.n_vocab

    def token_eos(self) -> int:
        return self.engine.model.eos

    def token_bos(self) -> int:
        return self.engine.model.bos

    def token_nl(self) -> int:
        return self.engine.model.newline

    def tokenizer(self) -> "Llama":
        return self

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return self.engine.model.tokenize(text, add_bos=add_bos, parse_special=special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        return b"".join(self.engine.model.piece(token, special=special) for token in tokens)

    # the timeline

    @property
    def n_tokens(self) -> int:
        return len(self._session.tokens)

    @property
    def input_ids(self) -> np.ndarray:
        """The token ids of the timeline, int32."""
        return np.array(self._session.tokens, np.intc)

    _input_ids = input_ids

    @property
    def scores(self) -> np.ndarray:
        raise SettingsError("scores are not kept: (n_ctx, n_vocab) floats are 135 GB at 256K; ask for logprobs")

    _scores = scores
    eval_logits = scores

    @property
    def eval_tokens(self) -> list[int]:
        return list(self._session.tokens)

    def reset(self) -> None:
        """Empties the timeline."""
        self._session.rewind(0)

    def eval(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the timeline; they are decoded when the next token is asked for."""
        self._session.sync([*self._session.tokens, *tokens])

    def sample(self, **_: Any) -> int:
        raise SettingsError("sample() is not served: tokens are chosen while their logits are at hand; use generate()")

    def embed(self, *_: Any, **__: Any) -> Any:
        raise SettingsError("embed() is not served: Step-3.5 is a generator without a pooling head")

    def set_cache(self, cache: object) -> None:
        if cache is not None:
            raise SettingsError("set_cache() is not served: the session reuses prefixes itself; use save_state()")

    def save_state(self) -> LlamaState:
        """Returns the timeline with its cells."""
        snapshot = self._session.snapshot()
        ids = np.array(snapshot.tokens, np.intc)
        none = np.zeros((0, 0), np.single)
        return LlamaState(ids, none, snapshot.n_past, snapshot.state, len(snapshot.state), self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Goes back to a saved timeline."""
        self._session.restore(Snapshot(tuple(state.input_ids.tolist()), state.n_tokens, state.llama_state))
        self._seed = state.seed

    # generation

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: LlamaGrammar | None = None,
        **others: Any,
    ) -> Iterator[int]:
        """Yields tokens until an end token, which is yielded too, or until the context is full."""
        _refuse(others | {"typical_p": typical_p}, _IGNORABLE)
        sampling = Sampling(
            temp, top_k, top_p, min_p, self._seed % 2**64, repeat_penalty, frequency_penalty, presence_penalty,
            self.last_n_tokens_size,
        )  # fmt: skip
        prompt = list(tokens) if reset else [*self._session.tokens, *tokens]
        turn = self._begin(prompt, sampling, -1, grammar, None, logits_processor)
        try:
            for token in _tokens(turn):
                yield token
                if stopping_criteria is not None and stopping_criteria(self.input_ids, np.zeros(0, np.single)):
                    return
        finally:
            turn.chooser.close()

    def _begin(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        grammar: LlamaGrammar | None,
        n_logprobs: int | None,
        process: Any,
    ) -> Turn:
        rules = self.engine.model.open_grammar(grammar._grammar) if grammar is not None else None
        chooser = Chooser(sampling, grammar=rules, n_logprobs=n_logprobs, process=process)
        return begin(self._session, prompt, chooser, max_tokens)

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
    ) -> Any:
        """Returns a completion, or an iterator of its chunks if `stream`."""
        given = {"suffix": suffix, "typical_p": typical_p, "tfs_z": tfs_z, "mirostat_mode": mirostat_mode}
        _refuse(given | {"stopping_criteria": stopping_criteria}, _IGNORABLE)
        bias = {int(token): float(value) for token, value in (logit_bias or {}).items()}
        sampling = Sampling(
            temperature, top_k, top_p, min_p, self._next_seed(seed), repeat_penalty, frequency_penalty,
            presence_penalty, self.last_n_tokens_size, bias,
        )  # fmt: skip
        tokens = self._prompt_tokens(prompt)
        n_predict = -1 if max_tokens is None or max_tokens <= 0 else max_tokens
        turn = self._begin(tokens, sampling, n_predict, grammar, logprobs, logits_processor)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        completion = _Completion(self, turn, model or self.model_path, stops, prompt if echo else "")
        return completion.chunks() if stream else completion.whole()

    def _prompt_tokens(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        tokens = self.engine.tokenize(prompt)
        return tokens or [self.engine.model.bos]

    def _next_seed(self, seed: int | None) -> int:
        """As in llama_cpp: a seed of its own for each call that gives none, drawn from the last one."""
        self._seed = seed if seed is not None else random.Random(self._seed).randint(0, 2**32)
        return self._seed % 2**64

    def create_chat_completion(self, messages: list[dict], *functions_and_tools: Any, **options: Any) -> Any:
        """As llama_cpp.Llama's; message contents are stripped, as llama.cpp does for this template.

        An answer that comes back unchanged keeps the tokens that it was sampled with: they are not decoded again.
        """
        messages = [_stripped(message) for message in messages]
        return super().create_chat_completion(messages, *functions_and_tools, **options)

    def __getstate__(self) -> dict:
        raise SettingsError("a Llama can't be pickled: make a new one from the same file")


_IGNORABLE = {
    "suffix": None, "typical_p": 1.0, "tfs_z": 1.0, "mirostat_mode": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
    "penalize_nl": True, "stopping_criteria": None,
}  # fmt: skip


def _stripped(message: dict) -> dict:
    """Returns a chat message whose content has no white space around it."""
    content = message.get("content")
    return {**message, "content": content.strip()} if isinstance(content, str) else message


def _refuse(given: dict[str, Any], neutral: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in neutral or value != neutral[name]:
            raise SettingsError(f"{name} is not served: expected {neutral.get(name, 'nothing')!r}, got {value!r}")


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the stock constructor's defaults with what was given; refuses what isn't served."""
    parameters = inspect.signature(StockLlama.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    _refuse({name: value for name, value in given.items() if name not in _SERVED}, defaults)
    return defaults | given


def _refuse_beside_a_plan(given: dict[str, Any]) -> None:
    for name in given.keys() & _FIELDS.keys():
        raise SettingsError(f"plan and {name}: the plan says it already; leave one out, or edit the plan")


def _engine_options(headers: Headers, draft: str, s: dict[str, Any]) -> EngineOptions:
    if s["type_k"] != s["type_v"]:
        raise SettingsError(f"bad cache types: type_v expected type_k's {s['type_k']}, got {s['type_v']}")
    n_threads = s["n_threads"] or max((os.cpu_count() or 2) // 2, 1)
    n_ctx = s["n_ctx"] or headers.model.shape.n_ctx_train
    return EngineOptions(
        headers.model.path,
        headers.side_path,
        draft,
        n_ctx=n_ctx,
        n_batch=max(8, min(s["n_batch"], s["n_ubatch"], n_ctx)),
        n_threads=n_threads,
        n_threads_batch=s["n_threads_batch"] or os.cpu_count() or n_threads,
        n_gpu_layers=s["n_gpu_layers"],
        load_mode="mlock" if s["use_mlock"] else "auto" if s["use_mmap"] else "none",
        kv_type=_KV_NAMES[s["type_k"]],
        flash_attention=True if s["flash_attn"] else None,
        offload_kqv=s["offload_kqv"],
        op_offload=s["op_offload"] is not False,
    )


def _auto_plan(headers: Headers, draft: str, settings: dict[str, Any], given: dict[str, Any]) -> EnginePlan:
    """Returns a plan for this box; what the caller gave wins over it."""
    stock = _engine_options(headers, draft, settings)
    by_hand = {field: getattr(stock, field) for name, field in _FIELDS.items() if name in given}
    return auto_plan(headers, before_loading(), draft=draft, **by_hand)


def _tokens(turn: Turn) -> Iterator[int]:
    """Runs a turn to its end, yielding every chosen token, the end token too."""
    while turn.finish is None:
        n_before = len(turn.session.tokens)
        step(turn.session.engine, [turn])
        yield from turn.session.tokens[n_before:]


class _Completion:
    """One completion in OpenAI's form."""

    def __init__(self, llama: Llama, turn: Turn, model: str, stop: list[str], echo: str | list[int]) -> None:
        self._llama, self._turn, self._model = llama, turn, model
        self._id, self._created = f"cmpl-{uuid.uuid4()}", int(time.time())
        self._stream = TextStream(llama.engine.model.piece, stop)
        self._echo = echo if isinstance(echo, str) else llama.detokenize(echo).decode(errors="replace")
        self._n_tokens = 0
        self._n_chars = len(self._echo)

    def _texts(self) -> Iterator[tuple[str, TokenLogprobs | None]]:
        """Yields each token's text, once it is safe to show, with its log-probabilities."""
        turn = self._turn
        try:
            for i, token in enumerate(_tokens(turn)):
                if self._llama.engine.model.is_eog(token):
                    break
                self._n_tokens += 1
                yield self._stream.add(token), turn.chooser.logprobs[i] if turn.chooser.logprobs else None
                if self._stream.stopped:
                    break
            yield self._stream.finish(), None
        finally:
            turn.chooser.close()

    @property
    def _finish(self) -> str:
        return "stop" if self._stream.stopped or self._turn.finish == "stop" else "length"

    def chunks(self) -> Iterator[dict]:
        """Yields the text in chunks; the last one is empty and tells the reason of the end."""
        echo = [(self._echo, None)] if self._echo else []
        for text, logprobs in itertools.chain(echo, self._texts()):
            if text or logprobs:
                yield self._answer(text, self._logprobs([logprobs] if logprobs else []), None)
        yield self._answer("", None, self._finish)

    def whole(self) -> dict:
        """Returns the completion with its usage."""
        parts = list(self._texts())
        logprobs = self._logprobs([values for _, values in parts if values])
        answer = self._answer(self._echo + "".join(text for text, _ in parts), logprobs, self._finish)
        n_prompt = self._turn.n_prompt
        answer["usage"] = {
            "prompt_tokens": n_prompt,
            "completion_tokens": self._n_tokens,
            "total_tokens": n_prompt + self._n_tokens,
        }
        return answer

    def _answer(self, text: str, logprobs: dict | None, finish: str | None) -> dict:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [choice],
        }

    def _logprobs(self, values: list[TokenLogprobs]) -> dict | None:
        if not values:
            return None
        texts = [self._text(value.token) for value in values]
        offsets = list(itertools.accumulate([self._n_chars, *map(len, texts)]))
        self._n_chars = offsets[-1]
        return {
            "tokens": texts,
            "text_offset": offsets[:-1],
            "token_logprobs": [value.logprob for value in values],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in (*value.top, (value.token, value.logprob))}
                for value in values
            ],
        }

    def _text(self, token: int) -> str:
        return self._llama.engine.model.piece(token).decode(errors="ignore")
