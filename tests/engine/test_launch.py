"""The command line and environment of a server, and what `llmrec serve` makes of its options; nothing is started."""

import json
import os
import re
import socket
import sys

import pytest
import torch
from factories import random_recommender

from llmrec.cli import serve as serving
from llmrec.engine import launch
from llmrec.engine.launch import HISTORY_STORE, check_port, server_command
from llmrec.engine.plugin import CATALOG_VERSION, INDEX, INDEX_FOLDER, MAX_BEAMS
from llmrec.exceptions import ArtefactError, EngineError, RequestError
from llmrec.service.index_files import IndexFiles
from llmrec.service.limits import Limits
from llmrec.service.settings import ServiceSettings

SECRET = "redis://:s3cret@localhost:6379/0"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch") / "artefact"
    random_recommender(3, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())  # as if vLLM were there
    for name in ("LLMREC_API_KEY", "LLMREC_API_KEY_FILE", "VLLM_API_KEY", HISTORY_STORE, INDEX_FOLDER):
        monkeypatch.delenv(name, raising=False)


def value(command, flag):
    (place,) = [number for number, word in enumerate(command) if word == flag]
    return command[place + 1]


def test_what_is_asked_for_reaches_the_server(artefact):
    command, environment = server_command(
        artefact,
        port=8123,
        max_num_seqs=7,
        max_beams=99,
        limits=Limits(max_k=50, deadline_ms=1_234),
        drain_seconds=12.5,
        catalogs={"books": "a", "music": "b"},
        history_store="memory:",
        index_folder="somewhere",
        tensor_parallel_size=2,
        data_parallel_size=3,
        launch="mine",
        extra=["--seed", "5"],
    )
    assert command[: len(launch._FIRST) + 2] == [*launch._FIRST, "vllm", str(artefact)]
    for flag, said in {
        "--port": "8123",
        "--max-num-seqs": "7",
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "3",
        "--shutdown-timeout": "13",
        "--dtype": "float32",
        "--seed": "5",
    }.items():
        assert value(command, flag) == said
    settings = ServiceSettings.from_environment(environment)
    assert settings.limits == Limits(max_k=50, max_beams=99, deadline_ms=1_234)
    assert list(settings.catalogs.items()) == [("books", "a"), ("music", "b")]
    assert (settings.drain_seconds, settings.history_store, settings.launch) == (12.5, "memory:", "mine")
    assert settings.model == "artefact"
    assert environment[INDEX_FOLDER] == "somewhere"
    assert environment[MAX_BEAMS] == "99"
    assert int(environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 20  # what nginx.conf keeps a connection for


def test_adapters_become_vllm_s_arguments(artefact, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8}))
    command, _ = server_command(artefact, adapters={"mild": tmp_path})
    assert value(command, "--max-loras") == "2"  # one more than there are
    assert json.loads(value(command, "--lora-modules")) == {"name": "mild", "path": str(tmp_path)}
    with pytest.raises(ArtefactError):
        server_command(artefact, adapters={"mild": tmp_path / "nowhere"})


