"""The HTTP side on its own: what a request says reaches the prompt as in transformers; the engine is played by it."""

import asyncio
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from factories import random_recommender
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llmrec import Recommender
from llmrec.engine.http import Endpoint, _router
from llmrec.exceptions import RequestError
from llmrec.prompt import Prompt
from llmrec.tasks.item_text import cut_text
from llmrec.tasks.templates import shipped_templates
from llmrec.vocabulary import PlainText, start_token

TIMELINE = Prompt(
    "{% for i in history %}{{ i.action or '?' }}/{{ i.domain or '?' }}/{{ i.gap or '?' }}:{{ i.semantic_id }} "
    "{% endfor %}next:"
)
TASKS = ("next_item", "preference", "search")


class Played(Endpoint):
    """An endpoint whose engine is the recommender in transformers."""

    recommender: Recommender

    async def _encode(self, prompt, parameters):
        if not parameters.num_beams:
            raise AssertionError("only the check asks for single tokens")
        excluded = [np.array(parameters.excluded, dtype=np.int64)]
        ((rows, scores),) = self.recommender._decoded([prompt], parameters.k, parameters.num_beams, excluded)
        return [list(pair) for pair in zip(rows, scores, strict=True)]


def client_of(prompt=TIMELINE, tasks=TASKS, **changes):
    made = random_recommender(3, prompt=prompt, max_history=2, max_positions=512)
    settings = replace(made.settings, **changes)
    parts = (made.model, made.tokenizer, made.catalog, prompt, settings, None, shipped_templates(tasks))
    recommender = Recommender(*parts)
    endpoint = Played(SimpleNamespace(errored=False), recommender.encoder, made.catalog, "m", 100, 500)
    endpoint.recommender = recommender
    app = FastAPI()
    app.state.llmrec = endpoint
    app.include_router(_router())
    return TestClient(app, raise_server_exceptions=False), recommender


def same(answer, expected):
    assert answer.status_code == 200, answer.text
    got = [(item["id"], item["log_probability"]) for item in answer.json()["items"]]
    assert [name for name, _ in got] == [item.item_id for item in expected]
    assert [score for _, score in got] == pytest.approx([item.log_probability for item in expected])


def test_events_and_preferences_reach_the_prompt():
    client, recommender = client_of()
    history = ["item-1", "item-2", "item-3"]
    events = [
        {"action": "view", "domain": "toys", "timestamp": 0.0},
        {"action": "buy", "timestamp": 86_400.0},
        {"domain": "books"},
    ]
    asked = client.post("/v1/recommend", json={"history": history, "k": 5, "events": events})
    same(asked, recommender.recommend(history, 5, events=events))
    other = client.post(
        "/v1/recommend", json={"history": history, "k": 5, "events": [events[0], events[0], events[2]]}
    )
    assert other.json()["items"] != asked.json()["items"]
    said = client.post("/v1/recommend", json={"history": history, "k": 5, "preference": "something red"})
    same(said, recommender.recommend(history, 5, preference="something red"))
    query = client.post("/v1/search", json={"query": "red lamp", "k": 7})
    same(query, recommender.search("red lamp", 7))


def test_events_of_unknown_items_go_with_them():
    client, recommender = client_of()
    history = ["item-1", "nowhere", "item-3"]
    events = [{"action": name, "domain": name, "timestamp": float(place)} for place, name in enumerate("abc")]
    body = {"history": history, "k": 4, "events": events, "ignore_unknown": True}
    same(
        client.post("/v1/recommend", json=body), recommender.recommend(history, 4, ignore_unknown=True, events=events)
    )
    alone = recommender.recommend(["item-1", "item-3"], 4, events=[events[0], events[2]])
    same(client.post("/v1/recommend", json=body), alone)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("recommend", {"history": ["item-1"]}, "give events"),
        ("recommend", {"history": ["item-1"], "events": []}, "1 items came with 0 events"),
        ("recommend", {"history": ["item-1"], "events": [{"time": 3}]}, "time"),
        ("recommend", {"history": ["item-1"], "events": [{"timestamp": "Infinity"}]}, "finite"),
        ("search", {"query": "  "}, "Give some words"),
        ("search", {"query": "a", "k": 0}, "greater than or equal to 1"),
        ("search", {"query": "a", "k": 101}, "at most 100"),
    ],
)
def test_what_does_not_fit_the_prompt_is_a_refusal_and_no_failure(path, body, said):
    client, _ = client_of()
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 422
    assert said in answer.text


def test_a_model_without_the_task_says_so():
    client, _ = client_of(
        prompt=Prompt("{% for i in history %}{{ i.semantic_id }}{% endfor %}"), tasks=("id_to_item",)
    )
    answer = client.post("/v1/recommend", json={"history": [], "preference": "red"})
    assert (answer.status_code, "place for preference" in answer.text) == (422, True)
    answer = client.post("/v1/search", json={"query": "red"})
    assert (answer.status_code, "none to search with" in answer.text) == (422, True)


def test_the_check_at_the_start_can_render_what_is_served():
    for source in (
        TIMELINE.source,
        "{{ preference }} {% for i in history %}{{ i.gap }}{{ i.semantic_id }}{% endfor %}",
    ):
        _, recommender = client_of(prompt=Prompt(source))
        example = recommender.encoder.example()
        assert set(recommender.catalog.tokens_of_rows([0, 20])) <= set(example)


def test_text_is_shown_as_the_tasks_showed_it():
    _, recommender = client_of(max_text_tokens=8)
    encoder = recommender.encoder
    text = PlainText(recommender.tokenizer)
    cut = cut_text("red lamp " * 50, text, 8)
    assert 0 < len(cut) < 30
    assert encoder.encode_query("red  lamp\n" * 50) == encoder.encode_query(cut)
    template = recommender.templates["search"]["looking"]
    assert encoder.encode_query("red  lamp\n" * 50) == template.encode(
        recommender.catalog, [], text, start_token(recommender.tokenizer), query=cut
    )
    assert encoder.encode_query("red \n lamp") == encoder.encode_query("red lamp")
    prompt = encoder.prompt_with({"preference"})
    assert encoder.encode([1], prompt=prompt, preference="a\tb ") == encoder.encode(
        [1], prompt=prompt, preference="a b"
    )


def test_the_engine_is_not_asked_for_wider_searches():
    _, recommender = client_of()
    endpoint = Played(SimpleNamespace(errored=False), recommender.encoder, recommender.catalog, "m", 5, 500)
    with pytest.raises(RequestError, match="at most 5 beams"):
        asyncio.run(endpoint._answer([1], 6, None, []))
    assert math.isfinite(recommender.search("red", 1)[0].log_probability)
