"""What lies in serve/ for deploying: it parses, agrees with the code, and real nginx does what its file promises."""

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from inspect import signature
from pathlib import Path

import httpx
import pytest
import typer
import yaml

from llmrec.cli.main import app
from llmrec.cli.serve import serve
from llmrec.engine.launch import HISTORY_STORE
from llmrec.service.drain import DEFAULT_DRAIN_SECONDS, END_SECONDS
from llmrec.service.keys import KEY, KEY_FILE
from llmrec.service.limits import Limits

SERVE = Path(__file__).resolve().parents[2] / "serve"
NAMES = {KEY, KEY_FILE, HISTORY_STORE}
# What compose's own file reads from whoever starts it.
COMPOSE_NAMES = {"LLMREC_ARTEFACT", "LLMREC_THREADS"}


def text_of(name):
    return (SERVE / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load(text_of("compose.yaml"))


@pytest.fixture(scope="module")
def kubernetes():
    return {document["kind"]: document for document in yaml.safe_load_all(text_of("kubernetes.yaml"))}


def flags(words):
    return {word for word in words if word.startswith("--")}


def known_flags():
    command = typer.main.get_command(app).commands["serve"]
    return {option for parameter in command.params for option in parameter.opts}


def drain_of(words):
    return float(words[words.index("--drain-seconds") + 1])


def seconds(text):
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "kubernetes.yaml"])
def test_variables_and_modules_are_the_code_s(name):
    text = text_of(name)
    assert set(re.findall(r"LLMREC_[A-Z_]+", text)) <= NAMES | COMPOSE_NAMES
    for module in re.findall(r'"-m", "(llmrec[\w.]*)"', text):
        assert (SERVE.parent / f"{module.replace('.', '/')}.py").is_file()


def test_compose_runs_two_replicas_that_stop_in_time(compose):
    for name in ("llmrec-1", "llmrec-2"):
        service = compose["services"][name]
        command = service["entrypoint"][-1].split()
        assert flags(command) <= known_flags()
        assert seconds(service["stop_grace_period"]) > drain_of(command) + 2 * END_SECONDS
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert service["healthcheck"]["test"][-1].endswith(f":{command[command.index('--port') + 1]}/ready")
        assert all(":ro" in volume for volume in service["volumes"])
    assert set(compose["services"]["nginx"]["depends_on"]) == {"llmrec-1", "llmrec-2"}


def test_compose_has_no_secret_and_shows_none_outside(compose):
    assert {key: secret["file"] for key, secret in compose["secrets"].items()} == {
        "api_keys": "./secrets/api_keys.txt",
        "redis_password": "./secrets/redis_password.txt",
    }
    for name, service in compose["services"].items():
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
        assert service["cap_drop"] == ["ALL"]
        if name != "nginx":
            assert "ports" not in service  # nobody but nginx is reached from outside
            assert service["networks"] == ["inside"]
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["nginx"]["ports"])
    assert compose["networks"]["inside"]["internal"]


