"""The engine of sequence models: parity with the recommender, batches, versions, failures of one, and its service."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from sequence_models import EVENTS, features_of, items_of, random_model, random_sequence_recommender

from llmrec.catalog import Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.request import SearchParameters
from llmrec.exceptions import CatalogError, EngineError, RequestError
from llmrec.sequence import engine as engine_module
from llmrec.sequence.engine import SequenceEngine
from llmrec.sequence.history_encoder import HistoryEncoder
from llmrec.sequence.live_items import LiveItems
from llmrec.sequence.new_items import add_items
from llmrec.service import canary, live_version
from llmrec.service.catalogs import LiveCatalogs


def ran(awaitable):
    return asyncio.run(asyncio.wait_for(awaitable, 60))


@pytest.fixture(scope="module")
def made():
    return random_sequence_recommender(3, events=EVENTS, retired=[5, 17])


@pytest.fixture
def engine(made):
    engine = SequenceEngine(made.model)
    engine._index = engine.items.index_of(made.catalog)
    yield engine
    engine.close()


def test_it_says_what_it_is(engine):
    assert (engine.max_tokens, engine.dtype, engine.adapters) == (3 + 4 * 8, "float64", [])
    assert not engine.errored


def random_requests(seed, count):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        history = [f"item-{row}" for row in rng.integers(0, 40, size=rng.integers(0, 12))]
        options = {"k": int(rng.integers(1, 45)), "num_beams": int(rng.integers(1, 9))}
        if rng.random() < 0.4:
            options["filters"] = {"price": {"max": float(rng.integers(0, 20))}}
        if rng.random() < 0.3:
            options["deny"] = [f"item-{row}" for row in rng.integers(0, 45, size=4)]
        if rng.random() < 0.3:
            options["allow"] = [f"item-{row}" for row in rng.integers(0, 45, size=20)]
        if rng.random() < 0.3:
            options["normalize"] = "legal"
        if rng.random() < 0.3:
            options["sampling"] = {"temperature": float(rng.choice([0.3, 2.0])), "seed": int(rng.integers(99))}
        if rng.random() < 0.3:
            options["exclude_seen"] = False
        if rng.random() < 0.3:
            options["prefix_cap"] = {"levels": 1, "most": 2}
        if rng.random() < 0.4:
            options["target"] = {"action": "view"}
        found.append((history, options))
    return found


@pytest.mark.parametrize("inline", [0, 1_000])
def test_it_answers_as_the_recommender_does(made, engine, tmp_path, monkeypatch, inline):
    monkeypatch.setattr(live_version, "INLINE_ROWS", inline)
    made.catalog.save(tmp_path / "catalog")
    catalogs = LiveCatalogs.of({"main": tmp_path / "catalog"}, engine.items, lambda catalog: made.encoder)
    asked = random_requests(inline, 40)

    async def answer(history, options):
        with catalogs.using() as served:
            rows = served.catalog.rows(history)
            seen = rows if options.get("exclude_seen", True) else []
            given = (options.get(name, default) for name, default in (("filters", {}), ("allow", None), ("deny", ())))
            constraint = await catalogs.constrain(served, *given, seen)
            cap, draw = options.get("prefix_cap", {}), options.get("sampling", {})
            parameters = SearchParameters(
                k=options["k"],
                num_beams=options["num_beams"],
                index=served.index,
                subset=constraint.subset,
                allowed=constraint.allowed,
                excluded=constraint.excluded,
                renormalize=options.get("normalize") == "legal",
                cap_levels=cap.get("levels", 0),
                cap=cap.get("most", 0),
                temperature=draw.get("temperature", 0.0),
                seed=draw.get("seed", 0),
            )
            prompt = served.encoder.encode(rows, **({"target": options["target"]} if "target" in options else {}))
            found = await engine.search(prompt, parameters)
            assert len(found.rows) == min(options["k"], constraint.candidates)
            return found

    async def together():
        return await asyncio.gather(*(answer(history, options) for history, options in asked))

    for (history, options), one in zip(asked, ran(together()), strict=True):
        wanted = made.recommend(history, **options)
        assert [f"item-{row}" for row in one.rows] == [item.item_id for item in wanted], options
        assert one.scores == pytest.approx([item.log_probability for item in wanted], abs=1e-9)
        assert one.levels == [[score] for score in one.scores]
    assert engine.items._known.keys() >= {engine._index}


class Held:
    """Holds an engine's thread inside a search until it is let go, and notes how many are read together."""

    def __init__(self, monkeypatch):
        self.begun, self.go_on, self.batches = threading.Event(), threading.Event(), []
        whole = engine_module.queries_of

        def queries_of(model, histories):
            self.batches.append(len(histories))
            if not self.begun.is_set():
                self.begun.set()
                assert self.go_on.wait(30)
            return whole(model, histories)

        monkeypatch.setattr(engine_module, "queries_of", queries_of)