def test_transformers_needs_no_vllm(artefact, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    command, environment = server_command(artefact, backend="transformers", port=9, dtype="bfloat16")
    assert command == [*launch._FIRST, "transformers", str(artefact), "127.0.0.1", "9", "bfloat16"]
    assert ServiceSettings.from_environment(environment).model == "artefact"
    with pytest.raises(ImportError, match="vLLM is not installed"):
        server_command(artefact)


@pytest.mark.parametrize(
    "options",
    [{"extra": ["--seed", "1"]}, {"tensor_parallel_size": 2}, {"data_parallel_size": 2}, {"index_folder": "x"}],
)
def test_transformers_takes_nothing_of_vllm_s(artefact, options):
    with pytest.raises(RequestError, match="transformers"):
        server_command(artefact, backend="transformers", **options)


@pytest.mark.parametrize("argument", ["--api-key", "--api-key=s3cret", "--api_key", "--api-k"])
def test_a_key_of_vllm_s_own_is_refused(artefact, argument, monkeypatch):
    with pytest.raises(EngineError, match="LLMREC_API_KEY") as error:
        server_command(artefact, extra=[argument, "s3cret"])
    assert "s3cret" not in str(error.value)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with pytest.raises(EngineError, match="LLMREC_API_KEY"):
        server_command(artefact)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_secrets_are_in_no_command_line(artefact, backend, monkeypatch):
    monkeypatch.setenv(HISTORY_STORE, SECRET)
    command, environment = server_command(artefact, backend=backend)
    assert "s3cret" not in " ".join(command)
    assert ServiceSettings.from_environment(environment).history_store == SECRET


@pytest.mark.parametrize("options", [{"max_beams": 0}, {"max_beams": 513}, {"backend": "other"}])
def test_limits_and_backends_out_of_range_are_refused(artefact, options):
    with pytest.raises(RequestError):
        server_command(artefact, **options)


def test_the_index_is_made_before_vllm_is_started(artefact, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append((command, environment)))
    command, environment = server_command(artefact, index_folder=tmp_path / "index")
    left = ("a" * 16, "b" * 16, "c" * 16)
    stay = [f"{'-'.join(left[:2])}.trie.safetensors", "notes.txt"]
    go = [f"{'-'.join(left)}.trie.safetensors", f".{'-'.join(left)}.trie.safetensors.17.tmp"]
    (tmp_path / "index").mkdir()
    for name in (*stay, *go):  # of a server that was killed
        (tmp_path / "index" / name).write_text("x")
    for name, said in environment.items():
        monkeypatch.setenv(name, said)
    launch.main(command[len(launch._FIRST) :])
    ((begun, given),) = started
    assert begun[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    trie = IndexFiles(given[INDEX_FOLDER]).load(given[INDEX])
    assert trie.num_leaves > 0
    assert given[INDEX_FOLDER] == str(tmp_path / "index")
    assert {path.name for path in (tmp_path / "index").iterdir()} == {*stay, given[INDEX]}
    assert given[CATALOG_VERSION]


class ReplacedError(Exception):
    """What a test has in the place of another program's start."""


@pytest.fixture
def serve(artefact, monkeypatch):
    """`llmrec serve` up to where it becomes the parent: the parent's command line, and the server's environment."""

    def call(**options):
        found = []

        def become(program, command, environment):
            found.append((command, environment))
            raise ReplacedError

        monkeypatch.setattr(serving.os, "execve", become)
        nothing = dict.fromkeys(("max_num_seqs", "max_model_len", "kv_cache_gib", "max_beams", "revision"))
        given = {"artefact": str(artefact), "host": "127.0.0.1", "port": 0, "dtype": "auto", "vllm_args": []}
        with pytest.raises(ReplacedError):
            serving.serve(**(given | nothing | options))
        return found[0]

    return call


def test_serve_passes_its_options_on(serve, tmp_path):
    command, environment = serve(
        catalog=[f"books={tmp_path}"],
        max_rows=2_000,
        max_body_bytes=77,
        deadline_ms=88,
        limit=["max_k=40", "read_seconds=2.5"],
        drain_seconds=5.0,
        supervise=True,
        quiet=True,
        log_file=tmp_path / "logs/server.log",
    )
    settings = ServiceSettings.from_environment(environment)
    expected = Limits(max_rows_running=2_000, max_body_bytes=77, deadline_ms=88, max_k=40, read_seconds=2.5)
    assert settings.limits == expected
    assert settings.catalogs == {"books": str(tmp_path)}
    assert int(value(command, "--restarts")) > 0
    assert value(command, "--drain-seconds") == "5.0"
    assert value(command, "--launch") == settings.launch != ""
    assert value(command, "--log-file") == str(tmp_path / "logs/server.log")
    port = value(command, "--port")
    assert value(command, "--url") == f"http://127.0.0.1:{port}"
    assert port != "0"


def test_serve_without_supervision_starts_once(serve):
    assert value(serve()[0], "--restarts") == "0"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"catalog": ["books"]}, "NAME=VALUE"),
        ({"catalog": ["books=/nowhere/at/all"]}, "no folder"),
        ({"adapter": ["a=/tmp", "a=/tmp"]}, "twice"),
        ({"limit": ["max_nothing=1"]}, "no limit 'max_nothing'"),
        ({"limit": ["max_k=many"]}, "no number"),
        ({"limit": ["max_k=2.5"]}, "no number"),
        ({"limit": ["deadline_ms=3"], "deadline_ms": 4}, "twice"),
        ({"drain_seconds": -1.0}, "no time"),
        ({"drain_seconds": float("inf")}, "no time"),
        ({"history_store": SECRET}, HISTORY_STORE),
        ({"history_store": "redis://host:6379/0?password=s3cret"}, HISTORY_STORE),
        ({"history_store": "redis://:s3cret@[host"}, HISTORY_STORE),
    ],
)
def test_serve_refuses_what_has_no_sense(artefact, options, said):
    nothing = dict.fromkeys(("max_num_seqs", "max_model_len", "kv_cache_gib", "max_beams", "revision"))
    given = {"artefact": str(artefact), "host": "127.0.0.1", "port": 0, "dtype": "auto", "vllm_args": []}
    with pytest.raises(RequestError, match=re.escape(said)) as error:
        serving.serve(**(given | nothing | options))
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("0.0.0.0", "", True), ("0.0.0.0", "k", False), ("127.0.0.1", "", False)]
)
def test_an_open_address_without_a_key_is_warned_of(serve, capsys, monkeypatch, host, key, warned):
    if key:
        monkeypatch.setenv("LLMREC_API_KEY", key)
    command, _ = serve(host=host)
    assert ("no API key" in capsys.readouterr().out) is warned
    assert value(command, "--url").startswith("http://127.0.0.1:")
    assert value(command, "--host") == host


def test_a_taken_port_is_told_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match="cannot be used"):
            check_port(taken.getsockname()[1])
