"""The errors of the runtime, as one tree.

Step35Error            one clear line; the command prints `step35: error: ...` and exits 1
├── ModelError         a GGUF file is not a usable Step-3.5 model
├── NativeError        llama.cpp refused, failed, or lacks a symbol
├── BackendError       a build of llama.cpp can't be made, found or used
├── ContextFull        a timeline doesn't fit into its context
├── DoesNotFit         the memory can't hold what was asked for
├── SettingsError      a setting has an unknown or impossible value
└── Cancelled          a decode was stopped on request
"""


class Step35Error(Exception):
    """What happened, where, what was wanted, what was found and what to do, in one line."""


class ModelError(Step35Error):
    """A GGUF file is not a usable Step-3.5 model."""


class NativeError(Step35Error):
    """llama.cpp refused, failed, or lacks a symbol."""


class BackendError(Step35Error):
    """A build of llama.cpp can't be made, found or used."""


class ContextFull(Step35Error):
    """A timeline doesn't fit into its context; nothing slides."""


class DoesNotFit(Step35Error):
    """The memory can't hold what was asked for; nothing was loaded."""


class SettingsError(Step35Error, ValueError):
    """A setting has an unknown or impossible value."""


class Cancelled(Step35Error):
    """A decode was stopped on request; the timeline is as before it."""
