"""JSON as it goes over the wire, and the parts of it that the APIs' streams share. Pure."""

import json
import secrets
from typing import Any

from step35.server.events import Progress

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dumps(value: Any) -> str:
    """Returns JSON on one line."""
    return _ENCODER.encode(value)


class Frame:
    """A JSON document with one string left open: most pieces of a stream differ in nothing else.

    HOLE stands in its place; it is made anew for each process, so that no client can have it in a text.
    """

    HOLE = secrets.token_hex(16)

    def __init__(self, document: Any) -> None:
        self._before, self._after = dumps(document).split(dumps(self.HOLE))

    def filled(self, text: str) -> str:
        """Returns the document on one line, with the text in it."""
        return f"{self._before}{dumps(text)}{self._after}"


def progress_fields(progress: Progress | None) -> dict[str, Any]:
    """Returns the field of a ping that says how far the prompt is; none before it is read."""
    return {"prompt_progress": {"processed": progress.n_done, "total": progress.n_total}} if progress else {}
