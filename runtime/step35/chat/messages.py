"""What a client asks and what it gets, whatever API it speaks. Pure."""

from dataclasses import dataclass
from typing import Any, Literal

from step35.chat.errors import ApiError
from step35.sampling.sampler import Sampling

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `arguments` is JSON text, exactly as sent or sampled."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message; `reasoning` is None if the client sent none, `tool_call_id` what a tool's message answers."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages so far, and the tools on offer."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


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


# What happens, in order, from the scheduler to an API's writer.


@dataclass(frozen=True, slots=True)
class Progress:
    """Prefill: tokens of the prompt done (the cached ones at first) of all."""

    n_done: int
    n_total: int


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A call begins; `index` counts the turn's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of a call's arguments; all pieces joined are its JSON."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as bytes of text, with its log-probability."""

    piece: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.piece.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The token that was chosen and the most probable ones there; comes before the deltas it led to."""

    chosen: TokenText
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Counts of tokens; the cached ones are among the prompt's, the reasoning among the generated."""

    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    n_reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. `stop_text` is the stop string that ended it, if one did."""

    reason: Literal["stop", "length", "tool_calls"]
    usage: TokenUsage
    stop_text: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of an answer that broke after it had begun."""

    error: ApiError


Event = (
    Progress
    | ReasoningDelta
    | ContentDelta
    | ToolCallBegin
    | ToolCallArguments
    | ToolCallEnd
    | Logprobs
    | Finished
    | Failed
)


@dataclass(frozen=True, slots=True)
class Sse:
    """One server-sent event; `event` is its name, if the API names its events."""

    event: str | None
    data: str
