"""Errors as OpenAI's APIs write them."""

from typing import Any

from step35.server.errors import ApiError


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns the body of an error's answer."""
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": fields | {"request_id": request_id}}
