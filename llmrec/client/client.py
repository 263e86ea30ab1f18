"""`Client` and `AsyncClient`: the same methods over the same calls; they differ in how they wait."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from llmrec.client import calls
from llmrec.client.calls import Answer, AskedOptions, Call, RecommendOptions, SearchOptions
from llmrec.client.exchange import Pause, exchange
from llmrec.exceptions import RequestError
from llmrec.service.schema import (
    CatalogItems,
    CatalogState,
    RecommendRequest,
    RecommendResponse,
    ScoreResponse,
    StoredEvent,
    SwapResponse,
    UserHistory,
)

TIMEOUT, RETRIES, CONNECTIONS = 30.0, 2, 100
SWAP_TIMEOUT = 600.0  # seconds: a large catalog's new version is prepared before the answer
_HEALTH_TIMEOUT = 5.0


class _Connected:
    """What both clients are made of: where to, with which key, for how long, how often."""

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int) -> None:
        self.url = calls.server_url(url)
        self.timeout = timeout
        self.retries = retries
        key = calls.api_key_of(api_key)
        self._headers = {"Accept": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        if retries < 0:
            raise RequestError(f"retries is {retries}. Give 0 to ask once, or more.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, timeout={self.timeout}, retries={self.retries})"


class Client(_Connected):
    """A llmrec server, asked from threads. Connections are kept and shared; one client serves many threads.

    >>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
    ...     answer = client.recommend(["B0012GK3MQ", "B000PGUDU6"], k=5, filters={"price": {"max": 80}})
    ...     [item.id for item in answer.items]

    The environment's proxies (HTTP_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE) hold, as everywhere with httpx:
    where a proxy is set, name the server's address in NO_PROXY.

    Every method raises what `llmrec.client.exchange.exchange` lists; each takes a `timeout`
    in seconds for all of its tries. The server is told to stop by then, unless `deadline_ms` says when.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        *,
        connections: int = CONNECTIONS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            url: of the server, such as http://127.0.0.1:8000; a path before the routes is kept.
            api_key: default: the variable LLMREC_API_KEY; neither: none is sent.
            timeout: seconds that a call may take, its tries and pauses together.
            retries: how often a call is sent again where the server is busy or was not reached.
            connections: open at the same time, at most.
            transport: in the place of httpx's own, for other certificates, sockets or a test.

        Raises:
            RequestError: if the URL, key or number is none.
        """
        super().__init__(url, api_key, timeout, retries)
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.Client(base_url=self.url, limits=limits, transport=transport)

    def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[RecommendOptions],
    ) -> RecommendResponse:
        """The items that continue a history best.

        Args:
            history: item ids, oldest first; or none, with `user_id` or `text` among the options.
            timeout: seconds; default: the client's.
            options: the fields of `llmrec.service.schema.RecommendRequest`.
        """
        return self._call(calls.recommend(history, options), timeout)

    def recommend_many(
        self, requests: Sequence[RecommendRequest | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[RecommendResponse]:
        """The answers to up to 256 requests, by one version of each catalog; all of them, or an error."""
        return self._call(calls.recommend_many(requests), timeout) if requests else []

    def search(
        self, query: str, *, timeout: float | None = None, **options: Unpack[SearchOptions]
    ) -> RecommendResponse:
        """The items that a query means; options are the fields of `llmrec.service.schema.SearchRequest`."""
        return self._call(calls.search(query, options), timeout)

    def score(
        self,
        history: Sequence[str] | None,
        items: Sequence[str],
        *,
        timeout: float | None = None,
        **options: Unpack[AskedOptions],
    ) -> ScoreResponse:
        """The log-probabilities of items; options are the other fields of `llmrec.service.schema.ScoreRequest`."""
        return self._call(calls.score(history, items, options), timeout)

    def catalogs(self, *, timeout: float | None = None) -> list[CatalogState]:
        """The server's catalogs, the default one first."""
        return self._call(calls.catalogs(), timeout)

    def swap(
        self, version: str = "current", catalog: str | None = None, *, timeout: float = SWAP_TIMEOUT
    ) -> SwapResponse:
        """Sends a catalog to another of its versions."""
        return self._call(calls.swap(version, catalog), timeout)

    def items(
        self,
        search: str = "",
        catalog: str | None = None,
        *,
        offset: int = 0,
        limit: int = 50,
        timeout: float | None = None,
    ) -> CatalogItems:
        """Some items of a catalog whose id or title has `search` in it."""
        return self._call(calls.items(search, catalog, offset, limit), timeout)

    def history(self, user_id: str, last: int | None = None, *, timeout: float | None = None) -> UserHistory:
        """The last events of a user's stored history, oldest first; of a user unknown to the server, none."""
        return self._call(calls.history(user_id, last), timeout)

    def append(
        self,
        user_id: str,
        events: Sequence[StoredEvent | Mapping[str, Any] | str],
        *,
        timeout: float | None = None,
    ) -> None:
        """Puts events, or item ids alone, at the end of a user's history, oldest first.

        Where the connection breaks behind the request it is not sent again, for it may have been carried out:
        ServerError with status 0.
        """
        self._call(calls.append(user_id, events), timeout)

    def forget(self, user_id: str, *, timeout: float | None = None) -> bool:
        """Deletes all that is stored of a user; whether there was anything."""
        return self._call(calls.forget(user_id), timeout)

    def ready(self, *, timeout: float = _HEALTH_TIMEOUT) -> bool:
        """Whether the server answers recommendations now; it may take a key."""
        return self._call(calls.ready(), timeout)

    def health(self, *, timeout: float = _HEALTH_TIMEOUT) -> bool:
        """Whether the server's process is alive."""
        return self._call(calls.health(), timeout)

    def close(self) -> None:
        """Closes the connections; `with` does so, too."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: Call[Answer], timeout: float | None) -> Answer:
        steps = exchange(call, self._headers, self.timeout if timeout is None else timeout, self.retries)
        outcome: httpx.Response | httpx.HTTPError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answer: Answer = end.value
                return answer
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                outcome = None
                continue
            try:
                outcome = self._http.request(**step.request)
            except httpx.HTTPError as error:
                outcome = error


class AsyncClient(_Connected):
    """A llmrec server, asked from asyncio: `Client`'s methods, awaited.

    >>> async with AsyncClient("http://127.0.0.1:8000") as client:  # doctest: +SKIP
    ...     answer = await client.recommend(user_id="u-17", k=5)

    Cancelling a call closes its connection, at which the server stops the work.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        *,
        connections: int = CONNECTIONS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As `Client`'s."""
        super().__init__(url, api_key, timeout, retries)
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx.AsyncClient(base_url=self.url, limits=limits, transport=transport)

    async def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[RecommendOptions],
    ) -> RecommendResponse:
        """As `Client.recommend`."""
        return await self._call(calls.recommend(history, options), timeout)

    async def recommend_many(
        self, requests: Sequence[RecommendRequest | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[RecommendResponse]:
        """As `Client.recommend_many`."""
        return await self._call(calls.recommend_many(requests), timeout) if requests else []

    async def search(
        self, query: str, *, timeout: float | None = None, **options: Unpack[SearchOptions]
    ) -> RecommendResponse:
        """As `Client.search`."""
        return await self._call(calls.search(query, options), timeout)

    async def score(
        self,
        history: Sequence[str] | None,
        items: Sequence[str],
        *,
        timeout: float | None = None,
        **options: Unpack[AskedOptions],
    ) -> ScoreResponse:
        """As `Client.score`."""
        return await self._call(calls.score(history, items, options), timeout)

    async def catalogs(self, *, timeout: float | None = None) -> list[CatalogState]:
        """As `Client.catalogs`."""
        return await self._call(calls.catalogs(), timeout)

    async def swap(
        self, version: str = "current", catalog: str | None = None, *, timeout: float = SWAP_TIMEOUT
    ) -> SwapResponse:
        """As `Client.swap`."""
        return await self._call(calls.swap(version, catalog), timeout)

    async def items(
        self,
        search: str = "",
        catalog: str | None = None,
        *,
        offset: int = 0,
        limit: int = 50,
        timeout: float | None = None,
    ) -> CatalogItems:
        """As `Client.items`."""
        return await self._call(calls.items(search, catalog, offset, limit), timeout)

    async def history(self, user_id: str, last: int | None = None, *, timeout: float | None = None) -> UserHistory:
        """As `Client.history`."""
        return await self._call(calls.history(user_id, last), timeout)

    async def append(
        self,
        user_id: str,
        events: Sequence[StoredEvent | Mapping[str, Any] | str],
        *,
        timeout: float | None = None,
    ) -> None:
        """As `Client.append`."""
        await self._call(calls.append(user_id, events), timeout)

    async def forget(self, user_id: str, *, timeout: float | None = None) -> bool:
        """As `Client.forget`."""
        return await self._call(calls.forget(user_id), timeout)

    async def ready(self, *, timeout: float = _HEALTH_TIMEOUT) -> bool:
        """As `Client.ready`."""
        return await self._call(calls.ready(), timeout)

    async def health(self, *, timeout: float = _HEALTH_TIMEOUT) -> bool:
        """As `Client.health`."""
        return await self._call(calls.health(), timeout)

    async def close(self) -> None:
        """As `Client.close`."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, call: Call[Answer], timeout: float | None) -> Answer:
        steps = exchange(call, self._headers, self.timeout if timeout is None else timeout, self.retries)
        outcome: httpx.Response | httpx.HTTPError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answer: Answer = end.value
                return answer
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                outcome = None
                continue
            try:
                outcome = await self._http.request(**step.request)
            except httpx.HTTPError as error:
                outcome = error
