"""Swaps: which version of each catalog is in use, whether it can be trusted, and the way from one to the next."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llmrec.engine.request import SearchEngine
from llmrec.exceptions import (
    ArtefactError,
    BusyError,
    CatalogError,
    EngineError,
    RequestError,
    UnknownCatalogError,
)
from llmrec.service.catalogs import LiveCatalogs, ServedCatalog
from llmrec.service.errors import CanaryFailedError, SwapRunningError
from llmrec.service.limits import Limits
from llmrec.service.metrics import Metrics
from llmrec.service.schema import SwapRequest, SwapResponse

logger = logging.getLogger(__name__)

Canary = Callable[[SearchEngine, ServedCatalog], Awaitable[object]]


class Swaps:
    """The versions of one server's catalogs, over time."""

    def __init__(
        self,
        engine: SearchEngine,
        catalogs: LiveCatalogs,
        limits: Limits,
        metrics: Metrics,
        check: Canary,
        probe: Canary,
    ) -> None:
        """
        Args:
            check, probe: raise if a search of a version is wrong; the second takes less effort.

        Raises:
            RequestError: if a catalog's version does not fit the limits or the engine.
        """
        self._engine, self._catalogs, self._limits, self._metrics = engine, catalogs, limits, metrics
        self._check, self._probe = check, probe
        for name in catalogs.names:
            with catalogs.using(name) as served:
                self._require_fit(served)
        self.tell()

    async def check_all(self) -> None:
        """Checks a recommendation of every catalog, with a prefill of each of its tokens."""
        await self._all(self._check)

    async def probe_all(self) -> None:
        """Tries a recommendation of every catalog."""
        await self._all(self._probe)

    def tell(self) -> None:
        """Tells the metrics which versions are in use."""
        for name in self._catalogs.names:
            with self._catalogs.using(name) as served:
                self._metrics.serves(name, served.version)

    async def swap(self, request: SwapRequest) -> SwapResponse:
        """Another version of a catalog from now on; requests in flight end with the one that they began with.

        Raises:
            UnknownCatalogError: if there is no such catalog or version.
            SwapRunningError: if that catalog is being swapped.
            CanaryFailedError: if a recommendation of the new version is wrong; RequestError if it cannot be read. The
                old one stays.
        """
        result = "refused"
        try:
            version, previous = await self._catalogs.swap(request.catalog, request.version, self._check_new)
            result = "done"
        except BusyError as error:
            raise SwapRunningError(str(error), error.retry_after) from error
        except (UnknownCatalogError, CanaryFailedError):
            raise
        except (CatalogError, ArtefactError) as error:
            logger.exception("a swap to version %r failed", request.version)
            raise RequestError(
                f"Version {request.version!r} cannot be read; the one before stays in use. The server's log has the "
                "reason."
            ) from error
        finally:
            name = self._catalogs.names[0] if request.catalog is None else request.catalog
            self._metrics.swapped(name, result)
            self.tell()
        return SwapResponse(catalog=name, version=version, previous=previous)

    async def _all(self, canary: Canary) -> None:
        for name in self._catalogs.names:
            with self._catalogs.using(name) as served:
                await canary(self._engine, served)

    async def _check_new(self, served: ServedCatalog) -> None:
        """Before a swap: a version whose recommendations are wrong or late is refused."""
        try:
            self._require_fit(served)
            async with asyncio.timeout(self._limits.canary_timeout):
                await self._check(self._engine, served)
        except (EngineError, RequestError, TimeoutError) as error:
            logger.exception("version %s of catalog %s is not used", served.version, served.name)
            raise CanaryFailedError(
                f"A recommendation from version {served.version} failed, so the one before stays in use. The server's "
                "log has the reason."
            ) from error

    def _require_fit(self, served: ServedCatalog) -> None:
        settings, levels = served.encoder.settings, served.catalog.num_levels
        if settings.num_beams > self._limits.max_beams:
            raise RequestError(
                f"The artefact searches with {settings.num_beams} beams, and the server's limit is "
                f"{self._limits.max_beams}. Start it with a higher --max-beams."
            )
        if self._engine.max_tokens < levels:
            raise RequestError(
                f"The server was started for {self._engine.max_tokens} tokens, and an item alone may have {levels}. "
                "Start it with a longer --max-model-len."
            )
