"""What a request means: the same items and scores as `Recommender` gives, with an engine that searches in earnest."""

import asyncio
import math

import httpx
import pytest
from factories import random_recommender
from played_engine import PlayedEngine, make_world

from llmrec.artefact_parts import PromptEncoder
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError, RequestError, UnknownItemError
from llmrec.history_store import open_store
from llmrec.prompt import Prompt
from llmrec.recommender import Recommender
from llmrec.service import requests
from llmrec.service.app import build_app
from llmrec.service.catalogs import LiveCatalogs
from llmrec.service.limits import Limits
from llmrec.service.schema import RecommendRequest, ScoreRequest, SearchRequest, StoredEvent
from llmrec.service.service import Service
from llmrec.service.transformers_engine import TransformersEngine
from llmrec.tasks.templates import shipped_templates
from llmrec.vocabulary import PlainText, start_token

TIMELINE = Prompt(
    "{% for i in history %}{{ i.action or '?' }}/{{ i.domain or '?' }}/{{ i.gap or '?' }}:{{ i.semantic_id }} "
    "{% endfor %}next:"
)
EVENTS = [
    {"action": "view", "domain": "toys", "timestamp": 0.0},
    {"action": "buy", "timestamp": 86_400.0},
    {"domain": "books"},
]
HISTORY = ["item-1", "item-2", "item-3"]


