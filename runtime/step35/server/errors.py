"""What a client is told when its request can't be served; each API puts it in its own form."""

from step35.chat.errors import BadConversation
from step35.errors import DoesNotFit, Step35Error

INVALID = "invalid_request_error"
TOO_LARGE = "request_too_large"
UNAUTHORIZED = "authentication_error"
FORBIDDEN = "permission_error"
NOT_FOUND = "not_found_error"
BUSY = "rate_limit_error"
UNAVAILABLE = "overloaded_error"
BROKEN = "api_error"
TOO_LONG = "context_length_exceeded"


class ApiError(Step35Error):
    """An HTTP status, a kind of error, one line for people, and the field of the request that is to blame.

    `code` is a word of OpenAI's for what its clients act upon.
    """

    def __init__(self, status: int, kind: str, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.param, self.code = status, kind, message, param, code


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error for a request that is wrong in itself."""
    return ApiError(400, INVALID, message, param, code)


def too_large(message: str, param: str | None = None) -> ApiError:
    """Returns the error for a request that passes one of the server's limits."""
    return ApiError(413, TOO_LARGE, message, param)


def api_error(error: Step35Error) -> ApiError:
    """Returns what a client is told when its request can't begin."""
    match error:
        case ApiError():
            return error
        case DoesNotFit():
            return ApiError(503, UNAVAILABLE, str(error))
        case BadConversation():
            return bad_request(str(error), error.param)
        case _:
            return bad_request(str(error))
