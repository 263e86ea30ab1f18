"""The live vLLM server against transformers: the same items, the same scores."""

import asyncio
import os
import signal
import subprocess
import time

import httpx
import psutil
import pytest
from factories import random_histories

from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.launch import Server, check_port, server_command
from llmrec.exceptions import EngineError
from llmrec.guard import guarded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def assert_same(served, bodies):
    """Every answer of the server is transformers' answer, within 1e-4 per log-probability."""
    answers = served.post_all(bodies)
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        got = answer.json()["items"]
        expected = served.recommender.recommend(**body)
        assert [item["rank"] for item in got] == list(range(1, len(expected) + 1))
        assert [item["title"] for item in got] == [
            served.recommender.catalog.title(served.recommender.catalog.row(item["id"])) for item in got
        ]
        for item, wanted in zip(got, expected, strict=True):
            assert item["log_probability"] == pytest.approx(wanted.log_probability, abs=1e-4)
        # Two items whose scores differ by less than the two back ends' rounding may change places.
        places = {item.item_id: item for item in expected}
        for item, wanted in zip(got, expected, strict=True):
            if item["id"] != wanted.item_id:
                assert places[item["id"]].log_probability == pytest.approx(wanted.log_probability, abs=2e-5)


def histories(seed, count, longest=24):
    return [[f"item-{row}" for row in rows] for rows in random_histories(seed, 500, count, longest)]


def test_mixed_lengths_in_one_batch(llama_server):
    assert_same(llama_server, [{"history": history, "k": 10} for history in histories(1, 48)])


def test_prefix_cache_changes_nothing(llama_server):
    bodies = [{"history": history, "k": 10} for history in histories(2, 6)]
    bodies += [{"history": body["history"][:-1], "k": 10} for body in bodies if body["history"]]
    assert_same(llama_server, bodies)
    assert_same(llama_server, bodies)


def test_mixed_widths_and_options_in_one_batch(llama_server):
    some = histories(3, 12)
    bodies = [{"history": h, "k": 1 + 7 * i, "num_beams": 5 * (i + 1)} for i, h in enumerate(some)]
    bodies += [{"history": h, "k": 10, "exclude_seen": False} for h in some]
    assert_same(llama_server, bodies)


def test_every_option_in_one_batch(llama_server):
    options = [
        {"normalize": "legal"},
        {"allow": [f"item-{row}" for row in range(0, 500, 7)]},
        {"deny": [f"item-{row}" for row in range(0, 500, 2)], "exclude_seen": False},
        {"filters": {"brand": {"any_of": ["Brand 1"]}}, "normalize": "legal"},
        {"prefix_cap": {"levels": 1, "most": 1}},
        {"sampling": {"temperature": 0.7, "seed": 5}},
        {"sampling": {"temperature": 1.5, "seed": 6}, "prefix_cap": {"levels": 2, "most": 1}, "num_beams": 40},
        {"filters": {"brand": {"none_of": ["Brand 1"]}}, "allow": [f"item-{row}" for row in range(9)]},
    ]
    some = histories(5, len(options))
    assert_same(llama_server, [{"history": h, "k": 10} | option for h, option in zip(some, options, strict=True)])


def test_given_items_are_scored(llama_server):
    history, items = ["item-3", "item-4"], [f"item-{row}" for row in range(400)]
    answer = httpx.post(f"{llama_server.url}/v1/score", json={"history": history, "items": items}, timeout=120.0)
    assert answer.status_code == 200, answer.text
    expected = llama_server.recommender.score(history, items)
    for got, (item, score, levels) in zip(answer.json()["scores"], expected, strict=True):
        assert got["id"] == item
        assert got["log_probability"] == pytest.approx(score, abs=1e-4)
        assert got["level_log_probabilities"] == pytest.approx(levels, abs=1e-4)


def test_wide_search_reaches_the_whole_catalog(llama_server):
    answer = llama_server.post(history=["item-3"], k=500)
    items = [item["id"] for item in answer.json()["items"]]
    assert len(items) == len(set(items)) == 499
    assert "item-3" not in items
    assert_same(llama_server, [{"history": ["item-3", "item-4"], "k": 20, "num_beams": 500}])


def test_fewer_remain_than_asked_for(llama_server):
    history = [f"item-{row}" for row in range(497)]
    answer = llama_server.post(history=history, k=10).json()["items"]
    assert sorted(item["id"] for item in answer) == ["item-497", "item-498", "item-499"]
    assert llama_server.post(history=[f"item-{row}" for row in range(500)], k=10).json()["items"] == []


def test_empty_history_is_answered(llama_server):
    assert_same(llama_server, [{"history": [], "k": 5}])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"history": ["item-1", "nowhere"], "k": 3}, "'nowhere'"),
        ({"history": ["item-1"], "k": 0}, "greater than or equal to 1"),
        ({"history": ["item-1"], "k": 1001}, "1000"),
        ({"history": ["item-1"], "num_beams": 513}, "512"),
        ({"history": ["item-1"], "num_beams": 0}, "greater than or equal to 1"),
        ({"history": "item-1"}, "list"),
        ({"history": ["item-1"], "k": True}, "integer"),
        ({"history": ["item-1"], "k": "3"}, "integer"),
        ({"history": ["x"] * 10_001}, "10000"),
        ({"history": ["x" * 5000]}, "1000"),
        ({"k": 3}, "exactly one"),
        ({"history": [], "kk": 3}, "kk"),
    ],
)
def test_requests_that_cannot_be_answered(llama_server, body, said):
    answer = llama_server.post(**body)
    assert 400 <= answer.status_code < 500
    assert said in answer.text
    assert llama_server.post(history=["item-1"], k=1).status_code == 200


