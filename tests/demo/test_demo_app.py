"""The page as an HTTP server: what it answers, to whom, and how the command starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from factories import random_recommender

from llmrec.cli.demo import demo
from llmrec.demo import app as module
from llmrec.demo.app import build_page, serve_page
from llmrec.demo.servers import Target
from llmrec.exceptions import ArtefactError, DependencyError, EngineError, RequestError

pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def client():
    from starlette.testclient import TestClient

    with TestClient(build_page(Target("http://127.0.0.1:9")), base_url="http://127.0.0.1") as client:
        yield client


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert config.get("stylesheets", []) == []
    assert config["footer_links"] == []
    assert "googleapis" not in client.get("/theme.css").text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/info"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/login"),
        ("GET", "/monitoring"),
    ],
)
def test_parts_that_the_page_does_not_need_are_not_there(client, method, path):
    assert client.request(method, path, files={"files": b"x"} if method == "POST" else None).status_code == 404


def test_a_foreign_name_is_not_answered_on_this_machine_s_address(client):
    assert client.get("/", headers={"Host": "localhost:7860"}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_elsewhere_any_name_is_answered():
    from starlette.testclient import TestClient

    page = build_page(Target("http://127.0.0.1:9"), host="0.0.0.0")
    with TestClient(page, base_url="http://some.where") as client:
        assert client.get("/").status_code == 200


def test_gradio_s_variables_change_nothing(monkeypatch):
    from starlette.testclient import TestClient

    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_SHARE", "GRADIO_RUN_HISTORY", "GRADIO_MCP_SERVER"):
        monkeypatch.setenv(name, "True")
    with TestClient(build_page(Target("http://127.0.0.1:9")), base_url="http://127.0.0.1") as client:
        config = client.get("/config").json()
        assert config["analytics_enabled"] is False
        assert config["run_history"] is False
        assert client.get("/gradio_api/mcp/").status_code == 404


def test_without_gradio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DependencyError, match=r"llmrec\[demo\]"):
        build_page(Target("http://127.0.0.1:9"))


def test_a_taken_port_is_an_error_in_words():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve_page(None, "127.0.0.1", port)  # type: ignore[arg-type]


@pytest.fixture
def built(monkeypatch):
    """What the command builds and serves, without serving it."""
    found: dict[str, object] = {}

    def build(first, second=None, host="127.0.0.1"):
        found.update(first=first, second=second, built_for=host)
        return "page"

    monkeypatch.setattr(module, "build_page", build)
    monkeypatch.setattr(module, "serve_page", lambda page, host, port: found.update(page=page, host=host, port=port))
    return found


def key_of(target):
    return target.client._headers.get("Authorization")


def test_the_command_gives_each_server_its_own_key(built, monkeypatch, capsys):
    monkeypatch.setenv("LLMREC_API_KEY", "first-secret")
    monkeypatch.setenv("LLMREC_COMPARE_API_KEY", "second-secret")
    demo(url="http://127.0.0.1:1", compare="http://127.0.0.1:2")
    assert (key_of(built["first"]), key_of(built["second"])) == ("Bearer first-secret", "Bearer second-secret")
    assert (built["host"], built["built_for"], built["port"]) == ("127.0.0.1", "127.0.0.1", 7860)
    monkeypatch.delenv("LLMREC_COMPARE_API_KEY")
    demo(url="http://127.0.0.1:1", compare="http://127.0.0.1:2")
    assert key_of(built["second"]) is None
    said = capsys.readouterr().out
    assert "http://127.0.0.1:7860" in said
    assert "secret" not in said
    assert "Warning" not in said


def test_the_command_s_defaults_and_warnings(built, monkeypatch, capsys):
    monkeypatch.delenv("LLMREC_API_KEY", raising=False)
    demo()
    assert built["first"].name == "http://127.0.0.1:8000"
    assert built["second"] is None
    assert key_of(built["first"]) is None
    demo(host="0.0.0.0", port=1234)
    assert built["built_for"] == "0.0.0.0"
    assert "no password" in capsys.readouterr().out


def test_the_command_refuses_what_has_no_sense(tmp_path):
    with pytest.raises(RequestError, match="Both"):
        demo(url="http://127.0.0.1:1", artefact="folder")
    with pytest.raises(RequestError):
        demo(url="nowhere")
    with pytest.raises(ArtefactError):
        demo(artefact=str(tmp_path))


@contextmanager
def started(checkout, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The script as a user starts it, and where its page is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(checkout / "serve" / "demo.py"), *flags, "--port", str(port)]
    with subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            end = time.monotonic() + 150
            while True:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end
                try:
                    httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.slow
def test_the_script_starts_a_server_of_its_own_and_ends_with_it(checkout, tmp_path):
    import psutil

    random_recommender(1).save_pretrained(tmp_path / "model")
    with started(checkout, "--artefact", str(tmp_path / "model"), "--backend", "transformers") as (process, url):
        assert "<gradio-app" in httpx.get(url, trust_env=False).text
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=40)
        assert f"is at {url}" in said
        assert "Traceback" not in said
    psutil.wait_procs(children, timeout=15)
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_the_script_s_errors_are_one_line(checkout):
    command = [sys.executable, "serve/demo.py", "--url", "http://127.0.0.1:1", "--artefact", "x"]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"}
    )
    assert done.returncode == 1
    assert "error: Both the server" in done.stderr
    assert "Traceback" not in done.stderr
