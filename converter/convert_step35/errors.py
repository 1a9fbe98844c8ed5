"""The errors of the converter, as one tree.

ConvertError            one clear line; the command prints `convert-step35: error: ...` and exits 1
├── CheckpointError     the input checkpoint is damaged, incomplete or hostile
├── GgufError           a GGUF file is damaged or hostile
├── PlanError           a recipe, a type, an imatrix or a target size can't be met
│   └── OptionError     the value of an option means nothing; exits 2, like any wrong usage
└── OutputError         the output can't be stored, resumed or published
    └── DiskFullError   there is no room for it
"""

from unicodedata import category


class ConvertError(Exception):
    """What went wrong and where, what was expected, what was found and what to do, in one line."""


class CheckpointError(ConvertError):
    """The input checkpoint is damaged, incomplete or hostile."""


class GgufError(ConvertError):
    """A GGUF file is damaged or hostile."""


class PlanError(ConvertError):
    """A recipe, a type, an imatrix or a target size can't be met."""


class OptionError(PlanError):
    """The value of an option means nothing, whatever the checkpoint."""


class OutputError(ConvertError):
    """The output can't be stored, resumed or published."""


class DiskFullError(OutputError):
    """There is no room for the output."""


def quoted(value: object, max_chars: int = 80) -> str:
    """A value from an untrusted file, made safe for one error line: escaped and cut, text in quotes."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= max_chars else ascii(value[:max_chars]) + "..."
    shown = ascii(value)
    return shown if len(shown) <= max_chars else shown[:max_chars] + "..."


def printable(value: object, max_chars: int = 80) -> str:
    """A name from an untrusted file for a terminal: no control characters or line ends, and not without end."""
    text = "".join(
        "?" if category(char)[0] == "C" or category(char) in ("Zl", "Zp") else char
        for char in str(value)[: max_chars + 1]
    )
    return text if len(text) <= max_chars else text[:max_chars] + "..."
