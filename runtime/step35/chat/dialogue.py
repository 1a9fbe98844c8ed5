"""A conversation on one session: each answer goes on from the tokens that were sampled before it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from step35.chat.answer import Answer
from step35.chat.chat_prompts import chat_prompts
from step35.chat.messages import Conversation, Message
from step35.chat.output_parser import OutputParser
from step35.chat.prompt_builder import Prompt
from step35.chat.sampled_turns import KnownTurn, TurnMap
from step35.chat.session_file import SavedSession, read_cells, read_session, write_session
from step35.chat.session_key import session_key
from step35.engine.decode_loop import Turn, begin, generate
from step35.engine.detokenize import TextStream
from step35.engine.engine import Engine
from step35.engine.session import Session
from step35.errors import ModelError, SettingsError
from step35.sampling.sampler import Sampling
from step35.sampling.token_chooser import Chooser


class Reply:
    """An answer that is being generated: iterate over its text, up to its end or a Cancelled."""

    def __init__(self, engine: Engine, conversation: Conversation, prompt: Prompt, turn: Turn) -> None:
        self.conversation, self.prompt, self.turn = conversation, prompt, turn
        parser = OutputParser((), prompt.opens_reasoning, lambda: "")
        self._answer = Answer(partial(engine.piece, special=True), parser)
        self._text = TextStream(engine.piece)

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends within the reasoning."""
        return self._answer.in_reasoning

    def __iter__(self) -> Iterator[str]:
        """Yields the text as the model writes it, markup included."""
        for token in generate(self.turn):
            self._answer.feed(token)
            yield self._text.add(token)
        yield self._text.finish()

    def finish(self) -> tuple[Message, list[int]]:
        """Ends the answer, wherever it is; returns its message, and all tokens up to the answer's last."""
        n_prompt = len(self.prompt.tokens)
        self._answer.finish(self.turn.finish or "length", n_prompt, self.turn.stats.n_reused)
        return self._answer.message(), self.turn.session.tokens[: n_prompt + self._answer.n_tokens]


class Dialogue:
    """A person's conversation with the model: `ask`, iterate over the reply, then `keep` it."""

    def __init__(self, engine: Engine, session: Session, sampling: Sampling) -> None:
        """Raises ModelError if the model's file has no chat template."""
        self.engine, self.session = engine, session
        self.messages: tuple[Message, ...] = ()
        self._sampling = sampling
        self._known = TurnMap()
        self._prompts = chat_prompts(engine, self._known)
        self._turns: tuple[KnownTurn, ...] = ()
        self._last_start = 0

    def ask(self, text: str) -> Reply:
        """Returns the reply to a message. Until it is kept, the conversation is as before."""
        conversation = Conversation((*self.messages, Message("user", text)))
        prompt = self._prompts.build(conversation)
        turn = begin(self.session, prompt.tokens, Chooser(self._sampling))
        return Reply(self.engine, conversation, prompt, turn)

    def keep(self, reply: Reply) -> None:
        """Adds the question and what was answered so far, with the tokens that were sampled."""
        message, tokens = reply.finish()
        turn = self._prompts.builder.remember(reply.prompt, tokens, message)
        self.messages = (*reply.conversation.messages, message)
        self._turns, self._last_start = (*reply.prompt.turns, turn), reply.prompt.last_start

    def reset(self) -> None:
        """Forgets everything that was said."""
        self.session.rewind(0)
        self.messages, self._turns, self._last_start = (), (), 0

    def save(self, path: Path) -> None:
        """Writes the conversation with its cells."""
        if not self.session.n_past:
            raise SettingsError("nothing to save: the conversation has no tokens yet; say something first")
        key = session_key(self.engine)
        write_session(path, key, self.session.snapshot(), self._turns, self._last_start, self.messages)

    def load(self, path: Path) -> None:
        """Goes back to a saved conversation of the same model; what can't be read changes nothing."""
        saved = read_session(path)
        if saved.messages is None:
            raise ModelError(f"not a saved chat: {path} expected messages, got a session of step35 serve; serve it")
        self._check(saved)
        self.session.restore(read_cells(saved))
        for turn in saved.turns:
            self._known.add(turn)
        self.messages, self._turns, self._last_start = saved.messages, saved.turns, saved.last_start

    def _check(self, saved: SavedSession) -> None:
        for name, wanted in session_key(self.engine).items():
            if (got := saved.key.get(name)) != wanted:
                raise ModelError(
                    f"saved with another {name}: {saved.path} expected {wanted}, got {got}; "
                    "run step35 chat as it was run then"
                )
