"""Load on a server: requests at their times, what became of each, and whether an answer is wrong."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrec.client.client import AsyncClient
from llmrec.exceptions import BusyError, DeadlineError, RequestError, ServerError
from llmrec.service.schema import RecommendResponse

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_REFUSED = 0.01  # seconds until a closed client that was refused asks again: a loop of refusals measures nothing
_PAGE = 200  # items of a catalog that one request lists


@dataclass(frozen=True)
class Load:
    """How many requests, and when.

    Attributes:
        rate: requests per second on average, at the times of a Poisson process, whether earlier ones are answered or
            not (an open load); None for a closed one.
        concurrency: clients of a closed load, each of which asks again when it has its answer.
        seconds: during which requests begin that count.
        count: of them, at most; None for no such limit.
        warmup: seconds before that, of requests that do not count.
        ramp: seconds before that, in which the load grows from nothing.
        seed: of the times.
    """

    rate: float | None = None
    concurrency: int = 8
    seconds: float = 30.0
    count: int | None = None
    warmup: float = 0.0
    ramp: float = 0.0
    seed: int = 0

    @property
    def quiet(self) -> float:
        """Seconds before requests count."""
        return self.ramp + self.warmup


@dataclass(frozen=True)
class Shot:
    """One request and what became of it.

    Attributes:
        begin: when it was meant to begin, in seconds behind the start.
        lag: seconds by which it was begun later than meant, which is this program's fault.
        latency: seconds from `begin` to the answer.
        status: "200", another status, or "timeout", "no answer".
        version: of the catalog, if it was answered.
        wrong: what is wrong with the answer; "" for nothing.
        items: of the answer.
    """

    begin: float
    lag: float
    latency: float
    status: str
    version: str = ""
    wrong: str = ""
    items: tuple[str, ...] = ()


async def run_load(
    client: AsyncClient,
    load: Load,
    bodies: Iterator[dict[str, Any]],
    tell: Callable[[float], object] = lambda seconds: None,
) -> list[Shot]:
    """Runs a load; the shots that count, in the order in which they were meant to begin.

    Args:
        client: without retries, and with connections for all requests at once.
        bodies: keyword arguments of `AsyncClient.recommend`, with `history` and `k`, without an end.
        tell: is told now and then how many seconds have passed.
    """
    if load.rate is None:
        shots = await _closed(client, load, bodies, tell)
    else:
        shots = await _open(client, load, load.rate, bodies, tell)
    return sorted((shot for shot in shots if shot.begin >= load.quiet), key=lambda shot: shot.begin)


def arrivals(rate: float, ramp: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process, in seconds, whose rate grows from 0 to `rate` in the first `ramp` seconds.

    A process of rate 1 on the scale of the requests expected so far: rate t² / (2 ramp), and behind the ramp
    rate (t - ramp / 2).
    """
    drawing = random.Random(seed)
    expected = 0.0
    while True:
        expected += drawing.expovariate(1.0)
        steady = expected / rate + ramp / 2
        yield steady if steady >= ramp else math.sqrt(2 * ramp * expected / rate)


async def shoot(client: AsyncClient, body: Mapping[str, Any], start: float, begin: float) -> Shot:
    """One request, meant to begin `begin` seconds behind `start`."""
    lag = time.perf_counter() - start - begin
    answer: RecommendResponse | None = None
    try:
        answer = await client.recommend(**body)
        status = "200"
    except DeadlineError as error:
        status = "504" if "(HTTP 504" in str(error) else "timeout"
    except BusyError as error:
        status = "503" if "(HTTP 503" in str(error) else "429"
    except RequestError:
        status = "422"
    except ServerError as error:
        status = str(error.status) if error.status else "no answer"
    latency = time.perf_counter() - start - begin
    if answer is None:
        return Shot(begin, lag, latency, status)
    items = tuple(item.id for item in answer.items)
    return Shot(begin, lag, latency, status, answer.catalog_version, mistake(answer, body), items)


