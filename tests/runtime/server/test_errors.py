"""What a client hears of an error: a status that it can act upon, and the field to blame."""

import pytest

from step35.chat.errors import BadConversation
from step35.errors import ContextFull, DoesNotFit, SettingsError, Step35Error
from step35.server.errors import ApiError, api_error, too_large


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (BadConversation("the chat template failed", "messages"), (400, "invalid_request_error", "messages")),
        (BadConversation("the chat template failed"), (400, "invalid_request_error", None)),
        (SettingsError("bad token"), (400, "invalid_request_error", None)),
        (ContextFull("prompt too long"), (400, "invalid_request_error", None)),
        (DoesNotFit("memory is short"), (503, "overloaded_error", None)),
        (too_large("too much", "stop"), (413, "request_too_large", "stop")),
    ],
)
def test_each_error_has_its_status(error: Step35Error, wanted: tuple[int, str, str | None]) -> None:
    told = api_error(error)
    assert isinstance(told, ApiError)
    assert (told.status, told.kind, told.param) == wanted and str(told) == str(error)
