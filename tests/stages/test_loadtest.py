"""The load test, on servers whose mistakes and delays are known."""

import asyncio
import importlib.util
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Response
from pages import Seen

from llmrec.client import AsyncClient
from llmrec.client.load import Load, Shot, arrivals, in_catalog, mistake, quantiles, run_load, summary
from llmrec.exceptions import LLMRecError
from llmrec.script import parse
from llmrec.service.schema import CatalogItem, CatalogItems, RecommendedItem, RecommendRequest, RecommendResponse

ITEMS = [f"item-{number}" for number in range(30)]


class Shop:
    """A server of thirty items that answers as it is told to: late, not at all, or wrongly."""

    def __init__(self) -> None:
        self.asked: list[RecommendRequest] = []
        self.seconds = 0.0
        self.status = 200
        self.wrong = ""
        self.stalled_until = 0.0
        self.refuse_every = 0
        self.app = FastAPI()
        self.app.post("/v1/recommend")(self.recommend)
        self.app.get("/v1/catalog/items")(self.items)

    async def recommend(self, request: RecommendRequest, response: Response) -> RecommendResponse | None:
        self.asked.append(request)
        number = len(self.asked)  # others come while this one waits
        await asyncio.sleep(max(self.seconds, self.stalled_until - time.perf_counter()))
        if self.status != 200 or (self.refuse_every and number % self.refuse_every == 0):
            response.status_code = self.status if self.status != 200 else 429
            response.headers["Retry-After"] = "1"
            return None
        ids = [item for item in ITEMS if item not in request.history][: request.k]
        if self.wrong == "twice":
            ids[-1] = ids[0]
        if self.wrong == "unknown":
            ids[0] = "item-"  # part of an id, but none
        if self.wrong == "seen" and request.history:
            ids[0] = request.history[0]
        if self.wrong == "many":
            ids.append(next(item for item in ITEMS if item not in (*ids, *request.history)))
        items = [
            RecommendedItem(id=item, rank=rank, log_probability=-float(rank), title=item)
            for rank, item in enumerate(ids, start=1)
        ]
        if self.wrong == "order":
            items.reverse()
        if self.wrong == "score":
            items[0].log_probability = 0.5
        version = f"v{len(self.asked) % 2}"
        return RecommendResponse(items=items, model="m", catalog="default", catalog_version=version)

    async def items(self, search: str = "", offset: int = 0, limit: int = 50) -> CatalogItems:
        found = [item for item in ITEMS if search in item]
        items = [
            CatalogItem(id=item, title=item, semantic_id=[0], retired=item == ITEMS[-1], attributes={})
            for item in found[offset : offset + limit]
        ]
        return CatalogItems(items=items, total=len(found))


@pytest.fixture
def shop() -> Shop:
    return Shop()


def loaded(shop: Shop, load: Load, body: dict | None = None, timeout: float = 30.0) -> list[Shot]:
    async def whole() -> list[Shot]:
        transport = httpx.ASGITransport(shop.app)
        async with AsyncClient("http://h", transport=transport, retries=0, timeout=timeout) as client:
            return await run_load(client, load, itertools.repeat(body or {"history": ["item-0"], "k": 3}))

    return asyncio.run(whole())


def test_arrivals_are_a_poisson_process():
    times = list(itertools.islice(arrivals(50.0, 0.0, 0), 20_000))
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(1 / 50, rel=0.05)  # as an exponential's
    assert times == list(itertools.islice(arrivals(50.0, 0.0, 0), 20_000))
    assert times != list(itertools.islice(arrivals(50.0, 0.0, 1), 20_000))


def test_arrivals_grow_over_the_ramp():
    times = list(itertools.takewhile(lambda at: at < 20, arrivals(1_000.0, 10.0, 0)))
    assert times == sorted(times)
    for begin, end in ((0, 2), (4, 6), (8, 10), (10, 12), (18, 20)):
        expected = 1_000 * (min(10, end) ** 2 - min(10, begin) ** 2) / 20 + 1_000 * (max(10, end) - max(10, begin))
        count = sum(begin <= at < end for at in times)
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_an_open_load_charges_a_stall_to_all_who_came_meanwhile(shop):
    """A second of silence at 100 requests per second: half of those of two seconds were late, by half a second."""

    shop.stalled_until = time.perf_counter() + 1.0
    shots = loaded(shop, Load(rate=100.0, seconds=2.0))
    late = [shot for shot in shots if shot.latency > 0.2]
    assert len(shots) == pytest.approx(200, abs=60)
    assert 0.25 * len(shots) < len(late) < 0.65 * len(shots)
    assert 0.3 < sum(shot.latency for shot in late) / len(late) < 0.9
    assert max(shot.latency for shot in shots) > 0.8
    assert [shot.begin for shot in shots] == sorted(shot.begin for shot in shots)
    # A closed load, whose clients wait: it asks but once during the stall.
    shop.stalled_until = time.perf_counter() + 1.0
    closed = loaded(shop, Load(concurrency=1, seconds=1.5))
    assert sum(shot.latency > 0.2 for shot in closed) == 1


