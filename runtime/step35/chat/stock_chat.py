"""llama_cpp's chat completions on this project's prompts: grammars, forced calls and chunks stay llama_cpp's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from step35.chat.chat_prompts import ChatPrompts
from step35.chat.messages import Message
from step35.chat.openai_messages import conversation_of
from step35.chat.prompt_builder import Prompt
from step35.engine.engine import Engine
from step35.engine.session import Session
from step35.native.library import ChatFormatterResponse, chat_handler

Complete = Callable[..., Any]
"""llama_cpp's create_completion: a completion, or an iterator of its chunks if `stream`."""


def stock_chat(engine: Engine, session: Session, prompts: ChatPrompts) -> Callable[..., Any]:
    """Returns a chat handler for llama_cpp: a message that comes back unchanged keeps the ids it was sampled with."""

    def answer(*, llama: Any, messages: Sequence[Mapping[str, Any]], tools: Any = None, **options: Any) -> Any:
        prompt = prompts.build(conversation_of(messages, tools))
        model = _PromptedModel(engine, session, prompts, prompt, llama.create_completion, llama.verbose)
        return chat_handler(model.format)(llama=model, messages=messages, tools=tools, **options)

    return answer


class _PromptedModel:
    """Stands in for the model while llama_cpp's handler answers one request: its prompt is built already."""

    def __init__(
        self,
        engine: Engine,
        session: Session,
        prompts: ChatPrompts,
        prompt: Prompt,
        complete: Complete,
        verbose: bool,
    ) -> None:
        self.verbose = verbose
        self._engine, self._session = engine, session
        self._prompts, self._prompt, self._complete = prompts, prompt, complete

    def format(self, **_: Any) -> ChatFormatterResponse:
        end = self._engine.token_text(self._engine.eos)
        return ChatFormatterResponse(prompt="", stop=[end], added_special=True)

    def tokenize(self, *_: Any, **__: Any) -> list[int]:
        return self._prompt.tokens

    def create_completion(self, *, stream: bool, **options: Any) -> Any:
        completion = self._complete(stream=stream, **options)
        if stream:
            return self._follow(completion)
        self._remember([completion])
        return completion

    def _follow(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        followed = []
        for chunk in chunks:
            followed.append(chunk)
            yield chunk
        self._remember(followed)

    def _remember(self, pieces: Sequence[dict[str, Any]]) -> None:
        """Keeps the answer's ids, unless a stop string cut the text: then they say more than the caller has."""
        choices = [piece["choices"][0] for piece in pieces]
        tokens, n_prompt = list(self._session.tokens), len(self._prompt.tokens)
        if tokens[:n_prompt] != self._prompt.tokens:  # the caller used the session otherwise between two chunks
            return
        if self._engine.is_end(tokens[-1]):
            tokens.pop()
        elif choices[-1]["finish_reason"] == "stop":
            return
        message = Message("assistant", "".join(choice["text"] for choice in choices))
        self._prompts.builder.remember(self._prompt, tokens, message)
