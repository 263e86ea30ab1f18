"""BodyGuard: reads a request's body within its limits, and ends the work on it when its client goes away."""

import asyncio
import re
from collections.abc import Awaitable
from http import HTTPStatus

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrec.service.errors import Problem
from llmrec.service.limits import Limits
from llmrec.service.metrics import Metrics

# A client that is told 413 while it still sends often sees no answer but a broken connection: so this much more, in
# multiples of the limit, is read and thrown away first.
_DISCARDED = 8
# A string of JSON; one without an end goes on to the body's, so that no body takes more than one pass.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class BodyGuard:
    """ASGI middleware: what is behind it gets a whole body, and is cancelled when the client disconnects.

    Frameworks do not cancel handlers; uvicorn tells of a disconnect only to who calls `receive`, which is done here
    beside the handler.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = await self._read(scope, receive)
        if isinstance(body, Problem):
            return await body.response()(scope, receive, send)
        if body is None:
            return self._metrics.refused("disconnect")
        if body and (refusal := self._refusal(scope, body)) is not None:
            return await refusal.response()(scope, receive, send)
        await self._watched(scope, body, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | Problem | None:
        """The body; why it is refused; None if the client went away."""
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                return await self._whole(_content_length(scope), receive)
        except TimeoutError:
            self._metrics.refused("slow_body")
            return _problem(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The body did not arrive in {self._limits.read_seconds:g} s. Send it faster, or less of it.",
                "SlowBodyError",
            )

    async def _whole(self, length: int | None, receive: Receive) -> bytes | Problem | None:
        limit = self._limits.max_body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        patience = 0 if length is not None and length > limit * _DISCARDED else limit * _DISCARDED
        while more:
            if size > patience or (length or 0) > patience > 0:
                break
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
        if size <= limit and not more:
            return b"".join(parts)
        self._metrics.refused("body")
        return _problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is longer than {limit} bytes, the server's limit. Send a shorter history, or fewer requests.",
            "BodyTooLargeError",
        )

    def _refusal(self, scope: Scope, body: bytes) -> Problem | None:
        kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
        if kind.partition(b";")[0].strip().lower() != b"application/json":
            self._metrics.refused("media_type")
            return _problem(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "The body is not said to be JSON. Send it with the header Content-Type: application/json.",
                "MediaTypeError",
            )
        # JSON in UTF-8 has no such byte; a parser takes it for UTF-16 or UTF-32, in which `depth_of` miscounts.
        if b"\x00" in body:
            return _problem(
                HTTPStatus.BAD_REQUEST,
                "The body has zero bytes and is no JSON in UTF-8. Send valid JSON.",
                "JSONError",
            )
        if depth_of(body) > self._limits.max_depth:
            self._metrics.refused("depth")
            return _problem(
                HTTPStatus.BAD_REQUEST,
                f"The body has lists and objects more than {self._limits.max_depth} deep in one another. Send what "
                "GET /openapi.json describes.",
                "NestingError",
            )
        return None

    async def _watched(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the application until it is done, or until the client is gone."""
        given, answered = False, False
        gone = asyncio.Event()

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def told(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                answered = True
            await send(message)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(_awaited(self._app(scope, replay, told)))
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
            gone.set()
            if not work.done() and not answered:
                self._metrics.refused("disconnect")
                work.cancel()
                await asyncio.wait((work,))
                if not work.cancelled() and (error := work.exception()) is not None:
                    raise error
                return
            await work
        finally:
            for task in (work, watching):
                task.cancel()
            await asyncio.gather(work, watching, return_exceptions=True)


def depth_of(body: bytes) -> int:
    """How many lists and objects stand within one another, at most, without parsing: brackets outside of strings.

    >>> depth_of(b'{"a": [[1, 2], {"b": "]]}}[[[[["}]}'), depth_of(b"7")
    (3, 0)
    """
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NO_BRACKETS), dtype=np.uint8)
    if not len(brackets):
        return 0
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    return max(0, int(steps.cumsum().max()))


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _content_length(scope: Scope) -> int | None:
    given = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
    return int(given) if given.isdigit() else None


def _problem(status: HTTPStatus, message: str, kind: str) -> Problem:
    return Problem(int(status), message, kind, headers={"Connection": "close"} if status == 413 else {})
