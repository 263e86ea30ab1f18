"""Asks a running server for recommendations, as many as it is told to, and says how it answered.

    python serve/loadtest.py --config serve/recipes/loadtest.yaml
    python serve/loadtest.py --url http://127.0.0.1:8000 --rate 50 --seconds 60 --page runs/load.html
    python serve/loadtest.py --concurrency 32 --requests 5000 --k 10 50 --beams 50 128 --json runs/load.json
    python serve/loadtest.py --rate 20 --filters '{}' '{"price": {"max": 80}}' --histories histories.jsonl

With --rate the load is open: requests begin at the times of a Poisson process, whether earlier ones are answered or
not, and a latency counts from the moment that its request was meant to begin. A server that stalls is so charged for
all who would have come meanwhile. With --concurrency the load is closed: so many clients, each of which asks again
when it has its answer. Every answer is checked: items of the catalog, none twice, none of the history, best first, no
more than k. If one is wrong, the exit code is 1. The key is that of the variable LLMREC_API_KEY.
"""

import asyncio
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.exceptions import DataError, RecipeError, ServerError
from llmrec.script import parser, run

if TYPE_CHECKING:
    from rich.console import Console
    from trl import TrlParser

    from llmrec.client import AsyncClient
    from llmrec.client.load import Load, Shot

_PAGE = 200  # items of a catalog that one request lists
_CONNECTIONS = 2_000
_SLOW = 0.05  # seconds; requests that begin later than that say more of this machine than of the server
_COLUMNS = ("p50", "p90", "p99", "max")


@dataclass
class LoadArguments:
    """What to ask, how often, for how long."""

    url: str = field(default="http://127.0.0.1:8000", metadata={"help": "The server."})
    rate: float | None = field(default=None, metadata={"help": "Open load: requests per second, on average."})
    concurrency: int | None = field(default=None, metadata={"help": "Closed load: clients; default: 8."})
    seconds: float = field(default=30.0, metadata={"help": "How long requests begin, behind the warm-up."})
    requests: int | None = field(default=None, metadata={"help": "Stop after so many requests; warm-up apart."})
    warmup: float = field(default=3.0, metadata={"help": "Seconds of the same load before it counts."})
    ramp: float = field(default=0.0, metadata={"help": "Seconds before that in which the load grows."})
    histories: str | None = field(
        default=None, metadata={"help": "A JSON list of item ids per line; default: drawn from the server's catalog."}
    )
    max_history: int = field(default=20, metadata={"help": "Items of a history that is drawn, at most."})
    draw_from: int = field(default=2_000, metadata={"help": "Items of the catalog that histories are drawn from."})
    k: list[int] = field(default_factory=lambda: [10], metadata={"help": "Items wanted; each request draws one."})
    beams: list[int] = field(default_factory=list, metadata={"help": "Beams; each request draws one. Default: none."})
    filters: list[str] = field(
        default_factory=list, metadata={"help": "JSON objects of filters; each request draws one. {} is no filter."}
    )
    catalog: str | None = field(default=None, metadata={"help": "A catalog of the server; default: its first."})
    timeout: float = field(default=30.0, metadata={"help": "Seconds that a request may take."})
    check_items: int = field(
        default=1_000, metadata={"help": "Different items of answers that are looked up in the catalog, at most."}
    )
    seed: int = field(default=0, metadata={"help": "Of histories, times and choices."})
    json: str | None = field(default=None, metadata={"help": "A file for the result."})
    page: str | None = field(default=None, metadata={"help": "A file for an HTML page with latencies over time."})

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("The load has a rate and a concurrency. Give one of them.")
        for name in ("rate", "concurrency", "seconds", "timeout", "requests", "draw_from"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}. Give a number above 0.")
        if min(self.warmup, self.ramp, self.max_history, self.check_items) < 0 or not self.k:
            raise ValueError("warmup, ramp, max_history or check_items is below 0, or there is no k. Give numbers.")


def make_parser() -> "TrlParser":
    return parser((LoadArguments,), __doc__)


def main(arguments: LoadArguments) -> None:
    from rich.console import Console

    from llmrec.client.load import Load, summary
    from llmrec.storage import write_json

    load = Load(
        rate=arguments.rate,
        concurrency=arguments.concurrency or 8,
        seconds=arguments.seconds,
        count=arguments.requests,
        warmup=arguments.warmup,
        ramp=arguments.ramp,
        seed=arguments.seed,
    )
    shots, checked = asyncio.run(ask(arguments, load))
    result = {"arguments": asdict(arguments), **summary(load, shots), **checked}
    if arguments.json is not None:
        write_json(Path(arguments.json), result)
    if arguments.page is not None:
        write_page(arguments, shots, result, Path(arguments.page))
    show(result, Console())
    if "200" not in result["statuses"]:
        raise ServerError("No request was answered with items. Look at the statuses, and at the server's log.", 0)
    if result["wrong_answers"] or result["unknown_items"]:
        sys.exit(1)


async def ask(arguments: LoadArguments, load: "Load") -> tuple[list["Shot"], dict[str, Any]]:
    """Runs the load; its shots, and which items of answers the catalog does not have."""
    from tqdm import tqdm

    from llmrec.client import AsyncClient
    from llmrec.client.load import in_catalog, run_load

    async with AsyncClient(arguments.url, timeout=arguments.timeout, retries=0, connections=_CONNECTIONS) as client:
        bodies = requests_of(arguments, await histories_of(arguments, client))
        with tqdm(total=round(load.quiet + load.seconds), unit="s", desc="load", disable=None) as bar:
            shots = await run_load(client, load, bodies, lambda seconds: bar.update(int(seconds) - bar.n))
        found = sorted({item for shot in shots for item in shot.items})
        some = random.Random(arguments.seed).sample(found, min(len(found), arguments.check_items))
        unknown = [item for item in some if not await in_catalog(client, item, arguments.catalog)]
    return shots, {"unknown_items": unknown, "items_looked_up": len(some), "different_items": len(found)}


