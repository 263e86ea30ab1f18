"""The application as HTTP: limits of bodies, one shape for errors, ids, disconnects, the description."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from played_engine import asked, client_of, make_world

from llmrec.exceptions import BusyError, EngineError
from llmrec.service.app import build_app
from llmrec.service.body import depth_of
from llmrec.service.errors import ErrorBody
from llmrec.service.limits import Limits

HISTORY = {"history": ["item-5"], "k": 3}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(shared):
    shared.engine.__init__(*shared.engine.versions)
    return shared


def value(service, name, **labels):
    return service.metrics.registry.get_sample_value(name, labels)


def refused(answer, status, kind=None, said=""):
    """Checks an error's status and shape."""
    assert answer.status_code == status, answer.text
    error = ErrorBody.model_validate(answer.json()).error
    assert answer.headers["content-type"] == "application/json"
    assert error.code == status
    assert kind is None or error.type == kind, error
    assert said in error.message, error.message
    assert answer.headers["X-Request-Id"]
    return error


def test_answers_of_every_route(world):
    service = world.service()

    async def ask():
        await service.start()
        async with client_of(service) as client:
            answers = [
                await client.post("/v1/recommend", json=HISTORY),
                await client.post("/v1/recommend", json={"requests": [HISTORY, {"text": "red lamp"}]}),
                await client.post("/v1/search", json={"query": "red", "k": 2}),
                await client.post("/v1/score", json={"history": [], "items": ["item-1", "item-3"]}),
                await client.get("/v1/catalog"),
                await client.put("/v1/catalog", json={"version": world.second}),
                await client.put("/v1/catalog", json={}),
                await client.get("/v1/catalog/items", params={"search": "title 3", "limit": 2}),
                await client.get("/v1/models"),
                await client.get("/ready"),
                await client.get("/health"),
                await client.get("/metrics"),
                await client.get("/docs"),
            ]
        await service.close()
        return answers

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * len(answers), [answer.text for answer in answers]
    one, batch, search, score, catalogs, swapped, back, items, models, ready, _, metrics, _ = answers
    first = world.versions.current
    assert [item["rank"] for item in one.json()["items"]] == [1, 2, 3]
    assert [len(each["items"]) for each in batch.json()["responses"]] == [3, 10]
    assert len(search.json()["items"]) == 2
    assert [each["id"] for each in score.json()["scores"]] == ["item-1", "item-3"]
    assert [(each["name"], each["live"]) for each in catalogs.json()["catalogs"]] == [("main", 40), ("other", 25)]
    assert swapped.json() == {"catalog": "main", "version": world.second, "previous": first}
    assert back.json() == {"catalog": "main", "version": first, "previous": world.second}
    assert (len(items.json()["items"]), items.json()["total"]) == (2, 11)
    assert [(each["id"], each["parent"]) for each in models.json()["data"]] == [
        ("m", None),
        ("red", "m"),
        ("blue", "m"),
    ]
    assert ready.json()["catalogs"] == {"main": first, "other": world.others.current}
    assert (ready.json()["items"], ready.json()["catalog_version"]) == (40, first)
    assert 'llmrec_requests_total{method="POST",route="/v1/recommend",status="200"} 2.0' in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"history": ["item-1"], "k": 0}, "k", "greater than or equal to 1"),
        ({"history": ["item-1"], "k": 1001}, "k", "less than or equal to 1000"),
        ({"history": ["item-1"], "num_beams": 513}, "num_beams", "less than or equal to 512"),
        ({"history": "item-1"}, "history", "list"),
        ({"history": ["item-1"], "k": True}, "k", "integer"),
        ({"history": ["item-1"], "k": "3"}, "k", "integer"),
        ({"history": ["x"] * 10_001}, "history", "10000"),
        ({"history": ["x" * 5000]}, "history[0]", "1000"),
        ({"history": [], "kk": 3}, "kk", "Extra"),
        ({"k": 3}, None, "Give exactly one of"),
        ({"history": [], "text": "a"}, None, "Give exactly one of"),
        ([], None, "dictionary"),
        (None, None, "required"),
        ({"requests": []}, "requests", "at least 1"),
        ({"requests": [{"history": []}, {"history": [], "k": 0}]}, "requests[1].k", "greater than or equal to 1"),
        ({"requests": [{"history": []}, {"history": ["lost"]}]}, "requests[1]", "'lost'"),
        ({"history": [], "filters": {"price": {"min": 2, "max": 1}}}, "filters.price", "range"),
        ({"history": [], "deadline_ms": 0}, "deadline_ms", "greater than or equal to 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_the_schema_is_a_422_that_names_the_place(world, body, param, said):
    request = {} if body is None else {"json": body}
    error = refused(asked(world.service(), "POST", "/v1/recommend", **request), 422, said=said)
    assert error.param == param


def test_a_validation_error_repeats_nothing_of_the_request(world):
    body = {"history": ["item-1"] + [7] * 2000, "secret" * 1000: "word" * 1000}
    answer = asked(world.service(), "POST", "/v1/recommend", json=body)
    refused(answer, 422, "ValidationError", "and 1996 more")
    assert "word" not in answer.text
    assert len(answer.text) < 3000


@pytest.mark.parametrize(
    "content", [b"{", b"nonsense", b'{"history": [}', b"\xff\xfe", b'{"k": ' + b"1" * 5000 + b"}", b"[" * 30]
)
def test_what_is_no_json_is_a_400(world, content):
    headers = {"Content-Type": "application/json"}
    refused(asked(world.service(), "POST", "/v1/recommend", content=content, headers=headers), 400)


def test_a_body_must_be_said_to_be_json(world):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = asked(world.service(), "POST", "/v1/recommend", content=b"{}", headers={"Content-Type": kind})
        refused(answer, 415, "MediaTypeError")
    kind = "Application/JSON; charset=utf-8"
    content = json.dumps(HISTORY).encode()
    answer = asked(world.service(), "POST", "/v1/recommend", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32-le"])
def test_a_body_in_another_encoding_hides_no_nesting(world, encoding):
    service = world.service()
    # In UTF-16 the letter has the byte of a quotation mark, behind which brackets would seem to be text.
    body = '{"history": ["\u0122"], "filters": ' + "[" * 40 + "]" * 40 + "}"
    for sent in (body, json.dumps(HISTORY)):
        answer = asked(
            service,
            "POST",
            "/v1/recommend",
            content=sent.encode(encoding),
            headers={"Content-Type": "application/json"},
        )
        refused(answer, 400, "JSONError", "UTF-8")


def test_nesting_is_bounded_before_parsing(world):
    def nested(depth):
        return b'{"history": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    headers = {"Content-Type": "application/json"}
    service = world.service(limits=Limits(max_depth=5))
    refused(asked(service, "POST", "/v1/recommend", content=nested(6), headers=headers), 400, "NestingError")
    refused(asked(service, "POST", "/v1/recommend", content=nested(5), headers=headers), 422)
    begin = time.perf_counter()
    for content in (b"[" * 999_999, b'["' + b'\\"' * 499_000, b"[]," * 333_000, b'"' * 999_999, b'"\\' * 499_999):
        asked(world.service(), "POST", "/v1/recommend", content=content, headers=headers)
    assert time.perf_counter() - begin < 20.0


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\a\n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[]{}"\\'), inner, max_size=3),
)


@given(JSONS)
def test_depth_is_what_a_parser_would_find(body):
    def depth(part):
        if not isinstance(part, list | dict):
            return 0
        return 1 + max(map(depth, part.values() if isinstance(part, dict) else part), default=0)

    assert depth_of(json.dumps(body).encode()) == depth(body)


@given(st.binary(max_size=60) | st.text(alphabet='[]{}"\\,', max_size=60).map(str.encode))
@settings(max_examples=200)
def test_depth_of_anything_has_an_answer(body):
    assert 0 <= depth_of(body) <= len(body)


def test_bodies_are_bounded_with_and_without_their_length(world):
    service = world.service(limits=Limits(max_body_bytes=2000))
    headers = {"Content-Type": "application/json"}

    def body(length):
        return json.dumps(HISTORY).encode().ljust(length)

    async def parts(content):
        for begin in range(0, len(content), 100):
            yield content[begin : begin + 100]

    for length, status in ((2000, 200), (2001, 413), (15_000, 413), (100_000, 413)):
        for content in (body(length), parts(body(length))):
            answer = asked(service, "POST", "/v1/recommend", content=content, headers=headers)
            assert answer.status_code == status, length
            if status == 413:
                refused(answer, 413, "BodyTooLargeError", "2000 bytes")
    assert value(service, "llmrec_refusals_total", reason="body") == 6
    # A length that is announced alone is enough; one that lies is counted.
    for length, status in (("10000000", 413), ("5", 413)):
        given = {**headers, "Content-Length": length}
        assert asked(service, "POST", "/v1/recommend", content=parts(body(3000)), headers=given).status_code == status


def test_a_body_that_takes_too_long_is_given_up(world):
    service = world.service(limits=Limits(read_seconds=0.05))

    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    begin = time.monotonic()
    refused(asked(service, "POST", "/v1/recommend", content=slow()), 408, "SlowBodyError")
    assert time.monotonic() - begin < 4.0


def test_unknown_places_and_methods(world):
    refused(asked(world.service(), "GET", "/nowhere"), 404, "NotFoundError", "/nowhere")
    for method, path in (("GET", "/health/"), ("POST", "/v1/recommend/"), ("GET", "/v1/catalog/")):
        answer = asked(world.service(), method, path, headers={"Host": "elsewhere.example"})
        refused(answer, 404, "NotFoundError", path)  # and no redirect to where the Host header says
    answer = asked(world.service(), "GET", "/v1/recommend")
    refused(answer, 405, "MethodNotAllowedError")
    assert answer.headers["Allow"] == "POST"
    refused(asked(world.service(), "PUT", "/v1/catalog", json={"catalog": "third"}), 404, "UnknownCatalogError")
    refused(asked(world.service(), "PUT", "/v1/catalog", json={"version": "0" * 16}), 404, "UnknownCatalogError")
    refused(asked(world.service(), "GET", "/v1/catalog/items?limit=201"), 422, said="limit")
    refused(asked(world.service(), "GET", "/v1/users/ann/history"), 404, "NotServedError", "keeps no histories")
    refused(asked(world.service(), "POST", "/v1/recommend", json={"user_id": "ann"}), 422, "RequestError")


def test_what_the_server_did_wrong_is_told_to_its_log_alone(world, caplog):
    service = world.service()
    for error in (EngineError("at /root/secret"), ValueError("at /root/secret"), RuntimeError("at /root/secret")):
        world.engine.error = error
        with caplog.at_level(logging.ERROR):
            answer = asked(service, "POST", "/v1/recommend", json=HISTORY, headers={"X-Request-Id": "mine-1"})
        refused(answer, 500, "EngineError", "X-Request-Id")
        assert "secret" not in answer.text
        assert "mine-1" in caplog.text
        assert "secret" in caplog.text
        caplog.clear()
    assert value(service, "llmrec_requests_total", route="/v1/recommend", method="POST", status="500") == 3


def test_busy_and_late_answers_have_their_statuses(world):
    service = world.service()
    world.engine.delay = 60.0
    refused(asked(service, "POST", "/v1/recommend", json={**HISTORY, "deadline_ms": 20}), 504, "DeadlineError")
    batch = {"requests": [HISTORY, {**HISTORY, "deadline_ms": 20}]}
    refused(asked(service, "POST", "/v1/recommend", json=batch), 504, "DeadlineError")
    service.draining = True
    answer = asked(service, "POST", "/v1/recommend", json=HISTORY)
    refused(answer, 503, "DrainingError")
    assert int(answer.headers["Retry-After"]) >= 1
    refused(asked(service, "GET", "/ready"), 503, "NotReadyError", "being stopped")

    class Away:
        async def read(self, user_id, last):
            raise BusyError("Redis is away.", 3.2)

    answer = asked(world.service(histories=Away()), "POST", "/v1/recommend", json={"user_id": "ann"})
    refused(answer, 503, "BusyError", "Redis")
    assert answer.headers["Retry-After"] == "4"


def test_overload_is_a_429_with_retry_after(world):
    limits = Limits(max_k=10, max_beams=10, max_rows_running=10, max_rows_waiting=20, max_requests=5)
    service = world.service(limits=limits)
    world.engine.delay = 0.05

    async def ask():
        async with client_of(service) as client:
            answers = [client.post("/v1/recommend", json=HISTORY) for _ in range(12)]
            return await asyncio.gather(*answers)

    answers = asyncio.run(ask())
    statuses = [answer.status_code for answer in answers]
    assert sorted(set(statuses)) == [200, 429]
    assert statuses.count(200) == 3
    for answer in answers:
        if answer.status_code == 429:
            refused(answer, 429, "QueueFullError")
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
    reasons = {reason: value(service, "llmrec_refusals_total", reason=reason) for reason in ("busy", "requests")}
    assert reasons == {"busy": 2, "requests": 7}
    assert (service.in_flight, service.admission.running) == (0, 0)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2_3", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("-a", False), ('a"\tb', False)],
)
def test_request_ids_are_kept_if_they_are_plain(world, given, kept):
    answer = asked(world.service(), "GET", "/health", headers={"X-Request-Id": given})
    found = answer.headers.get_list("X-Request-Id")
    assert len(found) == 1
    assert (found[0] == given) == kept
    assert kept or len(found[0]) == 32


