"""An engine that plays its part: scores by a checksum, as slowly and as badly as a test wants; and a service of it."""

import asyncio
import zlib
from dataclasses import dataclass, field

import httpx
import numpy as np
from factories import random_recommender

from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.request import Found
from llmrec.service.app import build_app
from llmrec.service.catalogs import LiveCatalogs
from llmrec.service.limits import Limits
from llmrec.service.metrics import Metrics
from llmrec.service.service import Service
from llmrec.tasks.templates import shipped_templates

KEY = "a-key-of-tests"


class PlayedEngine:
    """Every live item of the version that a search names has a score, by a checksum of prompt and row.

    Attributes:
        delay: seconds that a search takes; gate: searches wait for it.
        error: raised by searches; lost: how many items too few they find.
        calls: prompt, parameters and adapter of every search; running, rows, peak: searches now, their rows, the most.
        cancelled, finished: how searches ended.
    """

    def __init__(self, *versions, max_tokens=512, adapters=("red", "blue")):
        self.versions = versions  # of all catalogs
        self.max_tokens, self.dtype, self.adapters = max_tokens, "float32", list(adapters)
        self.errored = False
        self.delay, self.gate, self.error, self.lost = 0.0, None, None, 0
        self.calls, self.running, self.rows, self.peak, self.cancelled, self.finished = [], 0, 0, 0, 0, 0

    def catalog(self, index):
        version = index.partition("-")[0]
        for versions in self.versions:
            if version in {row["version"] for row in versions.log()}:
                return versions.load(version)
        raise AssertionError(f"no index {index}")

    def score(self, prompt, row):
        return -1.0 - zlib.crc32(np.array([*prompt, row], dtype=np.int64).tobytes()) / 2**32

    def best(self, prompt, parameters):
        """What a search finds, by asking all items."""
        catalog = self.catalog(parameters.index)
        rows = range(len(catalog)) if parameters.allowed is None else parameters.allowed
        rows = [row for row in rows if not catalog.retired[row] and row not in set(parameters.excluded)]
        found = sorted(((self.score(prompt, row), row) for row in rows), key=lambda pair: (-pair[0], pair[1]))
        return found[: parameters.k - self.lost], catalog.num_levels

    async def search(self, prompt, parameters, adapter=None):
        self.calls.append((prompt, parameters, adapter))
        self.running += 1
        self.rows += parameters.num_beams
        self.peak = max(self.peak, self.rows)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.delay)
            if self.error is not None:
                raise self.error
            found, levels = self.best(prompt, parameters)
            self.finished += 1
            return Found(
                [row for _, row in found],
                [score for score, _ in found],
                [[score / levels] * levels for score, _ in found],
                0.001,
            )
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.rows -= parameters.num_beams


async def passes(engine, served):
    """A check that finds nothing wrong."""


@dataclass
class World:
    """A service with a played engine and two catalogs, of which the first has a second version."""

    recommender: object
    folder: object
    versions: CatalogVersions
    others: CatalogVersions
    engine: PlayedEngine
    catalogs: LiveCatalogs
    second: str
    histories: object = None
    limits: Limits = field(default_factory=lambda: Limits(max_rows_running=1000))

    def service(self, **changes):
        given = {"engine": self.engine, "catalogs": self.catalogs, "model": "m", "histories": self.histories}
        given |= {"limits": self.limits, "check": passes, "probe": passes}
        given |= {"metrics": Metrics(None, self.catalogs.names, self.engine.adapters)}
        return Service(**(given | changes))


def make_world(folder, tasks=("next_item", "preference", "search"), **changes):
    recommender = random_recommender(3, max_positions=512, **changes)
    recommender.templates = shipped_templates(tasks)
    other = random_recommender(4, num_items=25)
    recommender.catalog.save(folder / "catalog")
    other.catalog.with_tokens(recommender.catalog.require_tokens()).save(folder / "other")
    versions, others = CatalogVersions(folder / "catalog"), CatalogVersions(folder / "other")
    first = versions.current
    second = versions.retire(["item-0", "item-1", "item-2"])
    versions.rollback(first)
    parts = (recommender.tokenizer, recommender.prompt, recommender.settings, recommender.templates)
    catalogs = LiveCatalogs({"main": folder / "catalog", "other": folder / "other"}, parts, folder / "index")
    engine = PlayedEngine(versions, others)
    return World(recommender, folder, versions, others, engine, catalogs, second)


def client_of(service, **options):
    """An httpx client of a service's application, which runs on the caller's event loop."""
    app = build_app(service, **options)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def asked(service, method, path, keys=None, **request):
    """One request, on an event loop of its own."""

    async def ask():
        async with client_of(service, keys=keys) as client:
            return await client.request(method, path, **request)

    return asyncio.run(ask())