def test_an_open_load_does_not_wait_for_answers(shop):
    """Sixty requests of half a second each, within half a second: not one after the other."""
    shop.seconds = 0.5
    begin = time.perf_counter()
    shots = loaded(shop, Load(rate=120.0, count=60, seconds=60.0))
    assert len(shots) == 60
    assert time.perf_counter() - begin < 15.0
    assert min(shot.latency for shot in shots) >= 0.5


def test_a_closed_load_has_as_many_at_once_as_it_says(shop):
    shop.seconds = 0.05
    at_once = most = 0
    answer = shop.recommend

    async def counting(request: RecommendRequest, response: Response) -> RecommendResponse | None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await answer(request, response)
        finally:
            at_once -= 1

    shop.app.router.routes[:] = [route for route in shop.app.router.routes if route.path != "/v1/recommend"]
    shop.app.post("/v1/recommend")(counting)
    shots = loaded(shop, Load(concurrency=6, count=50, seconds=60.0))
    assert most == 6
    assert len(shots) == 50
    assert all(shot.latency >= 0.05 for shot in shots)


@pytest.mark.parametrize("kind", [{"rate": 300.0}, {"concurrency": 3}])
def test_a_count_is_exact_and_warm_up_apart(shop, kind):
    shop.seconds = 0.002
    shots = loaded(shop, Load(**kind, count=40, warmup=0.3, ramp=0.2, seconds=60.0))
    assert len(shots) == 40
    assert all(shot.begin >= 0.5 for shot in shots)
    assert len(shop.asked) > 50


def test_a_load_ends_when_it_says(shop):
    shop.seconds = 0.001
    begin = time.perf_counter()
    for load in (Load(rate=50.0, seconds=0.5, warmup=0.1), Load(concurrency=2, seconds=0.5, warmup=0.1)):
        assert all(0.1 <= shot.begin < 0.6 for shot in loaded(shop, load))
    assert 1.0 < time.perf_counter() - begin < 20.0


def answer(*items: tuple[str, float], ranks: list[int] | None = None) -> RecommendResponse:
    ranks = ranks or list(range(1, len(items) + 1))
    found = [
        RecommendedItem(id=item, rank=rank, log_probability=score, title="")
        for rank, (item, score) in zip(ranks, items, strict=True)
    ]
    return RecommendResponse(items=found, model="m", catalog="c", catalog_version="v")


def test_mistakes_are_found():
    body = {"history": ["h"], "k": 2}
    assert mistake(answer(), body) == ""
    assert mistake(answer(("a", -1.0), ("b", -1.0)), body) == ""
    assert mistake(answer(("a", -1.0), ("a", -2.0)), body) == "an item twice"
    assert mistake(answer(("a", -1.0), ("b", -2.0), ("c", -3.0)), body) == "more than k items"
    assert mistake(answer(("h", -1.0)), body) == "an item of the history (h)"
    assert mistake(answer(("a", -2.0), ("b", -1.0)), body) == "not the best first"
    assert mistake(answer(("a", -1.0), ("b", -2.0), ranks=[2, 1]), body) == "not the best first"
    for score in (math.nan, -math.inf, 0.1):
        assert mistake(answer(("a", score)), body) == "a score that is no log-probability"


