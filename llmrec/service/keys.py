"""Keys: who may use a server. Every route asks for one, but `/health`."""

import hashlib
import hmac
from collections.abc import Collection, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Self

from starlette.types import ASGIApp, Receive, Scope, Send

from llmrec.exceptions import RequestError
from llmrec.service.errors import Problem
from llmrec.service.metrics import Metrics
from llmrec.service.observer import route_path

KEY, KEY_FILE = "LLMREC_API_KEY", "LLMREC_API_KEY_FILE"
OPEN_PATHS = frozenset(("/health",))


class Keys:
    """API keys, of which only hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Raises RequestError, without showing it, for a key that no header can carry, and if there is none."""
        found = list(keys)
        for place, key in enumerate(found, start=1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError(
                    f"API key {place} of {len(found)} is empty or has white space or other than ASCII characters. "
                    "Give one like the output of `openssl rand -hex 32`."
                )
        if not found:
            raise RequestError(f"There is no API key. Set {KEY}, or write one per line into the file of {KEY_FILE}.")
        self._hashes = [_hash(key.encode()) for key in found]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """The keys of LLMREC_API_KEY and of the file that LLMREC_API_KEY_FILE names, one a line; None without either.

        Several keys are right at once, so that clients can change from one to the next.

        Raises:
            RequestError: if a key is none, a variable is set and empty, or the file cannot be read.
        """
        keys: list[str] = []
        if KEY in environment:
            keys += _lines(environment[KEY]) or [""]
        if KEY_FILE in environment:
            try:
                keys += _lines(Path(environment[KEY_FILE]).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RequestError(
                    f"The file that {KEY_FILE} names cannot be read: {error}. Mend its path."
                ) from error
        return cls(keys) if KEY in environment or KEY_FILE in environment else None

    def accept(self, authorization: bytes | None) -> bool:
        """Whether a header `Authorization: Bearer KEY` has one of the keys, in a time that tells nothing of them."""
        scheme, _, key = (authorization or b"").partition(b" ")
        asked = _hash(key.strip())
        right = False
        for known in self._hashes:
            right |= hmac.compare_digest(asked, known)
        return right and scheme.lower() == b"bearer"


class KeyGuard:
    """ASGI middleware that answers 401 to whoever brings no key."""

    def __init__(
        self, app: ASGIApp, keys: Keys, metrics: Metrics | None = None, open_paths: Collection[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        if scope["type"] == "http" and route_path(scope) in self._open:
            return await self._app(scope, receive, send)
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) == 1 and self._keys.accept(given[0]):
            return await self._app(scope, receive, send)
        if self._metrics is not None:
            self._metrics.refused("key")
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        refusal = Problem(
            int(HTTPStatus.UNAUTHORIZED),
            "The request has no valid API key. Send one as the header Authorization: Bearer KEY.",
            "AuthenticationError",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