def mistake(answer: RecommendResponse, body: Mapping[str, Any]) -> str:
    """What is wrong with an answer, as far as it and the request show it; "" for nothing."""
    items = answer.items
    if len({item.id for item in items}) != len(items):
        return "an item twice"
    if len(items) > body["k"]:
        return "more than k items"
    if seen := {item.id for item in items} & set(body["history"]):
        return f"an item of the history ({min(seen)[:40]})"
    scores = [item.log_probability for item in items]
    if not all(math.isfinite(score) and score <= 1e-6 for score in scores):
        return "a score that is no log-probability"
    if scores != sorted(scores, reverse=True) or [item.rank for item in items] != list(range(1, len(items) + 1)):
        return "not the best first"
    return ""


async def in_catalog(client: AsyncClient, item: str, catalog: str | None) -> bool:
    """Whether the catalog has an item of exactly this id."""
    offset = 0
    while True:
        page = await client.items(item, catalog, offset=offset, limit=_PAGE)
        if any(found.id == item for found in page.items):
            return True
        offset += _PAGE
        if offset >= page.total:
            return False


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The least value that a share of all is not above, for each of `QUANTILES`; nothing of nothing.

    >>> quantiles([3.0, 1.0, 2.0, 4.0])
    {'p50': 2.0, 'p90': 4.0, 'p99': 4.0, 'max': 4.0}
    """
    ordered = sorted(values)
    return {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in QUANTILES.items() if ordered}


def summary(load: Load, shots: Sequence[Shot]) -> dict[str, Any]:
    """What a load came to, as JSON; latencies in seconds."""
    by_status: dict[str, list[Shot]] = {}
    for shot in shots:
        by_status.setdefault(shot.status, []).append(shot)
    answered = by_status.get("200", [])
    seconds = max([shot.begin + shot.latency for shot in shots], default=load.quiet) - load.quiet
    return {
        "requests": len(shots),
        "seconds": seconds,
        "requests_per_second": len(shots) / seconds if seconds else 0.0,
        "recommendations_per_second": len(answered) / seconds if seconds else 0.0,
        "statuses": {
            status: {"requests": len(some), **quantiles([shot.latency for shot in some])}
            for status, some in sorted(by_status.items())
        },
        "refused": sum(len(by_status.get(status, [])) for status in ("429", "503")),
        "wrong_answers": dict(sorted(Counter(shot.wrong for shot in answered if shot.wrong).items())),
        "versions": dict(sorted(Counter(shot.version for shot in answered).items())),
        "lag": quantiles([shot.lag for shot in shots]),
    }


async def _open(
    client: AsyncClient, load: Load, rate: float, bodies: Iterator[dict[str, Any]], tell: Callable[[float], object]
) -> list[Shot]:
    tasks: list[asyncio.Task[Shot]] = []
    start = time.perf_counter()
    counted = 0
    for begin in arrivals(rate, load.ramp, load.seed):
        counted += begin >= load.quiet
        if begin >= load.quiet + load.seconds or (load.count is not None and counted > load.count):
            break
        # Sleeping for nothing still lets answers be read.
        await asyncio.sleep(max(0.0, begin - (time.perf_counter() - start)))
        tell(begin)
        tasks.append(asyncio.create_task(shoot(client, next(bodies), start, begin)))
    return list(await asyncio.gather(*tasks))


async def _closed(
    client: AsyncClient, load: Load, bodies: Iterator[dict[str, Any]], tell: Callable[[float], object]
) -> list[Shot]:
    start = time.perf_counter()
    shots: list[Shot] = []
    counted = 0

    async def ask_on(place: int) -> None:
        nonlocal counted
        await asyncio.sleep(load.ramp * place / load.concurrency)
        while True:
            begin = time.perf_counter() - start
            counts = begin >= load.quiet
            if begin >= load.quiet + load.seconds or (counts and counted == load.count):
                return
            counted += counts
            tell(begin)
            shots.append(await shoot(client, next(bodies), start, begin))
            if shots[-1].status != "200":
                await asyncio.sleep(_REFUSED)

    await asyncio.gather(*(ask_on(place) for place in range(load.concurrency)))
    return shots