def test_a_summary_counts_by_hand():
    shots = [
        Shot(2.0, 0.0, 1.0, "200", "v1", "", ("a",)),
        Shot(2.5, 0.1, 3.0, "200", "v2", "an item twice", ("a", "a")),
        Shot(3.0, 0.2, 0.5, "429"),
        Shot(4.0, 0.0, 2.0, "timeout"),
    ]
    found = summary(Load(warmup=1.5, ramp=0.5), shots)
    assert found["requests"] == 4
    assert found["seconds"] == 4.0  # from the second second to the end of the last, at 6
    assert found["requests_per_second"] == 1.0
    assert found["recommendations_per_second"] == 0.5
    assert found["statuses"]["200"] == {"requests": 2, "p50": 1.0, "p90": 3.0, "p99": 3.0, "max": 3.0}
    assert found["refused"] == 1
    assert found["wrong_answers"] == {"an item twice": 1}
    assert found["versions"] == {"v1": 1, "v2": 1}
    assert found["lag"]["max"] == 0.2
    assert summary(Load(), [])["requests_per_second"] == 0.0
    assert quantiles([float(number) for number in range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@pytest.mark.parametrize(
    ("status", "said"), [(429, "429"), (503, "503"), (504, "504"), (422, "422"), (500, "500"), (401, "401")]
)
def test_statuses_are_told_apart(shop, status, said):
    shop.status = status
    assert {shot.status for shot in loaded(shop, Load(concurrency=2, count=4))} == {said}


def test_late_answers_are_timeouts(shop):
    async def whole() -> list[Shot]:
        def late(request: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("late", request=request)

        async with AsyncClient("http://h", transport=httpx.MockTransport(late), retries=0) as client:
            return await run_load(client, Load(concurrency=1, count=2), itertools.repeat({"history": [], "k": 1}))

    assert [shot.status for shot in asyncio.run(whole())] == ["timeout", "timeout"]


def test_a_part_of_an_id_is_no_item(shop):
    async def whole() -> list[bool]:
        async with AsyncClient("http://h", transport=httpx.ASGITransport(shop.app)) as client:
            return [await in_catalog(client, item, None) for item in ("item-1", "item-29", "item-", "x", "item-30")]

    assert asyncio.run(whole()) == [True, True, False, False, False]


@pytest.fixture
def url(shop: Shop) -> Iterator[str]:
    """The shop, listening."""
    server = uvicorn.Server(uvicorn.Config(shop.app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def script(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loadtest", checkout / "serve" / "loadtest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["loadtest"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def ran(script: ModuleType, *flags: str) -> None:
    script.main(*parse(script.make_parser(), [*flags, "--warmup", "0.2", "--seconds", "60"]))


def test_the_script_reports_what_happened(script, shop, url, tmp_path, capsys):
    shop.refuse_every = 10
    out, page = tmp_path / "load.json", tmp_path / "load.html"
    mix = ["--k", "2", "5", "--beams", "8", "16", "--filters", "{}", '{"price": {"max": 3}}']
    ran(script, "--url", url, "--concurrency", "4", "--requests", "100", *mix, "--json", str(out), "--page", str(page))
    result = json.loads(out.read_text())
    assert result["requests"] == 100
    assert 5 <= result["refused"] <= 15
    assert result["statuses"]["200"]["requests"] + result["statuses"]["429"]["requests"] == 100
    assert set(result["versions"]) == {"v0", "v1"}
    assert result["wrong_answers"] == {}
    assert result["unknown_items"] == []
    assert result["items_looked_up"] == result["different_items"] > 0
    assert result["arguments"]["k"] == [2, 5]
    said = capsys.readouterr().out
    assert "No answer was wrong." in said
    assert "429" in said
    seen = Seen(page.read_text())
    assert {"svg", "table"} <= set(seen.tags)
    assert any("No answer was wrong." in text for text in seen.texts)
    assert {request.k for request in shop.asked} == {2, 5}
    assert {request.num_beams for request in shop.asked} == {8, 16}
    assert {bool(request.filters) for request in shop.asked} == {False, True}
    histories = [request.history for request in shop.asked]
    assert max(map(len, histories)) > 10
    assert {item for history in histories for item in history} <= set(ITEMS[:-1])  # the last one is retired


@pytest.mark.parametrize("wrong", ["twice", "unknown", "seen", "many", "order", "score"])
def test_a_wrong_answer_is_the_scripts_end(script, shop, url, wrong, capsys):
    shop.wrong = wrong
    with pytest.raises(SystemExit) as ended:
        ran(script, "--url", url, "--rate", "100", "--requests", "20")
    assert ended.value.code == 1
    assert "Wrong: " in capsys.readouterr().out


def test_the_script_takes_histories_from_a_file(script, shop, url, tmp_path):
    file = tmp_path / "histories.jsonl"
    file.write_text('["item-1", "item-2"]\n[]\n["item-3"]\n')
    ran(script, "--url", url, "--requests", "30", "--histories", str(file))
    assert {tuple(request.history) for request in shop.asked} == {("item-1", "item-2"), (), ("item-3",)}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rate", "3", "--concurrency", "3"), "Give one of them"),
        (("--rate", "0"), "rate is 0.0"),
        (("--rate", "nan"), "rate is nan"),
        (("--concurrency", "-1"), "concurrency is -1"),
        (("--max_history", "-1"), "max_history"),
        (("--filters", "{"), "A filter is no JSON"),
        (("--histories", "/nowhere"), "cannot be read"),
        (("--catalogue", "x"), "There is no flag"),
    ],
)
def test_flags_that_make_no_sense_are_refused(script, shop, url, flags, said):
    with pytest.raises(LLMRecError, match=said):
        ran(script, "--url", url, *flags)
    assert shop.asked == []


@pytest.mark.parametrize("text", ["", "3\n", "[3]\n", "nonsense\n", '{"history": []}\n'])
def test_a_file_that_holds_no_histories_is_refused(script, tmp_path, text):
    file = tmp_path / "histories.jsonl"
    file.write_text(text)
    with pytest.raises(LLMRecError, match="JSON list of item ids"):
        script.read_histories(file)


def test_a_server_that_answers_nothing_is_an_error(script, shop, url):
    shop.status = 500
    with pytest.raises(LLMRecError, match="No request was answered"):
        ran(script, "--url", url, "--requests", "4")
    with pytest.raises(LLMRecError, match="gave no answer"):
        ran(script, "--url", "http://127.0.0.1:9", "--requests", "4")


def test_the_recipe_is_one(script, checkout):
    (arguments,) = parse(script.make_parser(), ["--config", str(checkout / "serve" / "recipes" / "loadtest.yaml")])
    assert (arguments.rate, arguments.seconds) == (10.0, 30.0)