def test_what_waits_is_read_together_and_one_failing_request_fails_alone(made, engine, monkeypatch):
    held = Held(monkeypatch)
    good = [made.encoder.encode([row]) for row in range(6)]
    bad = [
        ([1, 2], SearchParameters(), RequestError, "has 2 numbers"),
        ([*made.encoder.encode([1])[:-4], 40, 0, 0, 0], SearchParameters(), RequestError, "the catalog has 40"),
        ([0] * 39, SearchParameters(), RequestError, "longer than the model's 35"),
        (good[0], SearchParameters(index="lost"), EngineError, "are not there"),
        (good[0], SearchParameters(cap_levels=2, cap=1), RequestError, "first 2 levels"),
        (good[0], SearchParameters(num_beams=0, token=40), RequestError, "Row 40"),
    ]

    async def run():
        first = asyncio.create_task(engine.search(good[0], SearchParameters(k=3)))
        await asyncio.to_thread(held.begun.wait, 30)
        asked = [engine.search(prompt, SearchParameters(k=3)) for prompt in good]
        asked += [engine.search(prompt, parameters) for prompt, parameters, _, _ in bad]
        asked += [engine.search(good[1], SearchParameters(num_beams=0, token=3))]
        tasks = [asyncio.ensure_future(one) for one in asked]
        gone = asyncio.ensure_future(engine.search(good[0], SearchParameters()))
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        held.go_on.set()
        return await first, await asyncio.gather(*tasks, return_exceptions=True)

    first, found = ran(run())
    assert held.batches[:2] == [1, 6]
    assert first.rows == found[0].rows
    for row, one in enumerate(found[:6]):
        wanted = made.recommend([f"item-{row}"], k=3, exclude_seen=False)
        assert [f"item-{place}" for place in one.rows] == [item.item_id for item in wanted]
    for (_, _, kind, message), error in zip(bad, found[6:12], strict=True):
        assert type(error) is kind
        assert message in str(error)
    assert found[12].rows == [0]
    assert found[12].scores == pytest.approx([made.score(["item-1"], ["item-3"])[0][1]], abs=1e-9)
    assert not engine.errored


@pytest.mark.parametrize("retrieval", ["exact", "faiss-flat"])
def test_the_canary_passes_and_notices_a_wrong_search(made, tmp_path, monkeypatch, retrieval):
    made.catalog.save(tmp_path)
    engine = SequenceEngine(made.model, retrieval)
    catalogs = LiveCatalogs.of({"main": tmp_path}, engine.items, lambda _: made.encoder)
    with catalogs.using() as served:
        assert ran(canary.check(engine, served)) < 1e-6
        ran(canary.canary(engine, served))
        index = engine.items.find(served.index).table.index
        whole = index.search

        def wrong(queries, wanted):
            return [type(one)(one.rows, one.scores + 0.01) for one in whole(queries, wanted)]

        monkeypatch.setattr(index, "search", wrong)
        with pytest.raises(EngineError, match="ordinary prefill"):
            ran(canary.check(engine, served))
    engine.close()


def test_live_items_are_shared_held_and_forgotten(made):
    items = LiveItems(made.model)
    name = items.index_of(made.catalog)
    assert items.index_of(made.catalog) == name
    other = items.index_of(made.catalog.with_retired([1], True))
    assert other != name
    assert items.find(name).table is items.find(other).table
    part = items.subset_of(name, np.array([1, 5, 7]))
    assert items.subset_of(name, np.array([7, 1, 5, 5])) == part
    assert np.flatnonzero(items.find(part).pool.mask.numpy()).tolist() == [1, 7]
    assert items.size(part) == 40
    items.release(part)
    assert items.size(part) == 40
    items.release(part)
    assert items.size(part) == 0
    items.release(name)
    items.find(name)
    items.release(name, keep=True)
    for gone in (name, part):
        with pytest.raises(CatalogError, match="no version in use"):
            items.find(gone)
    with pytest.raises(CatalogError, match="no version in use"):
        items.subset_of(name, np.array([1]))
    items.find(other)


def test_versions_with_new_items_have_tables_of_their_own(tmp_path):
    made = random_sequence_recommender(7, kind="text")
    made.save_pretrained(tmp_path / "art")
    one, two = features_of(1, seed=1)["vectors"], features_of(1, seed=2)["vectors"]
    versions = CatalogVersions(tmp_path / "art" / "catalog")
    base = versions.current
    first = add_items(tmp_path / "art", items_of(1, first=40), {"vectors": one})
    versions.rollback(base)
    second = add_items(tmp_path / "art", items_of(1, first=40), {"vectors": two}, "the same id, of another text")
    items = LiveItems(made.model)
    tables = [items.find(items.index_of(versions.load(name))).table for name in (base, first, second)]
    assert [len(table.index.table) for table in tables] == [40, 41, 41]
    assert tables[0].model is made.model
    assert not torch.equal(tables[1].index.table[40], tables[2].index.table[40])
    for table in tables[1:]:
        torch.testing.assert_close(table.index.table[:40], tables[0].index.table)
    with pytest.raises(CatalogError, match="cannot make vectors"):
        LiveItems(random_model(1)).index_of(versions.load(first))


def test_an_engine_that_was_closed_refuses(made):
    engine = SequenceEngine(made.model)
    engine.close()
    with pytest.raises(EngineError, match="it was closed"):
        ran(engine.search([0, 0, 0], SearchParameters()))
    assert engine.errored


def test_scores_that_are_no_numbers_find_nothing():
    broken = random_sequence_recommender(1)
    with torch.no_grad():
        broken.model.representation.table().fill_(torch.nan)
    engine = SequenceEngine(broken.model)
    index = engine.items.index_of(broken.catalog)
    assert ran(engine.search(broken.encoder.encode([1]), SearchParameters(k=5, index=index))).rows == []
    engine.close()


def test_an_engine_serves_a_catalog_of_another_length(made, engine):
    with pytest.raises(CatalogError, match="has 30 items and the model 40"):
        engine.items.index_of(Catalog.of_rows(items_of(30)))
    encoder = HistoryEncoder(made.catalog, made.settings, EVENTS)
    assert len(encoder.encode(list(range(30)))) == engine.max_tokens
