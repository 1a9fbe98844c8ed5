"""step35: the edge runtime for Step-3.5-Flash on top of llama.cpp."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step35.engine.engine import Engine
    from step35.engine.session import Session
    from step35.errors import (
        Cancelled,
        ContextFull,
        DoesNotFit,
        ModelError,
        NativeError,
        SettingsError,
        Step35Error,
    )
    from step35.llama import Llama
    from step35.options import EngineOptions
    from step35.sampling.sampler import Sampling

__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "ContextFull",
    "DoesNotFit",
    "Engine",
    "EngineOptions",
    "Llama",
    "ModelError",
    "NativeError",
    "Sampling",
    "Session",
    "SettingsError",
    "Step35Error",
]

_HOMES = {
    "Engine": "engine.engine",
    "EngineOptions": "options",
    "Llama": "llama",
    "Sampling": "sampling.sampler",
    "Session": "engine.session",
}


def __getattr__(name: str) -> object:
    """Imports a public name on first use: `import step35` loads neither numpy nor llama.cpp."""
    if name not in __all__:
        raise AttributeError(f"module 'step35' has no attribute {name!r}")
    return getattr(import_module(f"step35.{_HOMES.get(name, 'errors')}"), name)
