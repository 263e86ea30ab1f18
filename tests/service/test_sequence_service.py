"""A live server of a sequence model, started as `llmrec serve` starts it: over HTTP it answers as the library does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from sequence_models import EVENTS, features_of, items_of, random_sequence_recommender
from typer.testing import CliRunner

from llmrec import Recommender
from llmrec.catalog_versions import CatalogVersions
from llmrec.engine.launch import server_command
from llmrec.exceptions import RequestError
from llmrec.sequence.new_items import add_items
from llmrec.service.settings import ServiceSettings


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """One that reads texts, so that items can be added; its base has two retired items."""
    folder = tmp_path_factory.mktemp("sequence") / "tiny"
    random_sequence_recommender(3, kind="text", events=EVENTS, retired=[5, 17]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(artefact, tmp_path_factory):
    """A server in a process of its own; the default backend, vllm, gives way to transformers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = tmp_path_factory.mktemp("store") / "histories.db"
    command, environment = server_command(artefact, port=port, history_store=f"sqlite:{store}", launch="mine")
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            end = time.monotonic() + 240
            while True:
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < end
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def same(answer, wanted):
    """Whether an HTTP answer has the library's items, scores and titles."""
    assert [item["id"] for item in answer["items"]] == [item.item_id for item in wanted]
    assert [item["log_probability"] for item in answer["items"]] == pytest.approx(
        [item.log_probability for item in wanted], abs=1e-6
    )
    assert [item["title"] for item in answer["items"]] == [item.title for item in wanted]
    return True


def ask(client, path="/v1/recommend", **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


EVENT_LIST = [{"action": "view", "timestamp": 1.5e9}, {"domain": "games", "timestamp": 1.5001e9}, {}]

REQUESTS = {
    "plain": {"history": ["item-1", "item-2"], "k": 7},
    "new user": {"history": [], "k": 3},
    "everything": {"history": ["item-1"], "k": 100},
    "filters": {"history": ["item-1"], "k": 9, "filters": {"price": {"max": 9}, "brand": {"none_of": ["Brand 1"]}}},
    "a list": {"history": ["item-1"], "k": 9, "filters": {"in_stock": {"any_of": [True]}}, "deny": ["item-2"]},
    "allow": {"history": ["item-1"], "k": 9, "allow": ["item-1", "item-5", "item-9", "item-30", "lost"]},
    "legal": {"history": ["item-1"], "k": 9, "normalize": "legal", "exclude_seen": False},
    "drawn": {"history": ["item-1"], "k": 9, "sampling": {"temperature": 2.0, "seed": 4}},
    "events": {"history": ["item-1", "item-2", "item-3"], "k": 9, "events": EVENT_LIST},
    "target": {"history": ["item-1", "item-2", "item-3"], "k": 9, "events": EVENT_LIST,
               "target": {"action": "view", "domain": "books", "timestamp": 1.6e9}},
    "unknown": {"history": ["item-1", "lost"], "k": 4, "ignore_unknown": True},
    "cap": {"history": ["item-1"], "k": 4, "prefix_cap": {"levels": 1, "most": 1}},
    "long": {"history": [f"item-{row % 40}" for row in range(300)], "k": 4, "exclude_seen": False},
}  # fmt: skip


@pytest.mark.parametrize("name", list(REQUESTS))
def test_a_server_answers_as_the_library_does(client, artefact, name):
    made = Recommender.from_pretrained(artefact, device="cpu")
    body = REQUESTS[name]
    assert same(ask(client, **body), made.recommend(**body))


def test_a_batch_scores_and_stored_histories(client, artefact):
    made = Recommender.from_pretrained(artefact, device="cpu")
    whole = [body for name, body in REQUESTS.items() if name != "long"]
    answers = ask(client, requests=whole)["responses"]
    for body, answer in zip(whole, answers, strict=True):
        assert same(answer, made.recommend(**body))
    scored = ask(client, "/v1/score", history=["item-1"], items=["item-9", "item-2"], target={"action": "view"})
    wanted = made.score(["item-1"], ["item-9", "item-2"], target={"action": "view"})
    assert [one["id"] for one in scored["scores"]] == ["item-9", "item-2"]
    assert [one["log_probability"] for one in scored["scores"]] == pytest.approx(
        [score for _, score, _ in wanted], abs=1e-6
    )
    events = [{"item": item, **event} for item, event in zip(["item-1", "item-2", "item-3"], EVENT_LIST, strict=True)]
    assert client.post("/v1/users/ann/events", json={"events": events}).status_code == 204
    assert same(ask(client, user_id="ann", k=9), made.recommend(**REQUESTS["events"]))
    explained = ask(client, history=["item-1"], k=2, explain=True)["items"]
    assert explained[0]["semantic_id"] == [int(explained[0]["id"].removeprefix("item-"))]
    assert explained[0]["level_log_probabilities"] == [explained[0]["log_probability"]]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/recommend", {"text": "a lamp"}, "no text"),
        ("/v1/recommend", {"history": ["item-1"], "preference": "red"}, "no place for preference"),
        ("/v1/recommend", {"history": ["item-1"], "target": {"action": "sell"}}, "the model knows buy, view"),
        ("/v1/recommend", {"history": ["item-1"], "target": {"price": 3}}, "target.price"),
        ("/v1/recommend", {"text": "a lamp", "target": {"action": "buy"}}, "A target came with a text"),
        ("/v1/recommend", {"history": ["lost"]}, "not in the catalog"),
        ("/v1/recommend", {"history": ["item-1"], "prefix_cap": {"levels": 2, "most": 1}}, "first 2 levels"),
        ("/v1/recommend", {"history": ["item-1"], "events": [{"timestamp": 1e300}]}, "no moment"),
        ("/v1/score", {"history": [], "items": ["item-5"]}, "retired"),
        ("/v1/search", {"query": "lamp"}, "cannot search for words"),
    ],
)
def test_what_a_server_refuses(client, path, body, said):
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert said in answer.json()["error"]["message"]


