"""What a client asks for, whatever API it speaks. Pure."""

from dataclasses import dataclass
from typing import Any

from step35.chat.messages import Conversation
from step35.sampling.sampler import Sampling


@dataclass(frozen=True, slots=True)
class JsonOutput:
    """The answer is to be JSON: any object, or what the schema says."""

    schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request. A conversation is rendered by the template; a text or token ids are completed as they are."""

    prompt: Conversation | str | tuple[int, ...]
    sampling: Sampling
    n_predict: int = -1
    """-1 fills the context."""
    stop: tuple[str, ...] = ()
    n_logprobs: int | None = None
    """How many alternatives to report beside each chosen token; None reports nothing."""
    tool_choice: str = "auto"
    """auto, none, required or function:NAME."""
    output: JsonOutput | None = None
    effort: str | None = None
    """none, low, medium or high; None is as high: no cap."""
    reasoning_budget: int | None = None
    """Tokens of reasoning for this user request, over its whole tool loop; goes before `effort`."""
    parallel_tool_calls: bool = True
    stream: bool = False
    model: str = ""
    echo: bool = False
    """Completions: the prompt's text comes back before the completion's."""
    include_usage: bool = True
    """Chat and completions: whether a stream ends with a chunk that holds the usage."""
    has_seed: bool = False
    """Whether the client gave sampling.seed; else it is 0 and the server draws one."""
    cache_key: str | None = None
    """What the client calls its conversation, if it says: a hint, never trusted."""
