"""Observer: the outermost of a server's layers; it gives every request an id, counts it, and lets no error through."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrec.service.errors import QueueFullError, problem_of
from llmrec.service.metrics import OTHER

if TYPE_CHECKING:
    from llmrec.service.service import Service

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
# What tells how the server is must answer however much it has to do, and keeps no stopping server waiting.
UNCOUNTED = frozenset(("/health", "/ready", "/metrics"))
_GONE = 499  # a client that did not wait for its answer, as nginx has it
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Observer:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, service: "Service", routes: Callable[[], Iterable[BaseRoute]]) -> None:
        """`routes` are the application's, which give the metrics their labels."""
        self._app = app
        self._service = service
        self._routes = routes
        self._templates: list[tuple[re.Pattern[str], str]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = _GONE

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        path = route_path(scope)
        try:
            with nullcontext() if path in UNCOUNTED else self._service.accepted():
                await self._app(scope, receive, told)
        except Exception as error:
            if isinstance(error, QueueFullError):
                self._service.metrics.refused("requests")
            else:
                logger.exception("request %s failed", request_id)
            if status == _GONE:
                await problem_of(error).response()(scope, receive, told)
        finally:
            self._service.metrics.answered(self._label(path), scope["method"], status, time.perf_counter() - begin)

    def _label(self, path: str) -> str:
        if self._templates is None:
            found = ((getattr(route, "path_regex", None), getattr(route, "path", "")) for route in self._routes())
            self._templates = [(pattern, template) for pattern, template in found if pattern is not None]
        return next((template for pattern, template in self._templates if pattern.match(path)), OTHER)


def route_path(scope: Scope) -> str:
    """A request's path as routes name it: without what a proxy in front of the server added (`--root-path`)."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _request_id(scope: Scope) -> str:
    """The one given, if it is a plain word of at most 128 characters, else a new one."""
    for name, value in scope["headers"]:
        if name.lower() == REQUEST_ID.lower().encode():
            given = value.decode("latin-1")
            return given if _ID.fullmatch(given) else uuid.uuid4().hex
    return uuid.uuid4().hex
