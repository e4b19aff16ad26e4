"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from jaxllm.core.logging import log
from jaxllm.errors import CapacityError, UnsupportedError, WeightsError, user_errors
from jaxllm.serve.request import Busy, Gone

__all__ = ["KINDS", "RequestError", "body_of", "response_to", "status_of"]


class RequestError(ValueError):
    """A request that cannot be served, with its HTTP status."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.challenge: str | None = None  # how a client may show who it is, of a 401


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""Status -> type of the error, where it is not the usual one."""


def body_of(message: str, status: int, *, param: str | None = None, code: str | None = None) -> Any:
    """The JSON object of an error."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: BaseException) -> tuple[int, str | None, str | None]:
    """(status, param, code) of an error."""
    if isinstance(error, RequestError):
        return error.status, error.param, error.code
    if isinstance(error, Busy):
        return 429, None, "queue_full"
    if isinstance(error, Gone):
        return 503, None, "engine_unavailable"
    if isinstance(error, CapacityError):
        return 400, None, "context_length_exceeded"
    if isinstance(error, UnsupportedError):
        return 400, None, "unsupported"
    if isinstance(error, (*user_errors, WeightsError)):
        return 400, None, None
    return 500, None, None


def response_to(error: BaseException) -> JSONResponse:
    """The answer to a request that failed; what is not the caller's fault is logged."""
    status, param, code = status_of(error)
    message = str(error)
    if status == 500:
        log.error("a request failed", exc_info=error)
        message = "internal error; the server's log says more"
    headers = {"Retry-After": "1" if status == 429 else "10"} if status in (429, 503) else {}
    if isinstance(error, RequestError) and error.challenge is not None:
        headers["WWW-Authenticate"] = error.challenge
    return JSONResponse(
        body_of(message, status, param=param, code=code), status_code=status, headers=headers
    )
