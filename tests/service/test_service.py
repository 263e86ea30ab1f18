"""The path of a request through the service, with an engine that is as slow and as broken as a test wants it."""

import asyncio
import time

import pytest
from played_engine import make_world

from llmrec.exceptions import BusyError, DeadlineError, EngineError, RequestError, UnknownCatalogError
from llmrec.service.errors import (
    CanaryFailedError,
    DrainingError,
    PlacedError,
    QueueFullError,
    SwapRunningError,
)
from llmrec.service.limits import Limits
from llmrec.service.schema import RecommendBatch, RecommendRequest, ScoreRequest, SearchRequest, SwapRequest


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def one(**body):
    return RecommendRequest(**({"history": ["item-5"], "k": 4} | body))


def value(service, name, **labels):
    return service.metrics.registry.get_sample_value(name, labels)


async def until(true, seconds=5.0):
    """Waits, on the event loop, until a condition holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.001)


def idle(service):
    """Whether nothing of any request is left."""
    admission = service.admission
    return (admission.running, admission.waiting, admission.preparing, service.engine.running) == (0, 0, 0, 0)


def test_an_answer_is_what_the_engine_found(world):
    service = world.service()
    answer = asyncio.run(service.recommend(one(adapter="red")))
    prompt, parameters, adapter = world.engine.calls[0]
    found, _ = world.engine.best(prompt, parameters)
    catalog = world.recommender.catalog
    assert [(item.id, item.rank) for item in answer.items] == [
        (catalog.ids[row], rank) for rank, (_, row) in enumerate(found, start=1)
    ]
    assert (adapter, answer.model, answer.catalog, answer.catalog_version) == (
        "red",
        "red",
        "main",
        world.versions.current,
    )
    assert asyncio.run(service.recommend(one())).model == "m"
    assert value(service, "llmrec_searches_total", catalog="main", adapter="red") == 1
    for stage in ("prompt", "queue", "engine", "search", "answer", "total"):
        assert value(service, "llmrec_stage_seconds_count", stage=stage) == 2
    assert idle(service)


def test_no_candidates_need_no_engine(world):
    service = world.service()
    answer = asyncio.run(service.recommend(one(allow=["lost"])))
    assert answer.items == []
    assert world.engine.calls == []
    assert idle(service)


def test_a_deadline_ends_the_work_in_the_engine_and_in_the_queue(world):
    service = world.service(limits=Limits(max_k=10, max_beams=10, max_rows_running=10))
    world.engine.delay = 60.0

    async def run():
        begin = time.monotonic()
        results = await asyncio.gather(
            *(service.recommend(one(deadline_ms=ms)) for ms in (200, 50, 50)), return_exceptions=True
        )
        return results, time.monotonic() - begin

    results, seconds = asyncio.run(run())
    assert [type(result) for result in results] == [DeadlineError] * 3
    assert 0.2 <= seconds < 5.0
    assert (world.engine.cancelled, len(world.engine.calls)) == (1, 1)  # the others were still in the queue
    assert idle(service)
    assert value(service, "llmrec_refusals_total", reason="deadline") == 3


def test_the_servers_deadline_holds_for_requests_without_one_and_over_longer_ones(world):
    world.engine.delay = 60.0
    for limits, body in ((Limits(deadline_ms=50), {}), (Limits(max_deadline_ms=50), {"deadline_ms": 60_000})):
        with pytest.raises(DeadlineError, match=r"0.05 s"):
            asyncio.run(world.service(limits=limits).recommend(one(**body)))


def test_a_timeout_of_the_engine_is_no_deadline(world):
    world.engine.error = TimeoutError("of the engine")
    with pytest.raises(TimeoutError, match="of the engine") as raised:
        asyncio.run(world.service().recommend(one()))
    assert not isinstance(raised.value, DeadlineError)


def test_cancelling_a_request_cancels_its_search(world):
    service = world.service()
    world.engine.gate = asyncio.Event()

    async def run():
        tasks = [
            asyncio.create_task(service.recommend(one())),
            asyncio.create_task(service.score(ScoreRequest(history=[], items=["item-1"]))),
            asyncio.create_task(service.recommend_together(RecommendBatch(requests=[one(), one()]))),
        ]
        await until(lambda: world.engine.running == 4)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(end) for end in asyncio.run(run())] == [asyncio.CancelledError] * 3
    assert (world.engine.cancelled, world.engine.finished) == (4, 0)
    assert idle(service)


@pytest.mark.parametrize("error", [EngineError("broken"), ValueError("odd")])
def test_rows_come_back_whatever_fails(world, error):
    service = world.service()
    world.engine.error = error
    for asked in (
        lambda: service.recommend(one()),
        lambda: service.search(SearchRequest(query="red")),
        lambda: service.score(ScoreRequest(history=[], items=["item-1"])),
    ):
        with pytest.raises(type(error)):
            asyncio.run(asked())
    world.engine.error = None
    with pytest.raises(RequestError):
        asyncio.run(service.recommend(one(history=["nowhere"])))
    world.engine.lost = 1
    with pytest.raises(EngineError, match="not numbers"):
        asyncio.run(service.recommend(one()))
    assert idle(service)


def test_the_engine_never_has_more_rows_than_allowed(world):
    service = world.service(limits=Limits(max_k=20, max_beams=20, max_rows_running=50, max_rows_waiting=5000))
    world.engine.delay = 0.001

    async def run():
        bodies = [one(k=1 + number % 20, num_beams=1) for number in range(60)]
        return await asyncio.gather(*(service.recommend(body) for body in bodies))

    answers = asyncio.run(run())
    assert [len(answer.items) for answer in answers] == [1 + number % 20 for number in range(60)]
    assert 30 < world.engine.peak <= 50
    assert idle(service)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(world):
    service = world.service(limits=Limits(max_k=10, max_beams=10, max_rows_running=10, max_rows_waiting=10))
    world.engine.gate = asyncio.Event()

    async def run():
        first = [asyncio.create_task(service.recommend(one(num_beams=10))) for _ in range(2)]
        await until(lambda: service.admission.waiting == 10)
        assert (value(service, "llmrec_beam_rows", state="running"), service.admission.running) == (10, 10)
        assert value(service, "llmrec_beam_rows", state="waiting") == 10
        with pytest.raises(QueueFullError) as refused:
            await service.recommend(one(num_beams=10))
        world.engine.gate.set()
        return refused.value, await asyncio.gather(*first)

    refused, answers = asyncio.run(run())
    assert refused.retry_after >= 1
    assert len(answers) == 2
    assert value(service, "llmrec_refusals_total", reason="busy") == 1


def test_a_batch_is_answered_together_or_refused_together(world):
    service = world.service()
    good = [one(), one(k=2, catalog="other", history=[]), one(k=3)]
    answer = asyncio.run(service.recommend_together(RecommendBatch(requests=good)))
    assert [len(each.items) for each in answer.responses] == [4, 2, 3]
    assert [each.catalog for each in answer.responses] == ["main", "other", "main"]
    world.engine.delay = 60.0
    begin = time.monotonic()
    for bad, kind, said in (
        (one(history=["nowhere"]), RequestError, r"requests\[1\]: .*'nowhere'"),
        (one(catalog="third"), UnknownCatalogError, r"requests\[1\]: .*'third'"),
        (one(k=900), RequestError, r"requests\[1\]: "),
    ):
        limited = world.service(limits=Limits(max_k=100, max_beams=100))
        with pytest.raises(PlacedError, match=said) as raised:
            asyncio.run(limited.recommend_together(RecommendBatch(requests=[one(), bad, one()])))
        assert raised.value.place == 1
        assert isinstance(raised.value.error, kind)
        assert idle(limited)
    assert time.monotonic() - begin < 10.0
    assert world.engine.running == 0


def test_a_batch_takes_its_places_in_the_queue_all_or_none(world):
    service = world.service(limits=Limits(max_k=10, max_beams=10, max_rows_running=20, max_rows_waiting=20))
    batch = RecommendBatch(requests=[one(num_beams=10)] * 4)
    assert len(asyncio.run(service.recommend_together(batch)).responses) == 4
    assert world.engine.peak <= 20
    with pytest.raises(RequestError, match="50 beam rows"):
        asyncio.run(service.recommend_together(RecommendBatch(requests=[one(num_beams=10)] * 5)))
    world.engine.gate = asyncio.Event()

    async def run():
        first = asyncio.create_task(service.recommend(one(num_beams=10)))
        await until(lambda: world.engine.running == 1)
        with pytest.raises(QueueFullError):
            await service.recommend_together(batch)
        assert service.admission.running == 10
        world.engine.gate.set()
        await first

    asyncio.run(run())


def test_a_batch_ends_with_its_shortest_deadline(world):
    service = world.service()
    world.engine.delay = 60.0
    batch = RecommendBatch(requests=[one(), one(deadline_ms=50), one(deadline_ms=90_000)])
    with pytest.raises(DeadlineError, match=r"0.05 s"):
        asyncio.run(service.recommend_together(batch))
    assert idle(service)


def test_a_long_deadline_in_a_batch_is_no_longer_one_for_requests_without(world):
    service = world.service(limits=Limits(deadline_ms=50))
    world.engine.delay = 60.0
    batch = RecommendBatch(requests=[one(deadline_ms=90_000), one()])
    with pytest.raises(DeadlineError, match=r"0.05 s"):
        asyncio.run(asyncio.wait_for(service.recommend_together(batch), 10.0))
    assert idle(service)


class SlowStore:
    """A history store that does not answer until it is let."""

    def __init__(self):
        self.gate, self.asked = asyncio.Event(), 0

    async def read(self, user_id, last):
        self.asked += 1
        await self.gate.wait()
        return []


def test_a_slow_history_store_holds_up_nobody_else(world):
    store = SlowStore()
    limits = Limits(max_k=10, max_beams=10, max_rows_running=10, max_rows_waiting=20)
    service = world.service(limits=limits, histories=store)

    async def run():
        slow = [asyncio.create_task(service.recommend(one(history=None, user_id="ann", k=10))) for _ in range(2)]
        await until(lambda: store.asked == 2)
        assert (service.admission.running, service.admission.preparing) == (0, 20)
        async with asyncio.timeout(10.0):
            assert len((await service.recommend(one(k=10))).items) == 10
        # They have their places all the same: no more is taken than could wait for them.
        third = asyncio.create_task(service.recommend(one(history=None, user_id="ann", k=10)))
        await until(lambda: store.asked == 3)
        with pytest.raises(QueueFullError, match="0 beam rows are running and 30 wait"):
            await service.recommend(one(k=10))
        service.draining = True  # what was accepted is answered
        third.cancel()
        store.gate.set()
        assert [len(answer.items) for answer in await asyncio.gather(*slow)] == [10, 10]
        assert world.engine.peak == 10
        await asyncio.gather(third, return_exceptions=True)

    asyncio.run(run())
    assert idle(service)
    assert value(service, "llmrec_beam_rows", state="waiting") == 0


def test_a_filter_that_is_being_made_holds_up_nobody_else(world, monkeypatch):
    service = world.service(limits=Limits(max_k=10, max_beams=10, max_rows_running=10))
    made, constrain = asyncio.Event(), world.catalogs.constrain

    async def slow(served, filters=None, *given):
        if filters:
            await made.wait()
        return await constrain(served, filters, *given)

    monkeypatch.setattr(world.catalogs, "constrain", slow)

    async def run():
        filters = {"brand": {"any_of": ["Brand 1"]}}
        waits = asyncio.create_task(service.recommend(one(k=10, filters=filters)))
        await until(lambda: service.admission.preparing == 10)
        async with asyncio.timeout(10.0):
            await service.recommend(one(k=10))
        made.set()
        await waits

    asyncio.run(run())
    assert idle(service)


def test_an_answer_is_of_the_version_that_it_began_with(world):
    service = world.service()
    world.engine.gate = asyncio.Event()
    first, second = world.versions.current, world.second
    batch = RecommendBatch(requests=[one(k=40, exclude_seen=False)] * 3)

    async def run():
        before = asyncio.create_task(service.recommend_together(batch))
        await until(lambda: world.engine.running == 3)
        swapped = await service.swap(SwapRequest(version=second))
        after = asyncio.create_task(service.recommend_together(batch))
        await until(lambda: world.engine.running == 6)
        world.engine.gate.set()
        return swapped, await before, await after

    swapped, before, after = asyncio.run(run())
    assert (swapped.version, swapped.previous) == (second, first)
    retired = {"item-0", "item-1", "item-2"}
    for answers, version, there in ((before, first, retired), (after, second, set())):
        for answer in answers.responses:
            assert answer.catalog_version == version
            assert {item.id for item in answer.items} & retired == there
            assert len(answer.items) == 40 - len(retired - there)


def test_swaps_under_load_never_mix_versions(world):
    service = world.service(limits=Limits(max_k=50, max_beams=50, max_rows_running=120))
    world.engine.delay = 0.002
    versions = [world.versions.current, world.second]

    async def run():
        answers, done = [], False

        async def ask():
            while not done:
                batch = RecommendBatch(requests=[one(k=40, exclude_seen=False)] * 2)
                answers.extend([(await service.recommend_together(batch)).responses])

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for number in range(10):
            await service.swap(SwapRequest(version=versions[(number + 1) % 2]))
            await asyncio.sleep(0.01)
        done = True
        await asyncio.gather(*asking)
        return answers

    answers = asyncio.run(run())
    seen = set()
    for pair in answers:
        (version,) = {answer.catalog_version for answer in pair}
        assert [len(answer.items) for answer in pair] == [40 if version == versions[0] else 37] * 2
        seen.add(version)
    assert seen == set(versions)


def test_a_version_that_fails_its_canary_is_not_used(world):
    asked = []

    async def check(engine, served):
        asked.append(served.version)
        if served.version == world.second:
            raise EngineError("wrong at /root/secret")

    service = world.service(check=check)
    first = world.versions.current
    with pytest.raises(CanaryFailedError, match=world.second) as raised:
        asyncio.run(service.swap(SwapRequest(version=world.second)))
    assert "secret" not in str(raised.value)
    assert asked == [world.second]
    assert asyncio.run(service.recommend(one())).catalog_version == first
    assert value(service, "llmrec_catalog_swaps_total", catalog="main", result="refused") == 1
    assert value(service, "llmrec_catalog_version", catalog="main", version=first) == 1


def test_a_canary_that_hangs_ends_a_swap(world):
    async def check(engine, served):
        await asyncio.sleep(3600)

    service = world.service(check=check, limits=Limits(canary_timeout=0.05))
    with pytest.raises(CanaryFailedError):
        asyncio.run(service.swap(SwapRequest(version=world.second)))


def test_swaps_that_cannot_be_made(world):
    service = world.service()
    for request in (SwapRequest(catalog="third"), SwapRequest(version="0" * 16)):
        with pytest.raises(UnknownCatalogError):
            asyncio.run(service.swap(request))
    gate = asyncio.Event()

    async def check(engine, served):
        await gate.wait()

    slow = world.service(check=check)

    async def run():
        first = asyncio.create_task(slow.swap(SwapRequest(version=world.second)))
        await asyncio.sleep(0.05)
        with pytest.raises(SwapRunningError):
            await slow.swap(SwapRequest(version=world.second))
        gate.set()
        return await first

    assert asyncio.run(run()).version == world.second
    assert value(slow, "llmrec_catalog_version", catalog="main", version=world.second) == 1
    assert value(slow, "llmrec_catalog_swaps_total", catalog="main", result="done") == 1


def test_a_damaged_version_is_refused_without_naming_files(world):
    folder = world.folder / "catalog" / "versions" / world.second
    for file in folder.iterdir():
        file.write_bytes(b"{}")
    with pytest.raises(RequestError) as raised:
        asyncio.run(world.service().swap(SwapRequest(version=world.second)))
    assert str(world.folder) not in str(raised.value)


def test_a_draining_service_ends_what_it_has_and_takes_nothing_new(world):
    service = world.service()
    world.engine.gate = asyncio.Event()

    async def run():
        await service.start()
        first = asyncio.create_task(service.recommend(one()))
        await until(lambda: world.engine.running == 1)
        assert service.unready is None
        service.draining = True
        assert "being stopped" in service.unready
        for refused in (service.recommend(one()), service.swap(SwapRequest())):
            with pytest.raises(DrainingError):
                await refused
        world.engine.gate.set()
        answer = await first
        await service.close()
        return answer

    assert len(asyncio.run(run()).items) == 4
    assert value(service, "llmrec_refusals_total", reason="draining") == 1


def test_requests_in_flight_are_counted_and_bounded(world):
    service = world.service(limits=Limits(max_requests=2))
    with service.accepted(), service.accepted():
        assert service.in_flight == 2
        assert value(service, "llmrec_requests_in_flight") == 2
        with pytest.raises(BusyError, match="2 requests are in flight"), service.accepted():
            raise AssertionError("it was let in")
    assert (service.in_flight, value(service, "llmrec_requests_in_flight")) == (0, 0)


def test_pages_of_items(world):
    page = asyncio.run(world.service().items("other", "TITLE 1", 2, 3))
    assert [item.id for item in page.items] == ["item-11", "item-12", "item-13"]
    assert page.total == 11
    with pytest.raises(UnknownCatalogError):
        asyncio.run(world.service().items("third", "", 0, 3))


def test_a_user_without_a_store(world):
    with pytest.raises(RequestError, match="keeps no histories"):
        asyncio.run(world.service().recommend(RecommendRequest(user_id="ann")))


def test_limits_that_do_not_fit_the_artefact_are_refused_at_the_start(world):
    with pytest.raises(RequestError, match="searches with 10 beams, and the server's limit is 9"):
        world.service(limits=Limits(max_beams=9))
    world.engine.max_tokens = 2
    with pytest.raises(RequestError, match="2 tokens, and an item alone may have 3"):
        world.service()


def test_a_check_that_fails_at_the_start_is_an_error(world):
    async def check(engine, served):
        raise EngineError("they differ")

    service = world.service(check=check)
    with pytest.raises(EngineError, match="they differ"):
        asyncio.run(service.start())
    assert service.unready is not None