def test_the_shells_of_compose_are_right(compose, tmp_path):
    """Run by a real shell: the password gets where it should, and onto no command line."""
    (tmp_path / "redis_password").write_text("s3cret\n")
    for name in ("llmrec", "redis-server"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "arguments: $*"\necho "store: $LLMREC_HISTORY_STORE"\n{_CAT[name]}\n')
        program.chmod(0o755)
    for service, expected in (("llmrec-1", "store: redis://:s3cret@redis:6379/0"), ("redis", "requirepass s3cret")):
        script = compose["services"][service]["entrypoint"][-1].replace("$$", "$")
        script = script.replace("/run/secrets", str(tmp_path))
        done = subprocess.run(
            ["/bin/sh", "-c", script],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in done.stdout.splitlines()
        assert "s3cret" not in done.stdout.splitlines()[0]


_CAT = {"llmrec": "", "redis-server": "cat"}


def test_kubernetes_probes_ports_and_times_agree(kubernetes):
    pod = kubernetes["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert flags(container["args"]) <= known_flags()
    port = int(container["args"][container["args"].index("--port") + 1])
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert container["startupProbe"]["httpGet"] == container["livenessProbe"]["httpGet"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["readinessProbe"]["exec"]["command"][-1] == f"http://127.0.0.1:{port}/ready"
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    needed = pause + drain_of(container["args"]) + 2 * END_SECONDS
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed
    labels = pod["metadata"]["labels"]
    assert kubernetes["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes["Service"]["spec"]["selector"] == labels
    assert kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_the_image_runs_as_nobody_in_particular_and_stops_politely():
    text = text_of("Dockerfile")
    final = text.rpartition("FROM ")[2]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", final, re.MULTILINE)
    assert "/health" in final.partition("HEALTHCHECK")[2].partition("\n")[2].partition("\n")[0]
    (entry,) = re.findall(r'^ENTRYPOINT \["llmrec", "(\w+)"\]$', final, re.MULTILINE)
    assert entry in typer.main.get_command(app).commands
    arguments = re.findall(r'"([^"]+)"', re.search(r"^CMD (.+)$", final, re.MULTILINE)[1])
    assert flags(arguments) <= known_flags()
    assert "serve/secrets" in text_of("Dockerfile.dockerignore").splitlines()


def test_nginx_lets_through_as_much_as_the_servers_take():
    text = text_of("nginx.conf")
    assert int(re.search(r"client_max_body_size (\d+)m;", text)[1]) * 2**20 >= Limits().max_body_bytes
    assert float(re.search(r"proxy_read_timeout (\d+)s;", text)[1]) > Limits().deadline_ms / 1000
    # A connection that nginx keeps must not be one that a server has just closed.
    assert float(re.search(r"keepalive 64;\s+keepalive_timeout (\d+)s;", text)[1]) < 30


def test_the_script_has_every_flag_of_the_command():
    spec = importlib.util.spec_from_file_location("serve_script", SERVE / "server.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_script"] = module
    spec.loader.exec_module(module)
    assert set(module.ServeArguments.__dataclass_fields__) == set(signature(serve).parameters)
    drain = signature(serve).parameters["drain_seconds"].default
    assert drain == DEFAULT_DRAIN_SECONDS == module.ServeArguments.__dataclass_fields__["drain_seconds"].default
    recipes = [each for each in (SERVE / "recipes").glob("*.yaml") if "serve/server.py" in each.read_text()]
    assert {recipe.stem for recipe in recipes} >= {"cpu", "gpu", "transformers", "replica"}
    for recipe in recipes:
        assert set(yaml.safe_load(recipe.read_text())) <= set(module.ServeArguments.__dataclass_fields__)


# -- real nginx ------------------------------------------------------------------------------------------------------

REPLICA = """
import asyncio, sys
from types import SimpleNamespace
import uvicorn
from fastapi import FastAPI, Request, Response
from llmrec.service.drain import DrainingServer
port, name = int(sys.argv[1]), sys.argv[2]
app = FastAPI()
service = SimpleNamespace(draining=False, in_flight=0)

@app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
async def work(path: str, request: Request):
    if service.draining:
        return Response(status_code=503, headers={"Retry-After": "1"})
    service.in_flight += 1
    try:
        await asyncio.sleep(0.05)
        return {"by": name, "path": path, "got": len(await request.body())}
    finally:
        service.in_flight -= 1

config = uvicorn.Config(app, port=port, lifespan="off", log_config=None, timeout_keep_alive=30)
DrainingServer(config, service, 20.0).run()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Two replicas behind nginx."""

    def __init__(self, folder):
        self.ports = {"one": free_port(), "two": free_port()}
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.replicas = {}
        for name in self.ports:
            self.start(name)
        text = text_of("nginx.conf").replace("/tmp/", f"{folder}/").replace("/dev/stdout", f"{folder}/access.log")
        text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace(
            "worker_processes auto", "worker_processes 2"
        )
        for number, name in enumerate(self.ports, start=1):
            assert f"llmrec-{number}:8000" in text
            text = text.replace(f"llmrec-{number}:8000", f"127.0.0.1:{self.ports[name]}")
        (folder / "nginx.conf").write_text(text)
        # Where nginx is root it becomes nobody, who must be able to write there.
        folder.chmod(0o777)
        arguments = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
        self.tested = subprocess.run([*arguments, "-t"], capture_output=True, text=True, check=False)
        self.nginx = subprocess.Popen([*arguments, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
        self.wait_for(f"{self.url}/health")

    def start(self, name):
        self.replicas[name] = subprocess.Popen([sys.executable, "-c", REPLICA, str(self.ports[name]), name])
        self.wait_for(f"http://127.0.0.1:{self.ports[name]}/up")

    def wait_for(self, url):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(url, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError(f"{url} does not answer")

    def close(self):
        for process in (self.nginx, *self.replicas.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def cluster():
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    # pytest's own folders are this user's alone, and nginx's workers are nobody.
    with tempfile.TemporaryDirectory() as folder:
        made = Cluster(Path(folder))
        yield made
        made.close()


def test_nginx_takes_its_file(cluster):
    assert cluster.tested.returncode == 0, cluster.tested.stderr
    assert "warn" not in cluster.tested.stderr


class Load:
    """Clients that ask again and again, each on a connection of its own, and note what they get."""

    def __init__(self, url, clients=8):
        self.answers, self.stopped = [], threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(url,)) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def ask(self, url):
        with httpx.Client(trust_env=False, timeout=30.0) as client:
            while not self.stopped.is_set():
                try:
                    answer = client.post(f"{url}/v1/recommend", json={"history": ["a"]})
                    self.answers.append((answer.status_code, answer.json().get("by") if answer.is_success else None))
                except httpx.HTTPError as error:
                    self.answers.append((0, repr(error)))
                time.sleep(0.02)

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        return self.answers


def test_replicas_are_restarted_one_after_the_other_without_one_failed_request(cluster):
    load = Load(cluster.url)
    time.sleep(1.0)
    for name in cluster.ports:
        before = len(load.answers)
        cluster.replicas[name].terminate()
        assert cluster.replicas[name].wait(15) == 0
        time.sleep(0.7)
        during = load.answers[before:]
        cluster.start(name)
        assert len({by for _, by in during[-20:]}) == 1  # the other one did it all
        deadline = time.monotonic() + 15  # nginx tries it again after fail_timeout
        while {by for _, by in load.answers[-40:]} != {"one", "two"}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    answers = load.stop()
    assert len(answers) > 200
    assert [answer for answer in answers if answer[0] != 200] == []


def test_a_replica_that_is_killed_costs_no_request_that_changes_nothing(cluster):
    load = Load(cluster.url)
    time.sleep(0.5)
    cluster.replicas["two"].kill()
    cluster.replicas["two"].wait()
    time.sleep(1.0)
    answers = load.stop()
    cluster.start("two")
    assert len(answers) > 50
    assert [answer for answer in answers if answer[0] != 200] == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/recommend", 200),
        ("POST", "/v1/users/u/events", 200),
        ("GET", "/v1/catalog", 200),
        ("PUT", "/v1/catalog", 403),
        ("GET", "/metrics", 404),
        ("GET", "/ready", 404),
        ("GET", "/docs", 404),
        ("GET", "/health", 200),
    ],
)
def test_what_is_public(cluster, method, path, status):
    assert httpx.request(method, f"{cluster.url}{path}", trust_env=False).status_code == status


def test_a_body_over_a_mebibyte_is_refused_before_it_reaches_a_server(cluster):
    answer = httpx.post(f"{cluster.url}/v1/recommend", content=b"x" * (2**20 + 1), trust_env=False)
    assert answer.status_code == 413
    assert httpx.post(f"{cluster.url}/v1/recommend", content=b"x" * 10**6, trust_env=False).json()["got"] == 10**6
