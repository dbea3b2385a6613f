"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A response that is an error.

    Args:
        status: Of HTTP.
        message: One line for the client; nothing of our inside.
        param: The field that is wrong.
        code: For programs.
        retry_after: Seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients parse it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that only errors have."""
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def of_failure(failure: str) -> ApiError:
    """For a sequence that the engine could not finish."""
    if failure == "timeout":
        return ApiError(504, "the request took longer than this server allows", code="timeout")
    if failure == "shutdown":
        return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=30)
    return ApiError(500, "the server failed to compute an answer", code="internal_error")


def of_full_queue(seconds: int) -> ApiError:
    """For a request that finds too many waiting."""
    message = f"the queue is full; try again in {seconds} s"
    return ApiError(429, message, code="queue_full", retry_after=seconds)
