"""Valid requests of every kind, drawn at random; each answer is held against what it must be, by Python alone.

LLMREC_FUZZ=100000 asks so many (some six minutes of one core), LLMREC_FUZZ_SEED asks others; by default it is what CI
has time for.
"""

import asyncio
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from live_service import CATEGORIES, save_artefact, within

from llmrec.catalog import Catalog
from llmrec.service.schema import RecommendBatch, RecommendedItem, RecommendRequest, RecommendResponse
from llmrec.service.service import Service
from llmrec.service.settings import ServiceSettings

REQUESTS = int(os.environ.get("LLMREC_FUZZ", "3000"))
SEED = int(os.environ.get("LLMREC_FUZZ_SEED", "0"))
AT_ONCE = 24

pytestmark = pytest.mark.slow


def drawn(drawing: random.Random, ids: Sequence[str], catalogs: Sequence[str]) -> RecommendRequest:
    """Any request that the schema takes and the service must answer."""
    body: dict[str, Any] = {}

    def some(longest: int) -> list[str]:
        return drawing.choices(ids, k=drawing.randint(0, longest))

    if drawing.random() < 0.05:
        body["text"] = "a" + "".join(drawing.choices("abc <|s0_1|> ü\n🛋", k=drawing.randint(1, 20)))
    elif drawing.random() < 0.3:
        body["history"] = [*some(8), "unknown", *some(8)]
        body["ignore_unknown"] = True
    else:
        body["history"] = some(80 if drawing.random() < 0.1 else 9)
    if "history" in body and drawing.random() < 0.2:
        body["events"] = [{"action": "view", "timestamp": drawing.uniform(0, 2e9)} for _ in body["history"]]
    if drawing.random() < 0.9:
        body["k"] = drawing.choice([1, 2, 3, 5, 10, 20, 59, 60, 61, 1000])
    if drawing.random() < 0.6:
        body["num_beams"] = drawing.choice([1, 2, 8, 16, 33, 60, 512])
    if drawing.random() < 0.4:
        body["exclude_seen"] = drawing.random() < 0.5
    if drawing.random() < 0.5:
        names = drawing.sample(["category", "price", "in_stock", "tags", "brand"], k=drawing.randint(1, 3))
        body["filters"] = {name: condition(drawing, name) for name in names}
    if drawing.random() < 0.2:
        body["allow"] = [*some(30), "unknown"]
    if drawing.random() < 0.3:
        body["deny"] = [*some(30), "unknown"]
    if drawing.random() < 0.3:
        body["normalize"] = drawing.choice(["vocabulary", "legal"])
    if drawing.random() < 0.2:
        body["prefix_cap"] = {"levels": drawing.randint(1, 3), "most": drawing.randint(1, 4)}
    if drawing.random() < 0.2:
        body["sampling"] = {"temperature": drawing.choice([0.1, 1.0, 5.0]), "seed": drawing.randint(0, 2**53)}
    if drawing.random() < 0.3:
        body["explain"] = True
    if drawing.random() < 0.3:
        body["catalog"] = drawing.choice(catalogs)
    return RecommendRequest.model_validate(body)


def condition(drawing: random.Random, name: str) -> dict[str, Any]:
    if name == "price":
        ends = sorted(drawing.uniform(-10, 110) for _ in range(2))
        return drawing.choice([{"min": ends[0]}, {"max": ends[1]}, {"min": ends[0], "max": ends[1]}])
    values: list[Any] = {
        "category": [*CATEGORIES, "none of them"],
        "in_stock": [True, False],
        "tags": [f"tag {number}" for number in range(6)],
        "brand": [f"Brand {number}" for number in range(4)],
    }[name]
    chosen = drawing.sample(values, k=drawing.randint(1, len(values)))
    return {drawing.choice(["any_of", "none_of"]): chosen}


def holds(item: dict[str, Any], name: str, wanted: Any) -> bool:
    """Whether an item fulfils a condition: the definition."""
    value = item.get(name)
    if value is None:
        return False
    entries = value if isinstance(value, list) else [value]
    return (
        (wanted.any_of is None or any(entry in wanted.any_of for entry in entries))
        and (wanted.none_of is None or not any(entry in wanted.none_of for entry in entries))
        and (wanted.min is None or value >= wanted.min)
        and (wanted.max is None or value <= wanted.max)
    )