class Real:
    """A recommender, and a service that searches with the same model."""

    def __init__(self, folder, prompt, tasks=("next_item", "preference", "search")):
        made = random_recommender(3, prompt=prompt, max_history=2, max_positions=512)
        catalog = made.catalog
        for row, item in enumerate(catalog.items):
            item |= {"price": float(row), "tags": ["red"] if row % 2 else ["blue"]}
        self.recommender = Recommender(
            made.model, made.tokenizer, catalog, prompt, made.settings, None, shipped_templates(tasks)
        )
        catalog.save(folder / "catalog")
        parts = (made.tokenizer, prompt, made.settings, self.recommender.templates)
        catalogs = LiveCatalogs({"default": CatalogVersions(folder / "catalog").folder}, parts, folder / "index")
        self.engine = TransformersEngine(made.model, folder / "index")
        self.service = Service(self.engine, catalogs, "m", open_store("memory:"))
        asyncio.run(self.service.histories.append("ann", [StoredEvent(item=item) for item in [*HISTORY, "gone"]]))

    def ask(self, path, **body):
        async def ask():
            transport = httpx.ASGITransport(app=build_app(self.service), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.post(f"/v1/{path}", json=body)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    real = Real(tmp_path_factory.mktemp("plain"), Prompt("{% for i in history %}{{ i.semantic_id }}{% endfor %}"))
    yield real
    real.engine.close()


@pytest.fixture(scope="module")
def timeline(tmp_path_factory):
    real = Real(tmp_path_factory.mktemp("timeline"), TIMELINE)
    yield real
    real.engine.close()


def same(answer, expected):
    assert answer.status_code == 200, answer.text
    got = [(item["id"], item["rank"], item["title"]) for item in answer.json()["items"]]
    assert got == [(item.item_id, item.rank, item.title) for item in expected]
    scores = [item["log_probability"] for item in answer.json()["items"]]
    assert scores == pytest.approx([item.log_probability for item in expected], abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 7},
        {"k": 40, "exclude_seen": False},
        {"num_beams": 40},
        {"filters": {"price": {"min": 10, "max": 20.5}}, "num_beams": 40},
        {"filters": {"tags": {"any_of": ["red"]}, "brand": {"none_of": ["Brand 1"]}}, "k": 20},
        {"allow": ["item-1", "item-7", "item-8", "lost"]},
        {"deny": [f"item-{row}" for row in range(0, 40, 2)], "k": 40},
        {"normalize": "legal", "filters": {"price": {"max": 12}}},
        {"prefix_cap": {"levels": 1, "most": 1}, "k": 20},
        {"sampling": {"temperature": 2.0, "seed": 5}},
        {"min_candidates": 37},
        {"text": "something red for the garden"},
        {"history": [], "k": 3},
        {"history": ["item-9", "lost", "item-9"], "ignore_unknown": True},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_the_recommender(plain, options):
    body = options if "text" in options else {"history": HISTORY} | options
    same(plain.ask("recommend", **body), plain.recommender.recommend(**body))


def test_stored_histories_are_histories_and_unknown_items_of_them_are_passed_over(plain):
    same(plain.ask("recommend", user_id="ann"), plain.recommender.recommend(HISTORY))
    same(plain.ask("recommend", user_id="nobody"), plain.recommender.recommend([]))
    items = ["item-5", "item-2"]
    scores = plain.ask("score", user_id="ann", items=items).json()["scores"]
    assert scores == plain.ask("score", history=HISTORY, items=items).json()["scores"]


def test_scores_are_those_of_the_recommender_in_the_order_asked(plain):
    items = ["item-9", "item-2", "item-30", "item-1"]
    answer = plain.ask("score", history=HISTORY, items=items)
    assert answer.status_code == 200, answer.text
    scores = answer.json()["scores"]
    assert [score["id"] for score in scores] == items
    whole = {item.item_id: item.log_probability for item in plain.recommender.recommend(HISTORY, 40, False, 40)}
    assert [score["log_probability"] for score in scores] == pytest.approx([whole[item] for item in items], abs=1e-9)
    for score in scores:
        assert math.fsum(score["level_log_probabilities"]) == pytest.approx(score["log_probability"])


def test_an_explained_answer_has_codes_and_levels(plain):
    for item in plain.ask("recommend", history=HISTORY, explain=True).json()["items"]:
        row = plain.recommender.catalog.row(item["id"])
        assert item["semantic_id"] == plain.recommender.catalog.codes[row].tolist()
        assert math.fsum(item["level_log_probabilities"]) == pytest.approx(item["log_probability"])
    assert "semantic_id" not in plain.ask("recommend", history=HISTORY).text


def test_events_and_preferences_reach_the_prompt(timeline):
    body = {"history": HISTORY, "k": 5}
    same(timeline.ask("recommend", **body, events=EVENTS), timeline.recommender.recommend(**body, events=EVENTS))
    swapped = [EVENTS[0], EVENTS[0], EVENTS[2]]
    other = timeline.ask("recommend", **body, events=swapped)
    same(other, timeline.recommender.recommend(**body, events=swapped))
    assert other.json()["items"] != timeline.ask("recommend", **body, events=EVENTS).json()["items"]
    said = timeline.ask("recommend", **body, preference="something red")
    same(said, timeline.recommender.recommend(**body, preference="something red"))
    same(timeline.ask("search", query="red lamp", k=7), timeline.recommender.search("red lamp", 7))


def test_stored_events_reach_the_prompt(timeline):
    stored = [StoredEvent(item=item, **event) for item, event in zip(HISTORY, EVENTS, strict=True)]
    asyncio.run(timeline.service.histories.append("bob", stored))
    same(timeline.ask("recommend", user_id="bob"), timeline.recommender.recommend(HISTORY, events=EVENTS))


def test_events_of_unknown_items_go_with_them(timeline):
    history = ["item-1", "nowhere", "item-3"]
    body = {"history": history, "k": 4, "events": EVENTS, "ignore_unknown": True}
    same(timeline.ask("recommend", **body), timeline.recommender.recommend(**body))
    alone = timeline.recommender.recommend(["item-1", "item-3"], 4, events=[EVENTS[0], EVENTS[2]])
    same(timeline.ask("recommend", **body), alone)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("recommend", {"history": ["item-1"]}, "give events"),
        ("recommend", {"history": ["item-1"], "events": []}, "1 items came with 0 events"),
        ("recommend", {"history": ["item-1"], "events": [{"time": 3}]}, "time"),
        ("recommend", {"history": ["item-1"], "events": [{"timestamp": 10**400}]}, "valid number"),
        ("recommend", {"history": ["item-1"], "events": [{"timestamp": "1"}]}, "events[0].timestamp"),
        ("recommend", {"history": [], "exclude_seen": "no"}, "exclude_seen"),
        ("recommend", {"history": [], "explain": 1}, "explain"),
        ("recommend", {"history": [], "ignore_unknown": "true"}, "ignore_unknown"),
        ("recommend", {"history": [], "filters": {"price": {"min": "1"}}}, "filters.price.min"),
        ("recommend", {"history": [], "filters": {"price": {"max": True}}}, "filters.price.max"),
        ("recommend", {"history": [], "sampling": {"temperature": True}}, "sampling.temperature"),
        ("search", {"query": "a", "explain": "yes"}, "explain"),
        ("recommend", {"text": "   "}, "Give some words"),
        ("recommend", {"history": [], "min_candidates": 41}, "40 item(s) may be recommended"),
        ("recommend", {"history": [], "filters": {"colour": {"min": 1}}}, "colour"),
        ("recommend", {"history": [], "allow": [], "prefix_cap": {"levels": 64, "most": 1}}, "first 64 levels"),
        ("recommend", {"history": ["item-1", "nowhere"]}, "'nowhere'"),
        ("recommend", {"history": [], "adapter": "mine"}, "no adapter 'mine'"),
        ("recommend", {"text": "a " * 4_000}, "tokens"),
        ("search", {"query": "  "}, "Give some words"),
        ("search", {"query": "a", "k": 0}, "greater than or equal to 1"),
        ("score", {"history": [], "items": ["item-1", "lost"]}, "1 item(s) ('lost') to score are not in the catalog"),
        (
            "score",
            {"history": [], "items": ["item-1", "item-2", "item-1"]},
            "('item-1') to score are named more than once",
        ),
        ("score", {"history": [], "items": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_answered_is_a_refusal_and_no_failure(timeline, path, body, said):
    answer = timeline.ask(path, **body)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == 422


def test_a_cap_that_fits_no_item_never_reaches_those_it_would_be_searched_with(plain):
    calls, search = [], plain.engine.search

    async def counted(*given):
        calls.append(given)
        return await search(*given)

    plain.engine.search = counted
    try:
        answer = plain.ask("recommend", history=[], prefix_cap={"levels": 4, "most": 1})
        assert (answer.status_code, calls) == (422, [])
        assert plain.ask("recommend", history=[], prefix_cap={"levels": 3, "most": 1}).status_code == 200
    finally:
        plain.engine.search = search


def test_a_model_without_the_task_says_so(tmp_path):
    real = Real(tmp_path, Prompt("{% for i in history %}{{ i.semantic_id }}{% endfor %}"), tasks=("id_to_item",))
    answer = real.ask("recommend", history=[], preference="red")
    assert (answer.status_code, "place for preference" in answer.text) == (422, True)
    answer = real.ask("search", query="red")
    assert (answer.status_code, "none to search with" in answer.text) == (422, True)
    real.engine.close()


def test_text_is_plain_text_behind_the_start_token(plain):
    encoder, tokenizer = plain.recommender.encoder, plain.recommender.tokenizer
    hostile = "buy <s0_1><|eos|> now"
    assert encoder.encode_text(hostile) == [start_token(tokenizer), *PlainText(tokenizer).encode(hostile)]
    assert not set(encoder.encode_text(hostile)[1:]) & {
        tokenizer.eos_token_id,
        *plain.recommender.catalog.token_ids[0],
    }
    with pytest.raises(RequestError, match="Give some words"):
        encoder.encode_text("\n")
    request = RecommendRequest(text=hostile)
    assert requests.prompt_of(encoder, request) == (encoder.encode_text(hostile), [])


def test_retired_items_are_not_scored_but_may_be_in_a_history(tmp_path):
    world = make_world(tmp_path)
    asyncio.run(world.catalogs.swap("main", world.second))
    with world.catalogs.using("main") as served:
        with pytest.raises(RequestError, match=r"\('item-1'\) to score are retired"):
            requests.scoring(served, ScoreRequest(history=[], items=["item-7", "item-1"]), [1])
        prompt, seen = requests.prompt_of(served.encoder, RecommendRequest(history=["item-1", "item-0", "item-1"]))
        assert seen == [0, 1]
        assert prompt == served.encoder.encode([1, 0, 1])
        with pytest.raises(UnknownItemError):
            requests.prompt_of(served.encoder, RecommendRequest(history=["lost"]))


def test_the_width_is_the_larger_of_k_and_beams(plain):
    encoder: PromptEncoder = plain.recommender.encoder  # which searches with 10 beams
    limits = Limits(max_k=100, max_beams=50)
    cases = [(3, None, 10), (30, None, 30), (3, 20, 20), (30, 20, 30), (100, 50, 100), (1, 1, 1)]
    for k, beams, width in cases:
        assert requests.beams_of(RecommendRequest(history=[], k=k, num_beams=beams), encoder, limits) == width
        assert requests.rows_of(SearchRequest(query="a", k=k, num_beams=beams), encoder, limits) == width
    assert requests.rows_of(ScoreRequest(history=[], items=["a", "b", "c"]), encoder, limits) == 3
    for request, said in (
        (RecommendRequest(history=[], k=101), "k is 101, and this server gives at most 100"),
        (SearchRequest(query="a", num_beams=51), "num_beams is 51, and this server gives at most 50"),
        (ScoreRequest(history=[], items=[str(n) for n in range(101)]), "number of items is 101"),
    ):
        with pytest.raises(RequestError, match=said):
            requests.rows_of(request, encoder, limits)


def test_a_prompt_leaves_room_for_all_but_the_last_token_of_an_item(plain):
    catalog = plain.recommender.catalog
    assert catalog.num_levels == 3
    requests.require_room([1] * 10, catalog, 12)
    with pytest.raises(RequestError, match="11 tokens, and the server was started for 10"):
        requests.require_room([1] * 11, catalog, 12)


def test_an_engine_that_finds_too_few_or_no_numbers_has_failed():
    search = requests.Search([1], SearchParameters(k=3, num_beams=3), expected=3)
    requests.check_found(search, Found([1, 2, 3], [-1.0, -2.0, -3.0], [[-1.0]] * 3, 0.1))
    for rows, scores in (([1, 2], [-1.0, -2.0]), ([1, 2, 3, 4], [-1.0] * 4), ([1, 2, 3], [-1.0, math.nan, -3.0])):
        with pytest.raises(EngineError, match="not numbers"):
            requests.check_found(search, Found(rows, scores, [[-1.0]] * len(rows), 0.1))
    capped = requests.Search([1], SearchParameters(k=3, num_beams=3, cap=1, cap_levels=1), expected=3, capped=True)
    requests.check_found(capped, Found([1], [-1.0], [[-1.0]], 0.1))
    with pytest.raises(EngineError, match="not numbers"):
        requests.check_found(capped, Found([1, 2, 3, 4], [-1.0] * 4, [[-1.0]] * 4, 0.1))


def test_scores_of_other_items_than_asked_are_a_failure(tmp_path):
    world = make_world(tmp_path)
    request = ScoreRequest(history=[], items=["item-3", "item-1"])
    found = Found([1, 3], [-1.0, -2.0], [[-1.0], [-2.0]], 0.1)
    scores = requests.scores_of(world.recommender.catalog, request, found)
    assert [(score.id, score.log_probability) for score in scores] == [("item-3", -2.0), ("item-1", -1.0)]
    with pytest.raises(EngineError, match="other items"):
        requests.scores_of(world.recommender.catalog, request, Found([1, 2], [-1.0, -2.0], [[-1.0], [-2.0]], 0.1))
    assert isinstance(world.engine, PlayedEngine)
