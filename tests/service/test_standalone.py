"""A server of its own: started on a thread or as a process, asked over a real socket, ended by a signal."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from factories import random_recommender
from played_engine import KEY, make_world

from llmrec.exceptions import EngineError
from llmrec.service.limits import Limits
from llmrec.service.settings import ServiceSettings
from llmrec.service.standalone import serve, serve_standalone

SERVER = """
import logging, os, sys
from pathlib import Path
from llmrec.service.keys import Keys
from llmrec.service.settings import ServiceSettings
from llmrec.service.standalone import serve_standalone
logging.basicConfig(level=logging.INFO)
serve_standalone(Path(sys.argv[1]), port=int(sys.argv[2]), settings=ServiceSettings.from_environment(os.environ),
    keys=Keys.from_environment(os.environ), device="cpu")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "tiny"
    random_recommender(3).save_pretrained(folder)
    return folder


def test_a_whole_server_from_start_to_end(artefact, tmp_path):
    settings = ServiceSettings(
        catalogs={"main": str(artefact), "again": str(artefact / "catalog")},
        history_store=f"sqlite:{tmp_path}/histories.db",
        launch="mine",
        limits=Limits(max_k=20, max_rows_running=512),
    )
    port = free_port()
    environment = os.environ | settings.environment() | {"LLMREC_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, str(artefact), str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}) as client:
            end = time.monotonic() + 240
            while True:
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < end
                try:
                    ready = client.get("/ready")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            assert (ready.status_code, ready.json()["launch"]) == (200, "mine")
            assert set(ready.json()["catalogs"]) == {"main", "again"}
            answer = client.post("/v1/recommend", json={"history": ["item-1"], "k": 5, "catalog": "again"})
            assert [item["rank"] for item in answer.json()["items"]] == [1, 2, 3, 4, 5]
            assert (answer.json()["model"], answer.json()["catalog"]) == ("tiny", "again")
            events = {"events": [{"item": "item-1"}]}
            assert client.post("/v1/users/ann/events", json=events).status_code == 204
            stored = client.post("/v1/recommend", json={"user_id": "ann", "k": 5})
            assert stored.json()["items"] == answer.json()["items"]
            assert client.post("/v1/recommend", json={"history": [], "k": 21}).status_code == 422
            assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert KEY not in process.stdout.read().decode()


def test_a_port_that_is_taken_is_an_error(tmp_path):
    service = make_world(tmp_path).service()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match="cannot be used"):
            asyncio.run(serve(service, "127.0.0.1", taken.getsockname()[1]))
    assert service.readiness._task is None


def test_a_limit_that_does_not_fit_ends_the_start_and_its_thread(artefact):
    before = {thread.name for thread in threading.enumerate()}
    settings = ServiceSettings(limits=Limits(max_beams=5))
    with pytest.raises(ValueError, match="searches with 10 beams"):
        serve_standalone(artefact, port=free_port(), settings=settings, device="cpu")
    assert {thread.name for thread in threading.enumerate()} <= before | {"llmrec-pages_0"}
