"""The HTTP application: the service's routes, the layers around them, and one shape for every error.

From the outside in: `Observer` (ids, metrics, no error gets out), `KeyGuard` (401), `BodyGuard` (limits, disconnects),
then the framework's own.
"""

import logging
from collections.abc import Collection, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from llmrec import __version__
from llmrec.exceptions import LLMRecError
from llmrec.service.body import BodyGuard
from llmrec.service.errors import Problem, problem_of
from llmrec.service.keys import KeyGuard, Keys
from llmrec.service.limits import Limits
from llmrec.service.observer import Observer
from llmrec.service.routes import metrics_route, model_route, routes
from llmrec.service.service import Service
from llmrec.service.users import users_router

logger = logging.getLogger(__name__)

DOCS = frozenset(("/docs", "/openapi.json"))
_DESCRIPTION = "Recommendations from a generative model: every item is of the catalog, and none comes twice."
_SHOWN_ERRORS = 5


def build_app(service: Service, limits: Limits | None = None, keys: Keys | None = None) -> FastAPI:
    """A whole application of a service; `service.start` is the caller's to await.

    Args:
        limits: of bodies; default: the service's.
        keys: who may use it; None: everybody.
    """
    app = FastAPI(docs_url="/docs", redoc_url=None, openapi_url="/openapi.json")
    attach(app, service, limits, keys, kept=DOCS)
    return app


def attach(
    app: FastAPI,
    service: Service,
    limits: Limits | None = None,
    keys: Keys | None = None,
    kept: Collection[str] = DOCS,
) -> None:
    """Makes an application that has not answered yet serve a service, behind its layers.

    Args:
        app: of its routes those that are not in `kept` are taken away, and so are its handlers of errors.
        kept: paths of routes that stay; ours win over them.

    Its `state.llmrec` is the service.
    """
    app.state.llmrec = service
    stay = [route for route in app.router.routes if getattr(route, "path", None) in kept]
    app.router.routes.clear()
    app.include_router(routes())
    app.include_router(users_router())
    own = {getattr(route, "path", None) for route in app.router.routes}
    theirs = {getattr(route, "path", None) for route in stay}
    for path, make in (("/v1/models", model_route), ("/metrics", metrics_route)):
        if path not in theirs:
            app.include_router(make())
    app.router.routes.extend(route for route in stay if getattr(route, "path", None) not in own)
    # A redirect would say the Host header's word for where to go; a path with a slash too many is no route.
    app.router.redirect_slashes = False
    app.title, app.version, app.description = "llmrec", __version__, _DESCRIPTION
    app.openapi_schema = None
    app.exception_handlers.clear()
    app.exception_handlers.update(
        {
            LLMRecError: _answer_error,
            RequestValidationError: _answer_invalid,
            HTTPException: _answer_http,
            Exception: _answer_error,
        }
    )
    app.middleware_stack = None  # vLLM has built one by now; it is built anew with all layers and handlers
    app.add_middleware(BodyGuard, limits=limits or service.limits, metrics=service.metrics)
    if keys is not None:
        app.add_middleware(KeyGuard, keys=keys, metrics=service.metrics)
        _say_key(app)
    app.add_middleware(Observer, service=service, routes=lambda: app.router.routes)


def _say_key(app: FastAPI) -> None:
    """Puts the API key into the OpenAPI description."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        if "/health" in schema["paths"]:
            schema["paths"]["/health"]["get"]["security"] = []
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of changing it


async def _answer_error(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("request %s failed", getattr(request.state, "request_id", "?"), exc_info=error)
    return problem.response()


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    said = {
        HTTPStatus.NOT_FOUND: f"There is nothing at {request.url.path[:200]!r}. GET /openapi.json lists what is.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not what {request.url.path[:200]!r} takes. See "
        "/openapi.json.",
        HTTPStatus.BAD_REQUEST: "The body cannot be read as JSON. Send valid JSON in UTF-8.",
    }.get(status, str(error.detail))
    kind = status.phrase.title().replace(" ", "") + "Error"
    return Problem(int(status), said, kind, headers=error.headers or {}).response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """422 for what does not fit the schema, 400 for what is no JSON; the values sent are not repeated."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        reason = next(
            str(one.get("ctx", {}).get("error", one["msg"])) for one in found if one["type"] == "json_invalid"
        )
        return Problem(
            int(HTTPStatus.BAD_REQUEST), f"The body is no JSON: {reason}. Send valid JSON.", "JSONError"
        ).response()
    said = [f"{where}: {one['msg']}" if (where := _where(one["loc"])) else str(one["msg"]) for one in found]
    more = f"; and {len(said) - _SHOWN_ERRORS} more" if len(said) > _SHOWN_ERRORS else ""
    message = f"{'; '.join(said[:_SHOWN_ERRORS])}{more}. GET /openapi.json describes what is taken."
    param = _where(found[0]["loc"]) if found else ""
    return Problem(int(HTTPStatus.UNPROCESSABLE_ENTITY), message, "ValidationError", param or None).response()


def _where(place: Sequence[str | int]) -> str:
    """A place in a request, as one would write it.

    >>> _where(("body", "batch", "requests", 3, "events", 0, "action"))
    'requests[3].events[0].action'
    """
    words = list(place)
    for dropped in (("body", "query", "path"), ("one", "batch")):
        if words and words[0] in dropped:
            words.pop(0)
    text = "".join(f"[{word}]" if isinstance(word, int) else f".{str(word)[:100]}" for word in words)
    return text.removeprefix(".")[:300]