def test_a_catalog_is_swapped_while_it_is_served(client, artefact):
    state = client.get("/v1/catalog").json()["catalogs"][0]
    assert (state["items"], state["live"], state["levels"]) == (40, 38, 1)
    assert state["attributes"] == {"price": "number", "brand": "text", "in_stock": "flag"}
    versions = CatalogVersions(artefact / "catalog")
    base = versions.current
    try:
        added = add_items(artefact, items_of(3, first=40), {"vectors": features_of(3, seed=8)["vectors"]})
        retired = versions.retire(["item-9", "item-41"])
        for version in (added, retired, base):
            done = client.put("/v1/catalog", json={"version": version})
            assert (done.status_code, done.json()["version"]) == (200, version)
            made = Recommender.from_pretrained(artefact, device="cpu", catalog_version=version)
            history = ["item-1", "item-40"] if version != base else ["item-1"]
            for more in ({}, {"filters": {"price": {"max": 12}}}, {"allow": ["item-9", "item-42", "item-2"]}):
                answer = ask(client, history=history, k=45, **more)
                assert answer["catalog_version"] == version
                assert same(answer, made.recommend(history, k=45, **more))
        assert "item-42" in [item["id"] for item in ask_version(client, added, history=[], k=45)["items"]]
        # A version of whose items the model knows nothing is refused, and the one before stays.
        unknown = versions.add(items_of(1, first=43), [[43]])
        refused = client.put("/v1/catalog", json={"version": unknown})
        assert refused.status_code == 422
        assert "cannot be read" in refused.json()["error"]["message"]
        assert client.get("/ready").json()["catalog_version"] == added
    finally:
        versions.rollback(base)
        assert client.put("/v1/catalog", json={"version": base}).status_code == 200


def ask_version(client, version, **body):
    """Goes to a version, and asks it."""
    assert client.put("/v1/catalog", json={"version": version}).status_code == 200
    return ask(client, **body)


def test_how_a_sequence_model_s_server_is_started(artefact, tmp_path):
    command, environment = server_command(artefact, retrieval="faiss-ivf")
    assert command[1:4] == ["-m", "llmrec.engine.launch", "transformers"]
    assert ServiceSettings.from_environment(environment).retrieval == "faiss-ivf"
    with pytest.raises(RequestError, match="came with a sequence model"):
        server_command(artefact, tensor_parallel_size=2)
    with pytest.raises(RequestError, match="no adapters for 'tiny'"):
        server_command(artefact, adapters={"one": tmp_path})


def test_the_command_line_recommends(artefact):
    from llmrec.cli.main import app

    made = Recommender.from_pretrained(artefact, device="cpu")
    words = ["recommend", str(artefact), "--history", "item-1,item-2", "-k", "3", "--filter", "price<=9", "--json"]
    done = CliRunner().invoke(app, [*words, "--target", '{"action": "view"}', "--events", '[{"action": "buy"}, {}]'])
    assert done.exit_code == 0, done.output
    wanted = made.recommend(
        ["item-1", "item-2"],
        k=3,
        filters={"price": {"max": 9}},
        target={"action": "view"},
        events=[{"action": "buy"}, {}],
    )
    assert [row["item_id"] for row in json.loads(done.stdout)] == [item.item_id for item in wanted]
    for wrong in ('["buy"]', "buy"):
        done = CliRunner().invoke(app, [*words, "--target", wrong])
        assert isinstance(done.exception, RequestError)
        assert "cannot be read" in str(done.exception)
