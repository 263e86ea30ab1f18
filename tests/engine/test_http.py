"""The plugin on vLLM's own application: what stays of its routes, who may use them, and that the service answers."""

import asyncio
import json
import os
import re
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from factories import random_recommender
from prometheus_client import CollectorRegistry

from llmrec.engine.plugin import INDEX_FOLDER, LAUNCH
from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError
from llmrec.service.errors import ErrorBody
from llmrec.service.limits import Limits
from llmrec.service.settings import ServiceSettings
from llmrec.service.transformers_engine import TransformersEngine

pytest.importorskip("vllm", reason="this environment has no vLLM")

KEY = "a-key-of-tests"
KEPT = {"/docs", "/openapi.json", "/version", "/metrics", "/v1/models"}
OWN = {
    "/health",
    "/ready",
    "/v1/recommend",
    "/v1/search",
    "/v1/score",
    "/v1/catalog",
    "/v1/catalog/items",
    "/v1/users/ann",
    "/v1/users/ann/events",
    "/v1/users/ann/history",
}


class Client:
    """As much of vLLM's EngineClient as the service uses, with transformers behind it."""

    def __init__(self, recommender, artefact, index_folder):
        self.engine = TransformersEngine(recommender.model, index_folder)
        self.model_config = SimpleNamespace(model=str(artefact), max_model_len=128, dtype=recommender.model.dtype)
        self.renderer = self.input_processor = None
        self.errored = False
        self.wrong = 0.0  # added to what single tokens score
        self.delay = 0.0
        self.running = self.cancelled = 0

    async def encode(self, prompt, pooling_params, request_id, lora_request=None):
        parameters = SearchParameters.unpack(pooling_params.extra_kwargs)
        self.running += 1
        try:
            await asyncio.sleep(self.delay)
            found = await self.engine.search(list(prompt["prompt_token_ids"]), parameters)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if not parameters.num_beams:
            found = Found(found.rows, [score + self.wrong for score in found.scores], found.levels, found.seconds)
        yield SimpleNamespace(outputs=SimpleNamespace(data=found.pack(len(found.levels[0]) if found.levels else 0)))

    def shutdown(self, timeout=None):
        self.engine.close()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "tiny"
    recommender = random_recommender(3)
    recommender.save_pretrained(folder)
    return recommender, folder


