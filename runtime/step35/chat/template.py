"""The model file's chat template: a conversation to the prompt's text. Sandboxed, with limits on size and time.

A template comes with a downloaded file, so it is a program that nobody here wrote. It sees the
conversation and nothing else; loops, calls and everything that makes a text longer look at the clock and
at the size on the way.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn, TypeVar

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from step35.chat.errors import BadConversation
from step35.chat.messages import Conversation, Message, Tool, ToolCall
from step35.markup import THINK, THINK_END

_T = TypeVar("_T")

MAX_SOURCE = 256 * 1024
MAX_CHARS = 16 * 2**20
MAX_SECONDS = 5.0
"""Of the thread's own time: a busy machine is no fault of the template."""
WHITE_SPACE = " \t\n\r\v\f"
PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"})
FILTERS = """
    abs capitalize count d default dictsort first float int items join last length list lower map max min reject
    rejectattr replace reverse round safe select selectattr sort string sum title trim unique upper
"""


class TooMuch(TemplateError):
    """A template ran too long or wrote too much."""


class ChatTemplate:
    """Renders conversations as llama.cpp does for this model: contents without white space around them."""

    def __init__(self, source: str, bos: str, eos: str, max_seconds: float = MAX_SECONDS) -> None:
        if len(source) > MAX_SOURCE:
            raise BadConversation(
                f"chat template too long: expected at most {MAX_SOURCE} characters, got {len(source)}"
            )
        self._environment = _Environment(max_seconds)
        self._globals = {"bos_token": bos, "eos_token": eos}
        self._template = _translated(lambda: self._environment.guarded(source))

    def render(self, conversation: Conversation, add_generation_prompt: bool = True, effort: str | None = None) -> str:
        """Returns the prompt; with effort "none" its reasoning is closed already. Raises BadConversation."""
        variables = {
            **self._globals,
            "messages": [_message(message) for message in conversation.messages],
            "tools": [_tool(tool) for tool in conversation.tools] or None,
            "add_generation_prompt": add_generation_prompt,
            **({"reasoning_effort": effort} if effort else {}),
        }
        text = _translated(lambda: self._environment.write(self._template, variables))
        return text + f"\n{THINK_END}\n" if effort == "none" and text.endswith(f"{THINK}\n") else text


def _translated(run: Callable[[], _T]) -> _T:
    """Runs a piece of the template; whatever it raises is the conversation's fault: it depends on the messages."""
    try:
        return run()
    except RecursionError:
        raise BadConversation("the chat template failed: it calls itself without end") from None
    except Exception as error:
        raise BadConversation(f"the chat template failed: {type(error).__name__}: {error}", "messages") from error


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with the names that chat templates use, on a clock."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_seconds: float) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._max_seconds = max_seconds
        self._end = float("inf")
        self.filters = {name: call for name, call in self.filters.items() if name in FILTERS.split()}
        self.filters |= {"tojson": _to_json, "_ticking": self._ticking, "_joined": self._joined}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}

    def guarded(self, source: str) -> Template:
        """Compiles a template whose loops and concatenations ask `check`."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_ticking")
        for parent in list(tree.find_all(nodes.Node)):
            _replace_concatenations(parent)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def write(self, template: Template, variables: dict[str, Any]) -> str:
        self._end = time.thread_time() + self._max_seconds
        pieces, n_chars = [], 0
        for piece in template.generate(variables):
            n_chars += len(piece)
            self.check(n_chars)
            pieces.append(piece)
        return "".join(pieces)

    def check(self, n_chars: int = 0) -> None:
        if n_chars > MAX_CHARS:
            raise TooMuch(f"expected at most {MAX_CHARS} characters, got {n_chars}")
        if time.thread_time() > self._end:
            raise TooMuch(f"expected at most {self._max_seconds} seconds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.check(_size(left) + _size(right))
        elif operator == "*":
            self.check(max(_size(left), 1) * right if isinstance(right, int) and _size(left) else 0)
            self.check(max(_size(right), 1) * left if isinstance(left, int) and _size(right) else 0)
        elif operator == "**" or isinstance(left, str):
            raise TooMuch(f"{operator} is not for chat templates")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in PADDING) and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return super().call(context, function, *args, **kwargs)

    def _ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def _joined(self, items: list[Any]) -> str:
        texts = [str(item) for item in items]
        self.check(sum(map(len, texts)))
        return "".join(texts)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _replace_concatenations(parent: nodes.Node) -> None:
    """Makes `a ~ b` under a node a filter that can count."""
    for name, value in parent.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(parent, name, _joined_list(value))
        elif isinstance(value, list):
            value[:] = [_joined_list(item) if isinstance(item, nodes.Concat) else item for item in value]


def _joined_list(node: nodes.Concat) -> nodes.Filter:
    return _filtered(nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "_joined")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """As the templates' authors have it: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent and min(indent, 8), sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _message(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content.strip(WHITE_SPACE)}
    if message.reasoning is not None:
        entry["reasoning_content"] = message.reasoning.strip(WHITE_SPACE)
    if message.tool_calls:
        entry["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    for key in ("tool_call_id", "name"):
        if (value := getattr(message, key)) is not None:
            entry[key] = value
    return entry


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _mapping(call.arguments)}}


def _mapping(arguments: str) -> dict[str, Any]:
    """Returns the arguments as the mapping that the template iterates over.

    A call that was cut short comes back as what it is, under one name, so that the conversation can go on.
    """
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