def test_unknown_items_are_ignored_on_request(llama_server):
    with_unknown = llama_server.post(history=["item-1", "nowhere"], k=3, ignore_unknown=True).json()["items"]
    assert with_unknown == llama_server.post(history=["item-1"], k=3).json()["items"]


def test_routes(llama_server):
    def get(path):
        return httpx.get(f"{llama_server.url}{path}", timeout=30.0)

    assert get("/health").status_code == 200
    ready = get("/ready").json()
    assert ready["launch"]
    assert (ready["items"], ready["catalog_version"]) == (500, llama_server.recommender.catalog.version)
    assert [model["id"] for model in get("/v1/models").json()["data"]] == ["artefact"]
    assert "/v1/recommend" in get("/openapi.json").json()["paths"]
    assert get("/docs").status_code == 200
    for hidden in ("/pooling", "/v1/embeddings", "/invocations"):
        assert httpx.post(f"{llama_server.url}{hidden}", json={"input": "x"}, timeout=30.0).status_code == 404


def test_a_catalog_goes_on_and_back_under_load(llama_server):
    """Answers of two versions, while requests keep coming: none fails, and each is of one version."""
    versions = CatalogVersions.inside(llama_server.artefact)
    base = versions.current
    gone = llama_server.post(history=["item-3"], k=1, num_beams=100).json()["items"][0]["id"]
    next_one = versions.retire([gone])
    expected, asked = {}, {"history": ["item-3"], "k": 100, "num_beams": 500}

    async def load_and_swap():
        async with httpx.AsyncClient(base_url=llama_server.url, timeout=120.0) as client:
            stop = asyncio.Event()

            async def ask():
                answers = []
                while not stop.is_set():
                    answers.append(await client.post("/v1/recommend", json=asked))
                return answers

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            swaps = []
            for version in ("current", base, next_one, base):
                await asyncio.sleep(0.5)
                swaps.append(await client.put("/v1/catalog", json={"version": version}))
            await asyncio.sleep(0.5)
            stop.set()
            return swaps, [answer for answers in await asyncio.gather(*asking) for answer in answers]

    try:
        swaps, answers = asyncio.run(load_and_swap())
    finally:
        versions.rollback(base)
    assert [answer.status_code for answer in swaps] == [200] * 4, [answer.text for answer in swaps]
    assert [answer.json()["version"] for answer in swaps] == [next_one, base, next_one, base]
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        said = answer.json()
        ids = [item["id"] for item in said["items"]]
        assert (gone in ids) == (said["catalog_version"] == base)
        scores = [item["log_probability"] for item in said["items"]]
        first = expected.setdefault(said["catalog_version"], dict(zip(ids, scores, strict=True)))
        assert first == pytest.approx(dict(zip(ids, scores, strict=True)), abs=1e-4)
    assert set(expected) == {base, next_one}


def test_metrics_are_ours_and_vllm_s(llama_server):
    llama_server.post(history=["item-3"], k=5)
    text = httpx.get(f"{llama_server.url}/metrics", timeout=30.0).text
    assert "vllm:prefix_cache_hits" in text
    assert "llmrec_" in text


def test_another_server_is_not_taken_for_ones_own(llama_server, tmp_path):
    port = int(llama_server.url.rpartition(":")[2])
    with pytest.raises(EngineError, match=f"Port {port}"):
        check_port(port)
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(EngineError, match="not ready"):
            Server(process, llama_server.url, tmp_path / "log", "another launch").wait_until_ready(timeout=3)
        process.kill()


def test_killed_while_it_starts_it_leaves_no_process(llama_server):
    """vLLM's engine is born long before the server is ready, and nobody else would end it."""
    folder = llama_server.artefact
    command, environment = server_command(folder, port=1)
    process = subprocess.Popen(guarded(command), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server, family = psutil.Process(process.pid), []
    deadline = time.monotonic() + 120
    while len(family) < 2 and time.monotonic() < deadline:  # the watcher, and the first of vLLM's own
        family = server.children(recursive=True)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(family) >= 2
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_alive(child) for child in family):
        time.sleep(0.2)
    assert [child for child in family if _alive(child)] == []


def test_titles_of_any_length_are_searched_as_transformers_searches_them(title_server):
    bodies = [
        {"history": [f"item-{row}" for row in rows], "k": 1 + 3 * place, "num_beams": 4 * (place % 4) + 1}
        for place, rows in enumerate(random_histories(6, 300, 12, 8))
    ]
    assert_same(title_server, [*bodies, {"history": ["item-3", "item-4"], "k": 20, "num_beams": 300}])
    found = title_server.post(history=["item-3"], k=300, exclude_seen=False).json()["items"]
    assert {item["id"] for item in found} == set(title_server.recommender.catalog.ids)
    lengths = {len(title_server.recommender.catalog.tokens_of(row)) for row in range(300)}
    assert len(lengths) > 5


def test_gpt2_with_chunked_prefill(gpt2_server):
    assert_same(gpt2_server, [{"history": history, "k": 10} for history in histories(4, 32)])


def test_killing_the_server_leaves_no_process(gpt2_server):
    """Last: it ends the GPT-2 server."""
    family = [gpt2_server.process, *gpt2_server.process.children(recursive=True)]
    assert len(family) > 1
    os.kill(gpt2_server.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_alive(process) for process in family):
        time.sleep(0.2)
    assert [process for process in family if _alive(process)] == []


def _alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
