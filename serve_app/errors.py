"""Errors as clients see them: JSON that says what to change, in the shape TEI gives."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        kind: `error_type` of the body.
        message: what is wrong and what to do.
        headers: further response headers.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": self.message, "error_type": self.kind}

    def openai_body(self) -> dict[str, Any]:
        """What the `openai` client shows its users; it would hide a message that is no object's."""
        error = {"message": self.message, "type": self.kind, "param": None, "code": None}
        return {"error": error, "error_type": self.kind}


def unauthorized(given: bool) -> ApiError:
    what = "the API key is not valid" if given else "an API key is needed"
    return ApiError(
        401,
        "Unauthorized",
        f"{what}; send it as: Authorization: Bearer KEY",
        {"www-authenticate": "Bearer"},
    )


def of_another_site() -> ApiError:
    return ApiError(
        403,
        "Forbidden",
        "without API keys this server answers this machine, as 127.0.0.1 or localhost, and no page "
        "of another site: give it keys, name the page's origin in cors_origins, or say --insecure",
    )


def invalid(message: str) -> ApiError:
    return ApiError(422, "Validation", message)


def too_large(message: str) -> ApiError:
    return ApiError(413, "Validation", message)


def overloaded(message: str, retry_after_s: int) -> ApiError:
    return ApiError(429, "Overloaded", message, {"retry-after": str(retry_after_s)})


def unavailable(message: str) -> ApiError:
    return ApiError(503, "Unhealthy", message, {"retry-after": "1"})
