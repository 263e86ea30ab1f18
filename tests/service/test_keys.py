"""API keys: every route but /health asks for one, whatever the path looks like."""

import asyncio
import hmac
import re

import pytest
from played_engine import KEY, asked, client_of, make_world

from llmrec.exceptions import RequestError
from llmrec.service.app import build_app
from llmrec.service.keys import KeyGuard, Keys


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def paths_of(app):
    """All paths of an application's routes, with something for their parameters."""
    return [re.sub(r"\{user_id[^}]*\}", "ann", route.path) for route in app.router.routes]


def test_every_route_but_health_needs_a_key(world):
    service = world.service()
    paths = paths_of(build_app(service, keys=Keys([KEY])))
    assert {"/v1/recommend", "/v1/catalog", "/ready", "/metrics", "/docs", "/openapi.json", "/health"} <= set(paths)
    nowhere = ["/nowhere", "/health/", "//health", "/HEALTH", "/health/../v1/models", "/v1/recommend/"]

    async def ask():
        async with client_of(service, keys=Keys([KEY])) as client:
            for path in {*paths, *nowhere} - {"/health"}:
                for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                    answer = await client.request(method, path)
                    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, path)
                    assert answer.headers["X-Request-Id"]
            return await client.get("/health")

    assert asyncio.run(ask()).json() == {"alive": True}
    assert world.engine.calls == []
    assert service.metrics.registry.get_sample_value("llmrec_refusals_total", {"reason": "key"}) > 50


@pytest.mark.parametrize("key", [KEY, "another"])
def test_any_of_several_keys_opens(world, key):
    keys = Keys([KEY, "another"])
    answer = asked(world.service(), "GET", "/v1/models", keys=keys, headers=bearer(key))
    assert answer.status_code == 200
    answer = asked(world.service(), "GET", "/v1/models", keys=keys, headers={"authorization": f"bEARER  {key} "})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        KEY,
        f"Basic {KEY}",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer{KEY}",
        f"Bearer {KEY} {KEY}",
    ],
)
def test_other_headers_do_not(world, header):
    answer = asked(world.service(), "GET", "/v1/models", keys=Keys([KEY]), headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "AuthenticationError"
    assert KEY not in answer.text


def test_two_headers_are_none(world):
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
    assert asked(world.service(), "GET", "/v1/models", keys=Keys([KEY]), headers=headers).status_code == 401


def test_all_keys_are_compared_in_constant_time_and_by_hash(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = Keys(["one", "two", "three"])
    assert keys.accept(b"Bearer one")
    assert len(compared) == 3
    assert not keys.accept(None)
    assert len(compared) == 6
    assert all(len(a) == len(b) == 32 for a, b in compared)
    assert not any(word in repr(vars(keys)) for word in ("one", "two", "three"))


def test_keys_come_from_the_environment_and_from_a_file(tmp_path):
    assert Keys.from_environment({}) is None
    file = tmp_path / "keys"
    file.write_text("second\n\n  third \n")
    several = Keys.from_environment({"LLMREC_API_KEY": " one\n\ntwo\n"})
    assert [several.accept(f"Bearer {key}".encode()) for key in ("one", "two", "one\n\ntwo")] == [True, True, False]
    keys = Keys.from_environment({"LLMREC_API_KEY": "first", "LLMREC_API_KEY_FILE": str(file)})
    assert [keys.accept(f"Bearer {key}".encode()) for key in ("first", "second", "third", "fourth", "")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "a\tb", "a\x00b"])
def test_keys_that_are_none_stop_the_start_and_are_not_shown(key, tmp_path):
    with pytest.raises(RequestError, match="API key 1 of 1") as raised:
        Keys.from_environment({"LLMREC_API_KEY": key})
    assert not key.strip() or key not in str(raised.value)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for path in (empty, tmp_path / "lost"):
        with pytest.raises(RequestError):
            Keys.from_environment({"LLMREC_API_KEY_FILE": str(path)})


def test_a_proxys_prefix_opens_nothing_else(world):
    inner = []

    async def app(scope, receive, send):
        inner.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = KeyGuard(app, Keys([KEY]))
    statuses = []

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    for path, root in (
        ("/llm/health", "/llm"),
        ("/health", "/llm"),
        ("/llm/health", ""),
        ("/llm/v1/health", "/llm/v1"),
    ):
        scope = {"type": "http", "path": path, "root_path": root, "headers": [], "method": "GET"}
        asyncio.run(guard(scope, None, send))
    assert statuses == [200, 200, 401, 200]


def test_websockets_without_a_key_are_closed(world):
    sent = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        raise AssertionError("it was let in")

    scope = {"type": "websocket", "path": "/health", "headers": []}
    asyncio.run(KeyGuard(app, Keys([KEY]))(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_description_says_that_a_key_is_needed(world):
    described = asked(world.service(), "GET", "/openapi.json", keys=Keys([KEY]), headers=bearer(KEY)).json()
    assert described["security"] == [{"key": []}]
    assert described["paths"]["/health"]["get"]["security"] == []
    assert "security" not in asked(world.service(), "GET", "/openapi.json").json()
