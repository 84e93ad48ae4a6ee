"""Refusals: any exception as OpenAI's error object with its HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from sparseray.errors import SlotLostError, UserError
from sparseray.log import get_logger

logger = get_logger(__name__)
CLIENT_GONE = 499
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class OverloadedError(RuntimeError):
    """As many requests are open as the server accepts."""


class GenerationError(Exception):
    """A request that the engine gave up."""


class ApiError(Exception):
    """A refused request: its HTTP status and the fields of OpenAI's error object.

    Args:
        status: of the answer.
        message: what is wrong and what to do.
        param: field of the body that is meant.
        code: word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _sendable(message), code
        self.param = None if param is None else _sendable(param)
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _sendable(text: str) -> str:
    """Spell out what UTF-8 cannot say of a text that a client sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(error: Exception) -> JSONResponse:
    """Return the answer to a request that failed before its first byte."""
    found = to_api_error(error)
    return JSONResponse(found.to_dict(), status_code=found.status, headers=found.headers)


def to_api_error(error: Exception) -> ApiError:
    """Turn any exception into an API error; defects of ours are logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(
            error.status_code, str(error.detail), code=str(error.status_code), headers=error.headers
        )
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, ClientDisconnect):
        return ApiError(CLIENT_GONE, "the client closed the connection")
    if isinstance(error, GenerationError | SlotLostError):
        logger.warning("a request failed: %s", error)
        return ApiError(500, "the engine could not finish the request; try again", code="engine_error")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


def failure_reason(error: Exception) -> str | None:
    """Return what `requests_failed_total` counts an error as; None for a client's mistake or its going away."""
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, SlotLostError):
        return "slot_lost"
    return "engine" if to_api_error(error).status >= 500 else None
