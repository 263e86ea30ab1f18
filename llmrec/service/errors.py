"""One body for every error of the HTTP API, and the one place that says which status an exception has."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from llmrec.exceptions import (
    BusyError,
    DeadlineError,
    LLMRecError,
    PromptError,
    RequestError,
    UnknownCatalogError,
)

_UNSAID = "The server failed at this request. Its log has the reason, under the request's X-Request-Id."


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="What is wrong, and what to do.")
    type: str = Field(description="The kind of error, such as UnknownItemError.")
    param: str | None = Field(default=None, description="The part of the request that it is about, if one is.")
    code: int = Field(description="The HTTP status.")


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class QueueFullError(BusyError):
    """More work was asked for than the server holds."""


class DrainingError(BusyError):
    """The server is being stopped and takes nothing new."""


class SwapRunningError(BusyError):
    """A catalog is being swapped already."""


class CanaryFailedError(RequestError):
    """A catalog's version was loaded, but a recommendation from it was wrong, so that the old one stays."""


class NotServedError(RequestError):
    """The server was started without what this route needs."""


class PlacedError(LLMRecError):
    """An error of one request of several; `error` is what it was, `place` which request."""

    def __init__(self, place: int, error: Exception) -> None:
        super().__init__(f"requests[{place}]: {error}")
        self.place, self.error = place, error


@contextmanager
def placed(place: int | None) -> Iterator[None]:
    """Names the request of a batch in errors raised within; None for a request that came alone."""
    try:
        yield
    except PlacedError:
        raise
    except LLMRecError as error:
        if place is None:
            raise
        raise PlacedError(place, error) from error


# The first that fits counts.
_STATUS: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (QueueFullError, HTTPStatus.TOO_MANY_REQUESTS),
    (SwapRunningError, HTTPStatus.CONFLICT),
    (BusyError, HTTPStatus.SERVICE_UNAVAILABLE),
    (DeadlineError, HTTPStatus.GATEWAY_TIMEOUT),
    (UnknownCatalogError, HTTPStatus.NOT_FOUND),
    (NotServedError, HTTPStatus.NOT_FOUND),
    (RequestError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (PromptError, HTTPStatus.UNPROCESSABLE_ENTITY),
)


@dataclass(frozen=True)
class Problem:
    """What an answer says of an error."""

    status: int
    message: str
    type: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        detail = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.status)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(self.headers))


def problem_of(error: Exception) -> Problem:
    """What is told of an exception: of those that a request can cause everything, of others nothing but a 500."""
    if isinstance(error, PlacedError):
        inner = problem_of(error.error)
        param = f"requests[{error.place}]"
        return Problem(inner.status, f"{param}: {inner.message}", inner.type, param, inner.headers)
    for kind, status in _STATUS:
        if isinstance(error, kind):
            headers = {}
            if isinstance(error, BusyError):
                headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
            return Problem(int(status), str(error), type(error).__name__, headers=headers)
    return Problem(int(HTTPStatus.INTERNAL_SERVER_ERROR), _UNSAID, "EngineError")
