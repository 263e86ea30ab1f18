"""Service: requests in, answers out. What a server of any kind does with a request, without HTTP."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from llmrec.engine.request import Found, SearchEngine
from llmrec.exceptions import (
    BusyError,
    DeadlineError,
    RequestError,
)
from llmrec.service import canary, requests
from llmrec.service.admission import Admission, Ticket
from llmrec.service.catalogs import LiveCatalogs, ServedCatalog
from llmrec.service.errors import DrainingError, QueueFullError, placed
from llmrec.service.limits import Limits
from llmrec.service.metrics import Metrics
from llmrec.service.readiness import Readiness
from llmrec.service.schema import (
    MAX_HISTORY,
    CatalogItems,
    CatalogsResponse,
    RecommendBatch,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    StoredEvent,
    SwapRequest,
    SwapResponse,
)
from llmrec.service.swaps import Canary, Swaps

if TYPE_CHECKING:
    from llmrec.history_store.store import HistoryStore

logger = logging.getLogger(__name__)

_PAGE_THREADS = 2  # looking through a large catalog takes a while, and recommendations come first
_CONNECTION_SECONDS = 1.0

Asked = RecommendRequest | SearchRequest | ScoreRequest


class Service:
    """One engine, its catalogs, and what is allowed.

    Attributes:
        engine, catalogs, model, histories, limits, metrics: as given; `histories` is None without a store.
        admission: the queue before the engine.
        swaps: the versions of the catalogs.
        readiness: what `/ready` rests on.
        in_flight: requests that were accepted and are not answered.
        launch: what `/ready` repeats, so that whoever started the server knows it for theirs.
    """

    def __init__(
        self,
        engine: SearchEngine,
        catalogs: LiveCatalogs,
        model: str,
        histories: "HistoryStore | None" = None,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        launch: str = "",
        check: Canary = canary.check,
        probe: Canary = canary.canary,
    ) -> None:
        """
        Args:
            model: its name in answers.
            metrics: default: in a registry of its own.
            check: raises if a search of a catalog's version is wrong; at the start and before a swap.
            probe: the same, now and then and with less effort.

        Raises:
            RequestError: if the artefact's own searches are wider than the limits allow, or an item is longer than
                the engine was started for.
        """
        self.engine = engine
        self.catalogs = catalogs
        self.model = model
        self.histories = histories
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics(catalogs=catalogs.names, adapters=engine.adapters)
        self.launch = launch
        self.in_flight = 0
        self.created = int(time.time())
        self.admission = Admission(self.limits.max_rows_running, self.limits.max_rows_waiting)
        self.admission.changed = self.metrics.rows
        self.swaps = Swaps(engine, catalogs, self.limits, self.metrics, check, probe)
        self.readiness = Readiness(
            self.swaps.probe_all, self.limits.canary_interval, self.limits.canary_timeout, self._tell_canary
        )
        self._pages = ThreadPoolExecutor(_PAGE_THREADS, thread_name_prefix="llmrec-pages")

    @property
    def draining(self) -> bool:
        """Whether the server is being stopped: what is in flight is answered, nothing new is taken."""
        return self.admission.draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self.admission.draining = draining

    @property
    def unready(self) -> str | None:
        """Why the server should be asked nothing now; None if it may."""
        if self.draining:
            return "The server is being stopped. Ask another."
        if self.engine.errored:
            return "The engine has ended. See the server's log, and start it again."
        return self.readiness.reason

    async def start(self) -> None:
        """Checks a recommendation of every catalog, and goes on trying them; raises EngineError if the first fails."""
        await self.readiness.start(self.swaps.check_all)

    async def close(self) -> None:
        """Ends what `start` began, and the history store."""
        await self.readiness.stop()
        self._pages.shutdown(wait=False, cancel_futures=True)
        if self.histories is not None:
            await self.histories.close()

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """Counts a request as in flight; raises QueueFullError if there are as many as the limits allow."""
        if self.in_flight >= self.limits.max_requests:
            raise QueueFullError(
                f"{self.in_flight} requests are in flight, which is the limit. Ask again later, or send batches.",
                max(_CONNECTION_SECONDS, self.admission.retry_after),
            )
        self.in_flight += 1
        self.metrics.in_flight(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight(self.in_flight)

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """The most probable items of one history.

        Raises:
            RequestError, PromptError: for what cannot be answered; UnknownCatalogError among them.
            BusyError: if there is too much to do, or the server is being stopped.
            DeadlineError: if it takes too long.
            EngineError: if the engine fails.
        """
        (answer,) = await self._answers([request], alone=True)
        return answer

    async def recommend_together(self, batch: RecommendBatch) -> RecommendBatchResponse:
        """`recommend` for several requests, all answered by one version of each catalog, or none.

        Raises:
            PlacedError: as `recommend` raises, naming the request.
        """
        return RecommendBatchResponse(responses=await self._answers(batch.requests, alone=False))

    async def search(self, request: SearchRequest) -> RecommendResponse:
        """The items that a query means; raises as `recommend` does, and if the model was not trained to search."""
        (answer,) = await self._answers([request], alone=True)
        return answer

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """The log-probabilities of given items; raises as `recommend` does."""
        begin = time.perf_counter()
        with ExitStack() as pins:
            served, rows = self._pinned(request, pins, {})
            async with self._within(self.limits.seconds(request.deadline_ms)):
                with self._enter([rows]) as (ticket,):
                    prompt, _ = await self._prompt(served, request)
                    search = requests.scoring(served, request, prompt)
                    found = await self._found(search, ticket, request.adapter)
        scores = requests.scores_of(served.catalog, request, found)
        self.metrics.searched(served.name, request.adapter)
        self.metrics.took("total", time.perf_counter() - begin)
        return ScoreResponse(
            scores=scores,
            model=request.adapter or self.model,
            catalog=served.name,
            catalog_version=served.version,
        )

    async def states(self) -> CatalogsResponse:
        """The catalogs; their folders are looked into for versions."""
        return CatalogsResponse(catalogs=await asyncio.to_thread(self.catalogs.states))

    async def swap(self, request: SwapRequest) -> SwapResponse:
        """Another version of a catalog from now on (`Swaps.swap`); raises DrainingError while being stopped."""
        if self.draining:
            raise DrainingError("The server is being stopped. Ask again when it is back.", self.admission.retry_after)
        return await self.swaps.swap(request)

    async def items(self, catalog: str | None, search: str, offset: int, limit: int) -> CatalogItems:
        """A page of a catalog's items; raises UnknownCatalogError, and DeadlineError if it takes too long."""
        with self.catalogs.using(catalog) as served:
            async with self._within(self.limits.seconds(None)):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._pages, self.catalogs.page, served, search, offset, limit)

    async def _answers(
        self, asked: Sequence[RecommendRequest | SearchRequest], alone: bool
    ) -> list[RecommendResponse]:
        places = [None if alone else place for place in range(len(asked))]
        seconds = min(self.limits.seconds(request.deadline_ms) for request in asked)
        with ExitStack() as pins:
            known: dict[str, ServedCatalog] = {}
            served, rows = [], []
            for place, request in zip(places, asked, strict=True):
                with placed(place):
                    version, count = self._pinned(request, pins, known)
                served.append(version)
                rows.append(count)
            async with self._within(seconds):
                with self._enter(rows) as tickets:
                    work = [
                        self._answer(place, request, version, ticket)
                        for place, request, version, ticket in zip(places, asked, served, tickets, strict=True)
                    ]
                    return [await work[0]] if alone else await _all(work)

    async def _answer(
        self, place: int | None, request: RecommendRequest | SearchRequest, served: ServedCatalog, ticket: Ticket
    ) -> RecommendResponse:
        begin = time.perf_counter()
        with placed(place):
            if isinstance(request, SearchRequest):
                with self.metrics.stage("prompt"):
                    search = await requests.query(self.catalogs, served, request, ticket.rows)
                    requests.require_room(search.prompt, served.catalog, self.engine.max_tokens)
            else:
                prompt, seen = await self._prompt(served, request)
                search = await requests.recommendation(self.catalogs, served, request, prompt, seen, ticket.rows)
            found = await self._found(search, ticket, request.adapter)
            with self.metrics.stage("answer"):
                items = requests.items_of(served.catalog, found, request.explain)
        self.metrics.searched(served.name, request.adapter)
        self.metrics.took("total", time.perf_counter() - begin)
        return RecommendResponse(
            items=items, model=request.adapter or self.model, catalog=served.name, catalog_version=served.version
        )

    async def _prompt(
        self, served: ServedCatalog, request: RecommendRequest | ScoreRequest
    ) -> tuple[list[int], list[int]]:
        """The prompt, and the rows of the history."""
        stored = await self._history(request.user_id) if request.user_id is not None else None
        with self.metrics.stage("prompt"):
            prompt, seen = requests.prompt_of(served.encoder, request, stored)
            requests.require_room(prompt, served.catalog, self.engine.max_tokens)
        return prompt, seen

    async def _history(self, user_id: str) -> list[StoredEvent]:
        if self.histories is None:
            raise RequestError(
                "The server keeps no histories, and the request names a user_id. Send a history, or start the server "
                "with a history store."
            )
        return await self.histories.read(user_id, MAX_HISTORY)

    async def _found(self, search: requests.Search, ticket: Ticket, adapter: str | None) -> Found:
        """What the engine finds, when it is this search's turn."""
        if search.expected == 0:
            return Found([], [], [], 0.0)
        with self.metrics.stage("queue"):
            await ticket.granted()
        with self.metrics.stage("engine"):
            found = await self.engine.search(search.prompt, search.parameters, adapter)
        ticket.release()
        self.metrics.took("search", found.seconds)
        requests.check_found(search, found)
        return found

    def _pinned(self, request: Asked, pins: ExitStack, known: dict[str, ServedCatalog]) -> tuple[ServedCatalog, int]:
        """The version that answers a request, until `pins` are closed, and what it costs; `known` are those before."""
        name = self.catalogs.names[0] if request.catalog is None else request.catalog
        if name not in known:
            known[name] = pins.enter_context(self.catalogs.using(name))
        if request.adapter is not None and request.adapter not in self.engine.adapters:
            raise RequestError(
                f"The server has no adapter {request.adapter!r}. Name one of "
                f"{', '.join(self.engine.adapters) or 'none: it was started without'}."
            )
        return known[name], requests.rows_of(request, known[name].encoder, self.limits)

    @contextmanager
    def _enter(self, rows: Sequence[int]) -> Iterator[list[Ticket]]:
        """Places in the queue, whose refusals are counted."""
        if not self.admission.fits(rows):
            raise RequestError(
                f"The batch has {sum(rows)} beam rows, and the server never holds more than "
                f"{self.limits.max_rows_running} running and {self.limits.max_rows_waiting} waiting. Send less."
            )
        with ExitStack() as stack:
            try:
                tickets = stack.enter_context(self.admission.enter(rows, prepared=False))
            except BusyError as error:
                self.metrics.refused("draining" if isinstance(error, DrainingError) else "busy")
                raise
            yield tickets

    @asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        """Ends what is awaited within, and raises DeadlineError, when the time is over."""
        try:
            async with asyncio.timeout(seconds) as scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            self.metrics.refused("deadline")
            raise DeadlineError(
                f"No answer was found in {seconds:g} s, the request's deadline. Ask again later, for fewer items or "
                "beams, or with a longer deadline_ms."
            ) from error

    def _tell_canary(self, passed: bool) -> None:
        self.metrics.canary(passed)
        self.metrics.ready(self.unready is None)
        self.swaps.tell()


async def _all(work: Sequence[Awaitable[RecommendResponse]]) -> list[RecommendResponse]:
    """All results, or the first error, and then nothing of it goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
