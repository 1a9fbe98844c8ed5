"""An engine's chat prompts: rendered by its file's template, with the ids of the turns that it sampled itself."""

from dataclasses import dataclass
from functools import partial

from step35.chat.messages import Conversation
from step35.chat.prompt_builder import Prompt, PromptBuilder, TokenCache
from step35.chat.sampled_turns import TurnMap
from step35.chat.template import ChatTemplate
from step35.engine.engine import Engine
from step35.errors import ModelError


@dataclass(frozen=True, slots=True)
class ChatPrompts:
    """Builds prompts for a context of `n_ctx` tokens. Callable from any thread."""

    builder: PromptBuilder
    template: ChatTemplate
    n_ctx: int

    def build(self, conversation: Conversation, effort: str | None = None) -> Prompt:
        """Returns a conversation's prompt; raises BadConversation.

        One that is too long for the context is rendered by the template alone, which drops older reasoning.
        """
        render = partial(self.template.render, effort=effort)
        prompt = self.builder.build(conversation, render)
        return prompt if len(prompt.tokens) < self.n_ctx else self.builder.build(conversation, render, exact=False)


def chat_prompts(engine: Engine, turns: TurnMap) -> ChatPrompts:
    """Returns the prompts of an engine's chats; raises ModelError if its file has no chat template."""
    source = engine.chat_template
    if source is None:
        path = engine.options.model
        raise ModelError(f"no chat template: {path} has no tokenizer.chat_template; convert it again")
    template = ChatTemplate(source, engine.token_text(engine.bos), engine.token_text(engine.eos))
    tokenize = TokenCache(partial(engine.tokenize, add_bos=False))
    return ChatPrompts(PromptBuilder(tokenize, turns, engine.turn_start), template, engine.n_ctx)
