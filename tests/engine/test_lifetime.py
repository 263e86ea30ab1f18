"""`llmrec serve` as a whole, with real engines: whatever is killed, nothing stays behind and the server comes back."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import torch
from factories import random_recommender

from llmrec.probe import is_ready

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-tests"
VLLM = ("--kv-cache-gib", "1", "--max-num-seqs", "16")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifetime") / "artefact"
    made = random_recommender(7, "llama", 300, (16, 16, 16), dtype=torch.float32, max_history=20, max_positions=256)
    made.save_pretrained(folder)
    return folder


class Serving:
    """`llmrec serve` in a process of its own."""

    def __init__(self, artefact, log, *options):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", "from llmrec.cli.main import main; main()", "serve", str(artefact)]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LLMREC_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
            )

    def wait_until_ready(self, seconds=400):
        assert wait_for(lambda: self.ready or self.process.poll() is not None, seconds), self.said
        assert self.process.poll() is None, self.said

    @property
    def ready(self):
        return is_ready(self.url, KEY, timeout=2.0)

    @property
    def said(self):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    def family(self):
        """The supervisor, the server, the watchers, and the engine's processes."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def server(self):
        return next(each for each in psutil.Process(self.process.pid).children())

    def connections(self):
        return sum(each.status == psutil.CONN_ESTABLISHED for each in self.server().net_connections("tcp"))

    def recommend(self, **body):
        header = {"Authorization": f"Bearer {KEY}"}
        body = {"history": ["item-1"], "k": 5} | body
        return httpx.post(f"{self.url}/v1/recommend", json=body, headers=header, timeout=60.0, trust_env=False)

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def assert_gone(family):
    assert wait_for(lambda: not any(map(alive, family)), 10), [each for each in family if alive(each)]


@pytest.fixture
def serving(artefact, tmp_path):
    started = []

    def start(*options):
        started.append(Serving(artefact, tmp_path / f"server-{len(started)}.log", *options))
        started[-1].wait_until_ready()
        return started[-1]

    yield start
    for each in started:
        family = each.family() if each.process.poll() is None else []
        each.end()
        assert_gone(family)


def assert_drains(server):
    """Under load every answer is a recommendation or a refusal that says when to ask again; the exit code is 0."""
    family = server.family()
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(server.recommend, num_beams=256, k=200) for _ in range(16)]
        # All have come in, and few have been answered. One that comes after the end finds nobody, and rightly so.
        assert wait_for(lambda: server.connections() + sum(answer.done() for answer in answers) >= len(answers), 30)
        server.process.terminate()
        codes = []
        for answer in answers:
            found = answer.result()
            codes.append(found.status_code)
            if found.status_code == 503:
                assert int(found.headers["Retry-After"]) >= 1
            else:
                assert len(found.json()["items"]) == 200
        assert set(codes) <= {200, 503}
        assert 200 in codes
        assert server.process.wait(45) == 0
    assert_gone(family)
    assert not server.ready


def test_transformers_answers_what_it_has_and_ends(serving):
    server = serving("--backend", "transformers")
    assert server.recommend().status_code == 200
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert httpx.get(f"{server.url}/ready", trust_env=False).status_code == 401
    assert_drains(server)
    assert "ready at" in server.said


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSEGV])
def test_transformers_killed_comes_back(serving, signal_number):
    server = serving("--backend", "transformers", "--supervise")
    family = server.family()[1:]
    killed = server.server()
    killed.send_signal(signal_number)
    assert_gone(family)
    assert server.process.poll() is None
    server.wait_until_ready(90)
    assert server.server() != killed
    assert server.recommend().status_code == 200


def test_transformers_goes_with_its_supervisor(serving):
    server = serving("--backend", "transformers", "--supervise")
    family = server.family()
    assert len(family) >= 4
    server.process.kill()
    server.process.wait()
    assert_gone(family)
    assert not server.ready


def test_vllm_answers_what_it_has_and_ends(serving):
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    server = serving(*VLLM)
    assert server.recommend().status_code == 200
    assert httpx.post(f"{server.url}/invocations", json={}, trust_env=False).status_code == 401
    assert_drains(server)


def test_vllm_whatever_is_killed(serving):
    """One server after another in the place of the one that was killed.

    The server itself is the last: that a killed one comes back is shown with transformers, in a tenth of the time.
    """
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    server = serving("--supervise", *VLLM)
    for kind in ("VLLM::Worker", "VLLM::EngineCore", "server"):
        before = server.server()
        family = server.family()[1:]
        engine = [each for each in family if any(kind in part for part in each.cmdline())]
        killed = before if kind == "server" else engine[0]
        killed.kill()
        # The supervisor knows by the server's end, which so has to be told by the engine's.
        assert wait_for(lambda before=before: not alive(before), 10), server.said
        assert not server.ready
        assert_gone(family)
        assert server.process.poll() is None
        if kind == "server":
            return
        server.wait_until_ready()
        assert server.server() != before
        assert server.recommend().status_code == 200