def test_health_is_of_the_engine_and_ready_of_its_answers(world):
    service = world.service()
    refused(asked(service, "GET", "/ready"), 503, "NotReadyError", "No recommendation was tried yet")
    assert asked(service, "GET", "/health").status_code == 200
    world.engine.errored = True
    refused(asked(service, "GET", "/health"), 503, "NotReadyError", "engine has ended")
    refused(asked(service, "GET", "/ready"), 503, "NotReadyError", "engine has ended")


def test_the_description_has_the_limits_and_every_error(world):
    described = asked(world.service(), "GET", "/openapi.json").json()
    schemas = described["components"]["schemas"]
    assert schemas["RecommendRequest"]["properties"]["k"]["maximum"] == 1000
    assert schemas["RecommendRequest"]["properties"]["num_beams"]["anyOf"][0]["maximum"] == 512
    assert schemas["ScoreRequest"]["properties"]["items"]["maxItems"] == 1000
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), path
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (method, path, status)
    statuses = set(described["paths"]["/v1/recommend"]["post"]["responses"])
    assert {"200", "400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"} == statuses
    assert "409" in described["paths"]["/v1/catalog"]["put"]["responses"]


@contextlib.contextmanager
def listening(service):
    """A real server of a service, on a thread; yields its address."""
    config = uvicorn.Config(build_app(service), host="127.0.0.1", port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def test_a_client_that_goes_away_ends_the_work(world):
    service = world.service()
    world.engine.delay = 60.0
    batch = json.dumps({"requests": [HISTORY] * 3}).encode()
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with listening(service) as port:
        for content, searches in ((json.dumps(HISTORY).encode(), 1), (batch, 3)):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(head % len(content) + content)
                wait_for(lambda count=searches: world.engine.running == count)
                begin = time.monotonic()
            wait_for(lambda: world.engine.running == 0)
            assert time.monotonic() - begin < 1.0  # 200 ms, and a busy machine's margin
            wait_for(lambda: service.in_flight == 0)
        with socket.create_connection(("127.0.0.1", port)) as client:  # in the middle of its body
            client.sendall(head % 1000 + b"{")
            wait_for(lambda: service.in_flight == 1)
        wait_for(lambda: service.in_flight == 0)
        assert world.engine.cancelled == 4
        assert (service.admission.running, service.admission.waiting) == (0, 0)
        wait_for(lambda: value(service, "llmrec_refusals_total", reason="disconnect") == 3)
        answered = value(service, "llmrec_requests_total", route="/v1/recommend", method="POST", status="499")
        assert answered == 3
        world.engine.delay = 0.0
        for _ in range(3):  # and the server goes on
            assert httpx.post(f"http://127.0.0.1:{port}/v1/recommend", json=HISTORY).status_code == 200
        assert value(service, "llmrec_refusals_total", reason="disconnect") == 3


def test_a_body_that_is_far_too_long_is_refused_on_the_wire(world):
    service = world.service()
    headers = {"Content-Type": "application/json"}
    with listening(service) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for length in (1_000_001, 5_000_000):
            refused(client.post("/v1/recommend", content=b"[" * length, headers=headers), 413)
        assert client.post("/v1/recommend", json=HISTORY).status_code == 200
        chunks = (b" " * 100_000 for _ in range(30))
        refused(client.post("/v1/recommend", content=chunks, headers=headers), 413)
