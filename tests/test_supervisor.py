"""A server's parent: it restarts, gives up, forwards signals, and the two die together."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmrec.probe import api_key, is_ready
from llmrec.server_log import ServerLog
from llmrec.supervisor import Plan, supervised

# A server of its own kind: it answers /ready with its launch, keeps a child, notes its pid, and ends as it is told to.
SERVER = """
import http.server, json, os, signal, subprocess, sys, threading, time
port, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
child = subprocess.Popen(["sleep", "300"])
with open(folder + "/lives", "a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
if how == "fails":
    print("Traceback (most recent call last):\\n  somewhere")
    print("llmrec.exceptions.EngineError: It is broken. Mend it.", flush=True)
    raise SystemExit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.headers.get("Authorization") == "Bearer secret" or how not in ("locked", "mute")
        body = json.dumps({"ready": True, "launch": "mine"}).encode() if right else b"{}"
        self.send_response(200 if right else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
http.server.HTTPServer.allow_reuse_address = True
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
asked = []
def stop(number, frame):
    print("asked by", signal.Signals(number).name, flush=True)
    asked.append(number)
    if how in ("deaf", "mute"):
        return
    if how == "stubborn" and len(asked) < 2:
        return
    child.terminate()
    os._exit(5 if how == "five" else 0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if how == "leaves":
    threading.Timer(1.0, lambda: os._exit(0)).start()
print("Starting to load model", flush=True)
server.serve_forever()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Supervised:
    """A supervisor over a server of the kind above."""

    def __init__(self, folder, how="well", environment=None, **options):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        plan = Plan(
            command=[sys.executable, "-c", SERVER, str(self.port), str(folder), how],
            url=self.url,
            launch="mine",
            **options,
        )
        with open(folder / "out", "wb") as out:
            self.process = subprocess.Popen(
                supervised(plan), stdout=out, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )

    @property
    def output(self):
        return (self.folder / "out").read_text()

    @property
    def lives(self):
        """Pids of each server that was started, and of its child."""
        file = self.folder / "lives"
        return [tuple(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_until_ready(self):
        assert wait_for(lambda: "ready at" in self.output), self.output

    def everything(self):
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(each.pid for each in family), *(pid for life in self.lives for pid in life)]


@pytest.fixture
def start(tmp_path):
    started = []

    def make(how="well", **options):
        started.append(Supervised(tmp_path, how, **options))
        return started[-1]

    yield make
    for each in started:
        each.process.kill()
        each.process.wait()
        assert wait_for(lambda each=each: not any(alive(pid) for life in each.lives for pid in life))


def test_a_start_is_told_and_a_stop_is_forwarded(start):
    server = start()
    server.wait_until_ready()
    (life,) = server.lives
    server.process.terminate()
    assert server.process.wait(15) == 0
    assert "loading the weights" in server.output
    assert "asked by SIGTERM" in server.output
    assert f"curl {server.url}/v1/recommend" in server.output
    assert wait_for(lambda: not any(map(alive, life)))
    assert len(server.lives) == 1


def test_ctrl_c_reaches_the_server_once_and_its_children_not_at_all(start):
    """The terminal sends it to the whole group; the server is in another."""
    server = start()
    server.wait_until_ready()
    ((pid, child),) = server.lives
    assert os.getpgid(pid) == os.getpgid(child) == pid != os.getpgid(server.process.pid)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(15) == 0
    assert server.output.count("asked by SIGINT") == 1


@pytest.mark.parametrize(("how", "code"), [("five", 5), ("well", 0)])
def test_the_exit_code_is_the_server_s(start, how, code):
    server = start(how)
    server.wait_until_ready()
    server.process.terminate()
    assert server.process.wait(15) == code


def test_a_second_signal_is_forwarded_too(start):
    server = start("stubborn")
    server.wait_until_ready()
    server.process.terminate()
    assert wait_for(lambda: "asked by SIGTERM" in server.output)
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.terminate()
    assert server.process.wait(15) == 0
    assert server.output.count("asked by SIGTERM") == 2


def test_without_supervision_an_end_is_told_and_is_the_end(start):
    server = start("fails")
    assert server.process.wait(15) == 3
    assert "llmrec: It is broken. Mend it." in server.output
    assert len(server.lives) == 1


def test_an_end_that_nobody_asked_for_is_a_failure_whatever_its_code(start):
    server = start("leaves")
    assert server.process.wait(15) == 1


def test_a_killed_server_is_started_again_without_what_it_left_behind(start):
    server = start(restarts=3)
    server.wait_until_ready()
    first, child = server.lives[0]
    os.kill(first, signal.SIGKILL)
    assert wait_for(lambda: len(server.lives) == 2 and is_ready(server.url, launch="mine"))
    assert not alive(first)
    assert not alive(child)
    assert "killed with signal 9" in server.output
    assert "started again in 1 s (1 of 3)" in server.output
    server.process.terminate()
    assert server.process.wait(15) == 0


def test_when_it_has_ended_all_has_ended(start):
    """Also the watchers, so that whoever starts the next server finds its port, memory and folders free."""
    server = start()
    server.wait_until_ready()
    everything = server.everything()
    os.kill(server.lives[0][0], signal.SIGKILL)
    assert server.process.wait(15) == 128 + 9
    assert not any(alive(pid) for pid in everything)


def test_it_gives_up_with_the_log_s_end(start):
    server = start("fails", restarts=1)
    assert server.process.wait(20) == 3
    assert len(server.lives) == 2
    assert "failed 2 times in a row" in server.output
    assert "  Traceback (most recent call last):" in server.output.partition("Its log ends with")[2]


def test_asked_to_stop_between_two_starts_it_stops(start):
    server = start("fails", restarts=9)
    assert wait_for(lambda: "started again in 4 s" in server.output)
    server.process.terminate()
    assert server.process.wait(5) == 0
    assert len(server.lives) == 3


def test_killed_with_9_it_takes_the_server_along(start):
    server = start(restarts=3)
    server.wait_until_ready()
    everything = server.everything()
    assert len(everything) >= 5  # itself, the server, its child, two watchers
    server.process.kill()
    server.process.wait()
    assert wait_for(lambda: not any(map(alive, everything)), 10)
    assert not is_ready(server.url)


@pytest.mark.parametrize("place", [0, 1])
def test_a_killed_watcher_changes_nothing(start, place):
    server = start(restarts=3)
    server.wait_until_ready()
    ((pid, child),) = server.lives
    found = [each for each in psutil.Process(pid).children(recursive=True) if each.pid != child]
    assert len(found) == 2
    found[place].kill()
    time.sleep(1.5)
    assert is_ready(server.url)
    assert len(server.lives) == 1
    everything = server.everything()
    server.process.kill()
    server.process.wait()
    assert wait_for(lambda: not any(map(alive, [*everything, child])), 10)


def test_a_server_that_will_not_stop_is_killed(start, monkeypatch):
    server = start("deaf", drain_seconds=-14.5)  # which leaves half a second of the mercy
    server.wait_until_ready()
    server.process.terminate()
    assert server.process.wait(15) == 128 + 9


def test_one_that_never_was_ready_is_not_waited_for(start):
    server = start("mute")
    assert wait_for(lambda: "loading the weights" in server.output)
    begin = time.monotonic()
    server.process.terminate()
    assert server.process.wait(15) == 0
    assert time.monotonic() - begin < 12  # and not the half minute that answers in flight would get


def test_the_log_goes_where_it_is_wanted(start, tmp_path):
    server = start(quiet=True, log_file=tmp_path / "server.log")
    server.wait_until_ready()
    server.process.terminate()
    assert server.process.wait(15) == 0
    log = (tmp_path / "server.log").read_text()
    assert "Starting to load model" in log
    assert "asked by SIGTERM" in log
    assert "llmrec: ready at" in log
    assert "Starting to load model" not in server.output
    assert "asked by" not in server.output


def test_a_locked_server_is_asked_with_its_key_which_no_command_line_has(start):
    server = start("locked", environment={"LLMREC_API_KEY": "secret"})
    server.wait_until_ready()
    assert '-H "Authorization: Bearer $LLMREC_API_KEY"' in server.output
    lines = [psutil.Process(pid).cmdline() for pid in server.everything() if alive(pid)]
    assert not any("secret" in argument for line in lines for argument in line if argument != SERVER)
    assert "secret" not in server.output
    assert not is_ready(server.url)
    assert is_ready(server.url, "secret")
    assert not is_ready(server.url, "secret", launch="another")


def test_the_key_is_found_where_the_server_finds_it(tmp_path):
    (tmp_path / "keys").write_text("\nfirst\nsecond\n")
    assert api_key({}) == ""
    assert api_key({"LLMREC_API_KEY": " one ", "LLMREC_API_KEY_FILE": "nowhere"}) == "one"
    assert api_key({"LLMREC_API_KEY_FILE": str(tmp_path / "keys")}) == "first"
    assert api_key({"LLMREC_API_KEY_FILE": str(tmp_path / "nowhere")}) == ""


REASONS = [
    (
        "(EngineCore pid=7) ERROR llmrec.exceptions.EngineError: Layer 1 is odd. Use another.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.",
        1,
        "Layer 1 is odd. Use another.",
    ),
    ("OSError: [Errno 98] Address already in use", 1, "Something listens on the server's port already."),
    (
        "(EngineCore pid=7) ERROR 11-21 [core.py:1] ValueError: the root\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
        1,
        "code 1; the last that it said of a cause is: ValueError: the root. Mend",
    ),
    ("\x1b[31mtorch.OutOfMemoryError: CUDA out of memory.\x1b[0m", 1, "ran out of memory. Lower"),
    ("all is well", -9, "signal 9"),
    ("all is well", -11, "signal 11"),
    ("something\nlast words\n\n", 2, "code 2; the last that it said of a cause is: last words."),
    ("", 1, "is: nothing. Mend"),
    ("RuntimeError: Executor failed.\nThe engine has died, and the server with it.", 1, "killed without a word"),
    ("ValueError: the root.\nThe engine has died, and the server with it.", 1, "ValueError: the root. Mend"),
]


@pytest.mark.parametrize(("said", "code", "reason"), REASONS)
def test_the_reason_is_the_root_s(tmp_path, said, code, reason):
    (tmp_path / "log").write_text(said)
    told = ServerLog.of(tmp_path / "log").reason(code)
    assert reason in told
    assert len(told.split(". ")) >= 2


def test_a_plan_survives_its_command_line(monkeypatch):
    from llmrec import supervisor

    found = []
    monkeypatch.setattr(supervisor.Supervisor, "run", lambda self: found.append(self._plan) or 0)
    plan = Plan(["a", "--", "b"], "http://x", 3, 2.5, True, None, "mine", 17.25)
    assert supervisor.main(supervised(plan)[3:]) == 0
    assert found == [plan]
    assert json.dumps(found[0].url) == '"http://x"'


@pytest.mark.parametrize("said", [b"not http at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b""])
def test_what_answers_no_http_is_not_ready_and_no_error(said):
    """One that dies while it answers, or another program on the port: the parent must not end of it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(said)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert is_ready(f"http://127.0.0.1:{listening.getsockname()[1]}", launch="mine") is False
        thread.join()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_does_not_stop_the_log_from_being_read(capfdbinary):
    """Nobody reading, the server would stand still as soon as the pipe is full."""
    log = ServerLog(file=Path("/dev/full"))
    log.copy(io.BytesIO(b"Starting to load model\n" * 3 + b"the last\n"))
    log.say("something")
    assert log.end()[-1] == "the last"
    out = capfdbinary.readouterr().out
    assert out.count(b"the log file lacks lines") == 1
    assert b"the last" in out


def test_a_log_file_that_cannot_be_opened_any_more_is_done_without(tmp_path, capfdbinary):
    log = ServerLog(file=tmp_path / "gone" / "log")
    log.copy(io.BytesIO(b"the last\n"))
    log.say("something")
    assert log.end() == ["the last"]
    assert capfdbinary.readouterr().out.count(b"lacks lines") == 1