def application():
    """vLLM's application with everything that it puts there itself, and our plugin as vLLM finds it."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "llmrec,llmrec_http")
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(["--model", "x", "--served-model-name", "served"])
        app = build_app(args, ("embed",), None)
    (plugin,) = app.state.endpoint_plugins
    return app, plugin, args


async def initialise(app, plugin, args, client):
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    paths = [BaseModelPath(name="served", model_path="x")]
    app.state.openai_serving_models = OpenAIServingModels(engine_client=client, base_model_paths=paths)
    app.state.engine_client = client
    await plugin.init_state(client, app.state, args)


@pytest.fixture(scope="module")
def server(artefact, tmp_path_factory):
    """A real server on a thread: its address, its application, and its engine client."""
    recommender, folder = artefact
    index_folder = tmp_path_factory.mktemp("index")
    client = Client(recommender, folder, index_folder)
    app, plugin, args = application()
    before = {(route.path, getattr(route, "methods", None) is None) for route in app.routes}
    settings = ServiceSettings(launch="mine", limits=Limits(max_k=30))
    environment = {INDEX_FOLDER: str(index_folder), "LLMREC_API_KEY": KEY, **settings.environment()}
    found = SimpleNamespace(app=app, client=client, recommender=recommender, before=before, server=None)

    async def run():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            await initialise(app, plugin, args, client)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off")
        found.server = uvicorn.Server(config)
        await found.server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while found.server is None or not found.server.started:
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    found.port = found.server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{found.port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=60.0
    ) as found.http:
        yield found
    found.server.should_exit = True
    thread.join(20)
    client.engine.close()


def test_only_what_a_recommender_needs_stays_of_vllms_routes(server):
    before = {path for path, _ in server.before}
    assert {"/tokenize", "/invocations", "/ping", "/load"} <= before  # else there was nothing to take away
    assert {path_of(route) for route in server.app.router.routes} == KEPT | OWN
    for path in before - KEPT - OWN:
        for method in ("GET", "POST"):
            assert server.http.request(method, path, json={}).status_code == 404, path


def test_every_route_that_stays_needs_the_key(server):
    for route in server.app.router.routes:
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            path = path_of(route)
            answer = httpx.request(method, f"http://127.0.0.1:{server.port}{path}")
            assert answer.status_code == (200 if path == "/health" else 401), (method, path)
    answer = httpx.options(f"http://127.0.0.1:{server.port}/v1/recommend", headers={"Origin": "http://x"})
    assert answer.status_code == 401


def test_answers_are_those_of_the_recommender(server):
    for body in ({"history": ["item-1", "item-2"], "k": 7}, {"text": "red lamp", "k": 3}):
        answer = server.http.post("/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        expected = server.recommender.recommend(**body)
        assert [item["id"] for item in answer.json()["items"]] == [item.item_id for item in expected]
        scores = [item["log_probability"] for item in answer.json()["items"]]
        assert scores == pytest.approx([item.log_probability for item in expected], abs=1e-9)
        assert answer.json()["model"] == "served"


def test_errors_have_our_shape_and_our_statuses_on_vllms_application(server):
    for status, request in (
        (422, {"json": {"history": [], "k": 0}}),
        (422, {"json": {"history": [], "k": 31}}),
        (422, {"json": {"history": ["lost"]}}),
        (400, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
        (413, {"content": b" " * 1_000_001, "headers": {"Content-Type": "application/json"}}),
        (404, {"json": {"history": [], "catalog": "lost"}}),
    ):
        answer = server.http.post("/v1/recommend", **request)
        assert answer.status_code == status, answer.text
        assert ErrorBody.model_validate(answer.json()).error.code == status
        assert len(answer.headers.get_list("X-Request-Id")) == 1
    assert server.http.get("/nowhere").json()["error"]["type"] == "NotFoundError"


def test_ready_models_and_description(server):
    ready = server.http.get("/ready")
    assert (ready.status_code, ready.json()["launch"], ready.json()["items"]) == (200, "mine", 40)
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["served"]
    described = server.http.get("/openapi.json").json()
    assert described["info"]["title"] == "llmrec"
    assert {"/v1/recommend", "/v1/models"} <= set(described["paths"])
    assert "/tokenize" not in described["paths"]
    assert "version" in server.http.get("/version").json()


def test_metrics_are_vllms_and_ours(server):
    server.http.post("/v1/recommend", json={"history": []})
    text = server.http.get("/metrics").text
    assert 'llmrec_requests_total{method="POST",route="/v1/recommend",status="200"}' in text
    assert 'llmrec_catalog_version{catalog="default"' in text
    assert "http_requests_total" in text  # of vLLM's own layer


def test_a_client_that_goes_away_aborts_vllms_request(server):
    content = json.dumps({"history": ["item-1"]}).encode()
    head = (
        f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    server.client.delay = 60.0
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait_for(lambda: server.client.running == 1)
        begin = time.monotonic()
        wait_for(lambda: server.client.cancelled == 1)
        assert time.monotonic() - begin < 1.0
    finally:
        server.client.delay = 0.0
    assert server.http.post("/v1/recommend", json={"history": []}).status_code == 200


def path_of(route):
    """A route's path, with somebody for its user."""
    return re.sub(r"\{user_id[^}]*\}", "ann", route.path)


def wait_for(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def test_an_engine_that_computes_something_else_ends_the_start(artefact, tmp_path, monkeypatch):
    recommender, folder = artefact
    client = Client(recommender, folder, tmp_path)
    client.wrong = 0.5
    monkeypatch.setattr("llmrec.engine.http.REGISTRY", CollectorRegistry())
    monkeypatch.setenv(INDEX_FOLDER, str(tmp_path))
    monkeypatch.setenv(LAUNCH, "other")
    with pytest.raises(EngineError, match="ordinary prefill"):
        asyncio.run(initialise(*application(), client))
    client.engine.close()


def test_a_server_that_was_started_otherwise_is_told_so(artefact, tmp_path, monkeypatch):
    recommender, folder = artefact
    client = Client(recommender, folder, tmp_path)
    monkeypatch.delenv(INDEX_FOLDER, raising=False)
    with pytest.raises(EngineError, match="llmrec serve"):
        asyncio.run(initialise(*application(), client))
    client.engine.close()
    assert INDEX_FOLDER not in os.environ
