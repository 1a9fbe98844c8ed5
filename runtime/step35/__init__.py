"""step35: the edge runtime for Step-3.5-Flash on top of llama.cpp."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Cancelled": "errors",
    "ContextFull": "errors",
    "DoesNotFit": "errors",
    "Engine": "engine.engine",
    "EngineOptions": "options",
    "Llama": "llama",
    "ModelError": "errors",
    "NativeError": "errors",
    "Sampling": "sampling.sampler",
    "Session": "engine.session",
    "SettingsError": "errors",
    "Step35Error": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Imports a public name on first use: `import step35` loads neither numpy nor llama.cpp."""
    if name not in _HOMES:
        raise AttributeError(f"module 'step35' has no attribute {name!r}")
    return getattr(import_module(f"step35.{_HOMES[name]}"), name)