async def histories_of(arguments: LoadArguments, client: "AsyncClient") -> list[list[str]]:
    """The file's histories, or 1,000 that are drawn from the catalog's live items."""
    if arguments.histories is not None:
        return read_histories(Path(arguments.histories))
    items: list[str] = []
    offset = 0
    while len(items) < arguments.draw_from:
        page = await client.items(catalog=arguments.catalog, offset=offset, limit=_PAGE)
        items += [item.id for item in page.items if not item.retired]
        offset += _PAGE
        if offset >= page.total:
            break
    if not items:
        raise DataError("The server's catalog has no live items. Name another with --catalog.")
    drawing = random.Random(arguments.seed)
    return [drawing.choices(items, k=drawing.randint(0, arguments.max_history)) for _ in range(1_000)]


def read_histories(path: Path) -> list[list[str]]:
    """A JSON list of item ids per line; raises DataError for anything else."""
    histories = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            history = json.loads(line) if line.strip() else []
            if not isinstance(history, list) or not all(isinstance(item, str) for item in history):
                raise DataError(f'Line {number} of {path} is no JSON list of item ids. Write one such as ["a", "b"].')
            histories.append(history)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {error}. Write a JSON list of item ids per line.") from error
    if not histories:
        raise DataError(f"{path} holds no histories. Write a JSON list of item ids per line.")
    return histories


def requests_of(arguments: LoadArguments, histories: list[list[str]]) -> Iterator[dict[str, Any]]:
    """Keyword arguments of `AsyncClient.recommend`, without an end; the same for the same seed."""
    try:
        filters = [json.loads(text) for text in arguments.filters] or [{}]
    except ValueError as error:
        raise RecipeError(
            f'A filter is no JSON: {error}. Write one such as \'{{"price": {{"max": 80}}}}\'.'
        ) from error
    drawing = random.Random(arguments.seed + 1)

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            body: dict[str, Any] = {"history": drawing.choice(histories), "k": drawing.choice(arguments.k)}
            if arguments.beams:
                body["num_beams"] = drawing.choice(arguments.beams)
            if chosen := drawing.choice(filters):
                body["filters"] = chosen
            yield body | ({} if arguments.catalog is None else {"catalog": arguments.catalog})

    return endless()


def show(result: dict[str, Any], console: "Console") -> None:
    """Prints the result."""
    from rich.table import Table

    table = Table("status", "requests", *(f"{name} ms" for name in _COLUMNS))
    for row in rows_of(result):
        table.add_row(*row)
    console.print(table)
    versions = ", ".join(f"{name} ({count})" for name, count in result["versions"].items())
    console.print(
        f"{result['recommendations_per_second']:.1f} recommendations per second of "
        f"{result['requests_per_second']:.1f} requests; {result['refused']} refused; versions: {versions or 'none'}.",
        highlight=False,
    )
    if result["lag"] and result["lag"]["p99"] > _SLOW:
        late = f"{result['lag']['p99'] * 1000:.0f} ms"
        console.print(f"This program was late itself (p99 {late}): run it on another machine.", style="yellow")
    if left := result["different_items"] - result["items_looked_up"]:
        console.print(f"{left} of {result['different_items']} different items were not looked up (--check_items).")
    mistakes = mistakes_of(result)
    for said in mistakes or ["No answer was wrong."]:
        console.print(said, style="red" if mistakes else "green", markup=False)


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """A row per status, latencies in milliseconds."""
    return [
        [status, str(row["requests"]), *(f"{row[name] * 1000:.1f}" for name in _COLUMNS)]
        for status, row in result["statuses"].items()
    ]


def mistakes_of(result: dict[str, Any]) -> list[str]:
    """What was wrong, as sentences."""
    said = [f"Wrong: {count} answer(s) with {wrong}." for wrong, count in result["wrong_answers"].items()]
    if unknown := result["unknown_items"]:
        said.append(f"Wrong: {len(unknown)} item(s) that the catalog lacks, such as {unknown[0]!r}.")
    return said


def write_page(arguments: LoadArguments, shots: list["Shot"], result: dict[str, Any], path: Path) -> None:
    """An HTML page: the table, and each request's latency at the time at which it was meant to begin."""
    from llmrec.page import Page, plot

    page = Page("Load test")
    kind = f"{arguments.rate:g} requests/s" if arguments.rate else f"{arguments.concurrency or 8} clients"
    page.paragraph(f"{arguments.url}, {kind}: {result['recommendations_per_second']:.1f} recommendations per second.")
    mistakes = mistakes_of(result)
    page.finding("warning" if mistakes else "ok", " ".join(mistakes) or "No answer was wrong.")
    header = ["status", "requests", *(f"{name} ms" for name in _COLUMNS)]
    page.table(header, rows_of(result), "Latencies count from the moment that a request was meant to begin.")
    figure, axes = plot()
    for status in result["statuses"]:
        some = [shot for shot in shots if shot.status == status]
        times, latencies = [shot.begin for shot in some], [shot.latency * 1000 for shot in some]
        axes.plot(times, latencies, ".", markersize=3, label=f"{status} ({len(some)})")
    axes.set_yscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("milliseconds")
    if shots:
        axes.legend(frameon=False)
    page.figure(figure, f"Latencies of {len(shots)} requests over the time at which they were meant to begin.")
    page.write(path)


if __name__ == "__main__":
    run(main, make_parser())
