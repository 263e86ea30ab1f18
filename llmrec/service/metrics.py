"""Metrics: what Prometheus is told of a server. Labels come from the server's own lists, never from requests."""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OTHER = "other"
STAGES = ("prompt", "queue", "engine", "search", "answer", "total")
REASONS = ("busy", "requests", "draining", "body", "depth", "media_type", "slow_body", "key", "deadline", "disconnect")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))


class Metrics:
    """One server's metrics in one registry.

    Nothing is computed at collection and values are set where they change, so that vLLM's way of gathering several
    processes (prometheus_client's multiprocess mode) works too.

    Attributes:
        registry: where they are registered.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        catalogs: Collection[str] = (),
        adapters: Collection[str] = (),
    ) -> None:
        """
        Args:
            registry: default: one of its own.
            catalogs, adapters: the names that labels may take; any other is "other".
        """
        self.registry = registry or CollectorRegistry()
        self._catalogs, self._adapters = frozenset(catalogs), frozenset(adapters)
        self._versions: dict[str, str] = {}
        to = self.registry
        self._requests = Counter("llmrec_requests", "Answered requests.", ("route", "method", "status"), registry=to)
        self._seconds = Histogram(
            "llmrec_request_seconds",
            "From a request's first byte to its answer's last.",
            ("route",),
            registry=to,
            buckets=_SECONDS,
        )
        self._stages = Histogram(
            "llmrec_stage_seconds",
            "Of one search: making the prompt, waiting for the engine, in the engine, of that the search behind the "
            "prefill, making the answer, and all of it.",
            ("stage",),
            registry=to,
            buckets=_SECONDS,
        )
        self._searches = Counter("llmrec_searches", "Searches answered.", ("catalog", "adapter"), registry=to)
        self._refused = Counter("llmrec_refusals", "Requests refused or given up.", ("reason",), registry=to)
        self._rows = Gauge(
            "llmrec_beam_rows",
            "Beam rows in the engine, or waiting for it.",
            ("state",),
            registry=to,
            multiprocess_mode="livesum",
        )
        self._in_flight = Gauge(
            "llmrec_requests_in_flight",
            "Requests that were accepted and are not answered.",
            registry=to,
            multiprocess_mode="livesum",
        )
        self._version = Gauge(
            "llmrec_catalog_version",
            "1 for the version of a catalog that is in use.",
            ("catalog", "version"),
            registry=to,
            multiprocess_mode="livemax",
        )
        self._swaps = Counter("llmrec_catalog_swaps", "Changes of version.", ("catalog", "result"), registry=to)
        self._canaries = Counter("llmrec_canaries", "Recommendations that /ready rests on.", ("result",), registry=to)
        self._ready = Gauge("llmrec_ready", "Whether /ready says so.", registry=to, multiprocess_mode="livemin")
        for reason in REASONS:
            self._refused.labels(reason)
        for stage in STAGES:
            self._stages.labels(stage)
        for result in ("passed", "failed"):
            self._canaries.labels(result)
        self.rows(0, 0)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request's end; `route` is a route's template, or "other"."""
        self._requests.labels(route, method if method in _METHODS else OTHER, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Times one stage; what fails is not counted."""
        begin = time.perf_counter()
        yield
        self.took(stage, time.perf_counter() - begin)

    def took(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)

    def searched(self, catalog: str, adapter: str | None) -> None:
        name = "" if adapter is None else adapter if adapter in self._adapters else OTHER
        self._searches.labels(self._catalog(catalog), name).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason if reason in REASONS else OTHER).inc()

    def rows(self, running: int, waiting: int) -> None:
        self._rows.labels("running").set(running)
        self._rows.labels("waiting").set(waiting)

    def in_flight(self, count: int) -> None:
        self._in_flight.set(count)

    def serves(self, catalog: str, version: str) -> None:
        """A catalog is at this version from now on."""
        name = self._catalog(catalog)
        before = self._versions.get(name)
        if before is not None and before != version:
            self._version.labels(name, before).set(0)
            if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # where a series cannot be taken away
                self._version.remove(name, before)
        self._versions[name] = version
        self._version.labels(name, version).set(1)

    def swapped(self, catalog: str | None, result: str) -> None:
        self._swaps.labels(OTHER if catalog is None else self._catalog(catalog), result).inc()

    def canary(self, passed: bool) -> None:
        self._canaries.labels("passed" if passed else "failed").inc()

    def ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def text(self) -> bytes:
        """All of the registry in Prometheus' text format."""
        return generate_latest(self.registry)

    def _catalog(self, name: str) -> str:
        return name if name in self._catalogs else OTHER