def may_return(catalog: Catalog, request: RecommendRequest) -> set[str]:
    """The ids that an answer may have: the definition."""
    seen = set(request.history or []) if request.exclude_seen else set()
    return {
        str(item["item_id"])
        for item, retired in zip(catalog.items, catalog.retired.tolist(), strict=True)
        if not retired
        and item["item_id"] not in seen
        and item["item_id"] not in request.deny
        and (request.allow is None or item["item_id"] in request.allow)
        and all(holds(dict(item), name, wanted) for name, wanted in request.filters.items())
    }


def check(catalog: Catalog, request: RecommendRequest, answer: RecommendResponse) -> None:
    items: list[RecommendedItem] = answer.items
    ids = [item.id for item in items]
    candidates = may_return(catalog, request)
    assert set(ids) <= candidates
    assert len(set(ids)) == len(ids)
    wanted = min(request.k, len(candidates))
    codes = {item: tuple(catalog.codes[row].tolist()) for row, item in enumerate(catalog.ids)}
    if request.prefix_cap is None:
        assert len(ids) == wanted
    else:
        levels, most = request.prefix_cap.levels, request.prefix_cap.most
        branches = Counter(codes[item][:levels] for item in candidates)
        assert all(count <= most for count in Counter(codes[item][:levels] for item in ids).values())
        assert len(ids) <= min(wanted, sum(min(count, most) for count in branches.values()))
        assert len(ids) >= min(1, wanted)
    scores = [item.log_probability for item in items]
    assert all(math.isfinite(score) and score <= 1e-5 for score in scores)
    assert [item.rank for item in items] == list(range(1, len(items) + 1))
    if request.sampling is None:
        assert scores == sorted(scores, reverse=True)
    for item in items:
        assert item.title == catalog.title(catalog.rows([item.id])[0])
        assert (item.semantic_id is not None) == (item.level_log_probabilities is not None) == request.explain
        if request.explain:
            assert tuple(item.semantic_id) == codes[item.id]
            assert sum(item.level_log_probabilities) == pytest.approx(item.log_probability, abs=1e-4)


def test_every_valid_request_is_answered_rightly(tmp_path):
    artefact = save_artefact(tmp_path / "artefact", num_retired=7)
    other = save_artefact(tmp_path / "other", seed=1, num_items=40)
    settings = ServiceSettings(catalogs={"first": str(artefact), "second": str(other)})

    async def body(service: Service) -> None:
        drawing = random.Random(SEED)
        catalogs = {}
        for name in settings.catalogs:
            with service.catalogs.using(name) as served:
                catalogs[name] = served.catalog
        # The other catalog has fewer items, so that every history is ignore_unknown's or of both.
        ids = [item for item in catalogs["first"].ids if item in catalogs["second"].ids]
        asked = 0

        async def ask() -> None:
            nonlocal asked
            while asked < REQUESTS:
                if drawing.random() < 0.05:
                    count = drawing.randint(1, 6)
                    requests = [drawn(drawing, ids, list(catalogs)) for _ in range(count)]
                    asked += count
                    batch = RecommendBatch(requests=requests)
                    answers = (await service.recommend_together(batch)).responses
                else:
                    requests = [drawn(drawing, ids, list(catalogs))]
                    asked += 1
                    answers = [await service.recommend(requests[0])]
                assert len(answers) == len(requests)
                for request, answer in zip(requests, answers, strict=True):
                    assert answer.catalog == (request.catalog or "first")
                    catalog = catalogs[answer.catalog]
                    assert answer.catalog_version == catalog.version
                    try:
                        check(catalog, request, answer)
                    except AssertionError as error:
                        error.add_note(request.model_dump_json(exclude_unset=True))
                        error.add_note(answer.model_dump_json())
                        raise

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(ask())
        assert asked >= REQUESTS

    within(artefact, settings, tmp_path / "index", body)
