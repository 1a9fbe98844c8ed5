"""llama.cpp's library: the one module that imports llama_cpp.

It loads the chosen build, binds the symbols outside the stable C interface, and keeps llama.cpp's log. The other
modules of this folder make typed classes of it. Every failure leaves as one of our errors.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

from step35.errors import NativeError
from step35.native.chosen_build import check_identity, chosen_libraries, describe

PINNED_VERSION = "0.3.36"

with chosen_libraries(PINNED_VERSION):
    import llama_cpp.llama_cpp as binding
    from llama_cpp import Llama as _Llama
    from llama_cpp import LlamaGrammar, LlamaState  # noqa: F401
    from llama_cpp import __version__ as binding_version
    from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

C: Any = binding
"""llama.cpp's functions. Any: the binding names C's types where ctypes takes Python's, and handles are addresses."""

log = logging.getLogger("step35.llama_cpp")
log.addHandler(logging.NullHandler())  # without it, Python prints a library's warnings on stderr


# llama_cpp's own classes

StockLlama: Any = _Llama
"""The base of step35.Llama. Not typed: what it declares as attributes and arrays are properties and errors there."""


def chat_handler(formatter: Callable[..., ChatFormatterResponse]) -> Callable[..., Any]:
    """Returns llama_cpp's answer to a chat: the formatter's prompt, completed by what is given as `llama`."""
    return chat_formatter_to_chat_completion_handler(formatter)


# llama.cpp's log

_LEVELS = {2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_ERROR = 4
_last_errors: deque[str] = deque(maxlen=4)
_allocations: deque[str] = deque(maxlen=1024)


@C.llama_log_callback
def _route_log(level: int, text: bytes, _: object) -> None:
    line = text.decode(errors="replace").strip()
    if not line:
        return
    if level == _ERROR:
        _last_errors.append(line)
    elif "buffer size = " in line:
        _allocations.append(line)
    log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


def reason() -> str:
    """Returns llama.cpp's last errors in a line, and forgets them."""
    text = "; ".join(_last_errors) or "no reason given"
    _last_errors.clear()
    return text


def forget_errors() -> None:
    """Forgets the errors of earlier calls, so that `reason` tells of the next one."""
    _last_errors.clear()


def take_allocations() -> list[str]:
    """Returns what llama.cpp's log told of its buffers since the last call."""
    lines = list(_allocations)
    _allocations.clear()
    return lines


# symbols outside the stable C interface


def bind(name: str, mangled: str, argtypes: list[Any], restype: Any) -> Any:
    """Returns a function of libllama by its name or its C++-mangled name; raises NativeError that names it."""
    for symbol in (name, mangled):
        function = getattr(C._lib, symbol, None)
        if function is not None:
            function.argtypes, function.restype = argtypes, restype
            return function
    raise NativeError(
        f"libllama lacks {name} (looked for {name} and {mangled}): expected llama-cpp-python "
        f"{PINNED_VERSION}, got {binding_version}; pip install llama-cpp-python=={PINNED_VERSION}"
    )


HEADS_RETURN_ALL_ROWS = getattr(C._lib, "step35_heads_return_all_rows", None) is not None
"""Whether this llama.cpp has the patch by which a head returns hidden states of rows without logits."""


def _identity() -> str:
    """Returns what a library of patches/src says of itself; "" for any other."""
    said = getattr(C._lib, "step35_build", None)
    if said is None:
        return ""
    said.argtypes, said.restype = [], ctypes.c_char_p
    return said().decode()


check_identity(C._base_path, _identity(), binding_version)


def running_backend() -> str:
    """Returns which llama.cpp is loaded, in a line."""
    return describe(C._base_path, _identity())


def start_backend() -> None:
    """Starts llama.cpp's backends once, with its log in ours."""
    C.llama_log_set(_route_log, None)
    _start_once()


@cache
def _start_once() -> None:
    C.llama_backend_init()
