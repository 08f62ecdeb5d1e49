"""Errors in the form that clients of the OpenAI API read."""

from __future__ import annotations

from typing import Any

from qalora_compile.errors import QaloraError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: What is wrong and what to do, in one line.
        kind: The type of error in OpenAI's terms.
        code: Its code, or None.
        param: The field that it concerns, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.kind, self.code, self.param = kind, code, param

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(message: str, param: str | None = None) -> ApiError:
    """The error for a field that is wrong."""
    return ApiError(400, message, param=param)


def of_package(error: QaloraError, code: str | None = None) -> ApiError:
    """The error for what the model or its tokenizer refuses."""
    hint = f": {error.hint}" if error.hint else ""
    return ApiError(400, f"{error.what}{hint}", code=code)


def gone() -> ApiError:
    """The error for a client that did not wait; nobody reads it."""
    return ApiError(499, "the client has gone")


def internal() -> ApiError:
    """The error for a bug; its text goes to the server's log, not to the client."""
    return ApiError(500, "the server failed on this request; its log says why", kind="server_error")


def of_exception(error: Exception) -> ApiError:
    """The error that a client sees."""
    if isinstance(error, ApiError):
        return error
    return of_package(error) if isinstance(error, QaloraError) else internal()
