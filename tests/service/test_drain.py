"""A polite end: what is in flight is answered, what is new is refused, and the process ends within its limit."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from llmrec.service import drain as draining
from llmrec.service.drain import Drain, install

# A service whose answers take as long as they are asked to; behind uvicorn, or behind a launcher that does what vLLM's
# does: its own handlers after `install`, `engine_client.shutdown` on a thread, and only then the HTTP server's end.
SERVER = """
import asyncio, logging, signal, sys, threading, time
from types import SimpleNamespace
import uvicorn
from fastapi import FastAPI, Response
from llmrec.service.drain import DrainingServer, install
kind, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
logging.basicConfig(level=logging.INFO, format="%(message)s")
app = FastAPI()
service = SimpleNamespace(draining=False, in_flight=0)

@app.get("/ready")
async def ready():
    return Response(status_code=503 if service.draining else 200)

@app.get("/work")
async def work(seconds: float):
    if service.draining:
        return Response(status_code=503, headers={"Retry-After": "1"})
    service.in_flight += 1
    try:
        await asyncio.sleep(seconds)
        return {"done": True}
    finally:
        service.in_flight -= 1

class Engine:
    errored = False
    def shutdown(self, timeout=None):
        print("engine is shut down", timeout, flush=True)

engine = Engine()

@app.get("/break")
async def break_it():
    engine.errored = True

async def like_vllm():
    config = uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_config=None)
    install(engine, service, seconds, app.state)
    server = uvicorn.Server(config)
    server.capture_signals = __import__("contextlib").nullcontext
    app.state.server = server
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    task = loop.create_task(server.serve())
    async def stop():
        await asked.wait()
        await loop.run_in_executor(None, lambda: engine.shutdown(timeout=0))
        server.should_exit = True
        task.cancel()
    stopping = loop.create_task(stop())
    try:
        await task
    except asyncio.CancelledError:
        engine.shutdown(timeout=0)
        await server.shutdown()

if kind == "uvicorn":
    config = uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_config=None)
    DrainingServer(config, service, seconds).run()
else:
    asyncio.run(like_vllm())
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """A server of the kind above, in a process of its own."""

    def __init__(self, kind, seconds):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, kind, str(port), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        self.pool = ThreadPoolExecutor(8)
        deadline = time.monotonic() + 30
        while self.status("/ready") != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.status("/ready") == 200

    def status(self, path):
        try:
            return httpx.get(f"{self.url}{path}", timeout=30.0, trust_env=False).status_code
        except httpx.HTTPError:
            return None

    def work(self, seconds):
        future = self.pool.submit(self.status, f"/work?seconds={seconds}")
        time.sleep(0.4)
        assert not future.done()
        return future


@pytest.fixture(params=["uvicorn", "vllm"])
def start(request):
    started = []

    def make(seconds=20.0):
        started.append(Running(request.param, seconds))
        return started[-1]

    yield make
    for each in started:
        each.process.kill()
        each.process.wait()
        each.process.stdout.close()
        each.pool.shutdown()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_in_flight_is_answered_and_what_is_new_is_refused(start, number):
    server = start()
    answers = [server.work(1.5) for _ in range(3)]
    server.process.send_signal(number)
    time.sleep(0.3)
    assert server.status("/ready") == 503
    refused = httpx.get(f"{server.url}/work?seconds=0", timeout=30.0, trust_env=False)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    assert [answer.result() for answer in answers] == [200, 200, 200]
    assert server.process.wait(10) == 0
    assert server.status("/ready") is None


def test_with_nothing_in_flight_it_ends_at_once(start):
    server = start()
    begin = time.monotonic()
    server.process.terminate()
    assert server.process.wait(10) == 0
    assert time.monotonic() - begin < 5


def test_a_second_signal_ends_it_early(start):
    server = start(60.0)
    answer = server.work(20)
    server.process.terminate()
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.terminate()
    server.process.wait(10)
    assert answer.result() != 200


def test_the_limit_ends_it(start):
    server = start(1.0)
    answer = server.work(25)
    begin = time.monotonic()
    server.process.terminate()
    server.process.wait(10)
    assert 0.9 < time.monotonic() - begin < 8
    assert answer.result() != 200


@pytest.mark.parametrize("start", ["vllm"], indirect=True)
def test_the_engine_is_shut_down_after_the_last_answer(start):
    server = start()
    answer = server.work(1.2)
    server.process.terminate()
    assert answer.result() == 200
    assert server.process.wait(10) == 0
    assert server.process.stdout.readline() == f"engine is shut down {draining.END_SECONDS}\n"


@pytest.mark.parametrize("start", ["vllm"], indirect=True)
def test_a_dead_engine_ends_the_process_with_a_code_that_tells(start):
    server = start()
    assert server.status("/break") == 200
    assert server.process.wait(10) == 1


def test_the_backstop_ends_a_process_that_hangs(tmp_path):
    program = (
        "import time, types\nfrom llmrec.service import drain\n"
        "drain.END_SECONDS = 0.2\n"
        "drain.Drain(types.SimpleNamespace(draining=False, in_flight=1), 0.1).begin()\n"
        "time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 1


def test_a_drain_is_done_when_nothing_is_in_flight_or_it_is_hurried_or_late(monkeypatch):
    monkeypatch.setattr(draining, "_after", lambda seconds, reason: None)
    service = SimpleNamespace(draining=False, in_flight=2)
    drain = Drain(service, 60.0)
    assert not drain.begun
    assert not drain.done
    drain.begin()
    assert service.draining
    assert drain.begun
    assert not drain.done
    service.in_flight = 0
    assert drain.done
    assert drain.patience == draining.END_SECONDS
    service.in_flight = 1
    assert not drain.done
    drain.begin()
    assert drain.done
    assert drain.patience == 0.0
    late = Drain(service, 0.0)
    late.begin()
    assert late.done


def test_on_the_event_loop_shutdown_does_not_wait(monkeypatch):
    """There it is called when a start fails; whoever is in flight could not be answered while it waits."""
    monkeypatch.setattr(draining, "_after", lambda seconds, reason: None)
    service = SimpleNamespace(draining=False, in_flight=1)
    given = []

    async def start_and_fail():
        engine = SimpleNamespace(errored=False, shutdown=lambda timeout=None: given.append(timeout))
        install(engine, service, 60.0)
        engine.shutdown(timeout=3)

    asyncio.run(asyncio.wait_for(start_and_fail(), 10))
    assert given == [3]
    assert not service.draining
