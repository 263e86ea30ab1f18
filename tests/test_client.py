"""Both clients, against a transport that plays a server, and against a real one."""

import asyncio
import http.server
import inspect
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.client import AsyncClient, Client, calls, exchange
from llmrec.exceptions import BusyError, DeadlineError, RequestError, ServerError
from llmrec.service.schema import (
    Condition,
    PrefixCap,
    RecommendRequest,
    ScoreRequest,
    SearchRequest,
    StoredEvent,
)

ANSWER = {
    "items": [{"id": "a", "rank": 1, "log_probability": -0.5, "title": "A"}],
    "model": "m",
    "catalog": "default",
    "catalog_version": "v1",
}
SCORES = {
    "scores": [{"id": "a", "log_probability": -1.0, "level_log_probabilities": [-1.0]}],
    "model": "m",
    "catalog": "default",
    "catalog_version": "v1",
}
STATE = {"name": "default", "version": "v1", "items": 2, "live": 1, "levels": 3, "attributes": {}, "versions": ["v1"]}


class Server:
    """Answers requests with what it was told, in turn, and keeps them."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def bodies(self) -> list[dict]:
        return [json.loads(request.content) for request in self.requests]


class Asked:
    """Calls a method of a client of either kind, and returns or raises what it does."""

    def __init__(self, kind: str, **options) -> None:
        self.kind = kind
        self.options = {"retries": 2, "timeout": 5.0} | options

    def __call__(self, server: Server, method: str, *arguments, **keywords):
        if self.kind == "sync":
            with Client("http://h/base/", transport=httpx.MockTransport(server), **self.options) as client:
                return getattr(client, method)(*arguments, **keywords)

        async def body():
            async with AsyncClient("http://h/base/", transport=httpx.MockTransport(server), **self.options) as client:
                return await getattr(client, method)(*arguments, **keywords)

        return asyncio.run(body())


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.delenv(calls.API_KEY, raising=False)
    return Asked(request.param)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clients wait, which takes no time here."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("llmrec.client.client.time.sleep", slept.append)
    monkeypatch.setattr("llmrec.client.client.asyncio.sleep", sleep)
    return slept


def ok(body: object = ANSWER) -> httpx.Response:
    return httpx.Response(200, json=body)


def test_it_needs_no_torch(run_python):
    done = run_python("import sys, llmrec.client; print('torch' in sys.modules, 'fastapi' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "answer", "sent"),
    [
        (
            "recommend",
            (["a", "ü"],),
            {"k": 3, "filters": {"price": Condition(max=3.0)}, "prefix_cap": PrefixCap(levels=1, most=2)},
            ANSWER,
            ("POST", "/base/v1/recommend", {"history": ["a", "ü"], "k": 3, "filters": {"price": {"max": 3.0}},
             "prefix_cap": {"levels": 1, "most": 2}}),
        ),
        (
            "recommend",
            (),
            {"user_id": "u", "sampling": {"seed": 3}, "exclude_seen": False, "allow": ("a",), "num_beams": None},
            ANSWER,
            ("POST", "/base/v1/recommend", {"user_id": "u", "sampling": {"seed": 3}, "exclude_seen": False,
             "allow": ["a"]}),
        ),
        (
            "recommend_many",
            ([RecommendRequest(history=["a"]), {"text": "t", "deadline_ms": 7}],),
            {},
            {"responses": [ANSWER, ANSWER]},
            ("POST", "/base/v1/recommend", {"requests": [{"history": ["a"]}, {"text": "t", "deadline_ms": 7}]}),
        ),
        ("search", ("lamp",), {"k": 2}, ANSWER, ("POST", "/base/v1/search", {"query": "lamp", "k": 2})),
        (
            "score",
            ([], ["a"]),
            {"catalog": "c"},
            SCORES,
            ("POST", "/base/v1/score", {"history": [], "items": ["a"], "catalog": "c"}),
        ),
        ("catalogs", (), {}, {"catalogs": [STATE]}, ("GET", "/base/v1/catalog", None)),
        (
            "swap",
            ("v2",),
            {},
            {"catalog": "default", "version": "v2", "previous": "v1"},
            ("PUT", "/base/v1/catalog", {"version": "v2"}),
        ),
        (
            "items",
            ("a&b=c", "shop"),
            {"offset": 3, "limit": 2},
            {"items": [], "total": 0},
            ("GET", "/base/v1/catalog/items?search=a%26b%3Dc&offset=3&limit=2&catalog=shop", None),
        ),
        (
            "history",
            ("a/ü ..",),
            {"last": 3},
            {"user_id": "a/ü ..", "events": [{"item": "x"}]},
            ("GET", "/base/v1/users/a%2F%C3%BC%20%2E%2E/history?last=3", None),
        ),
        ("forget", ("..",), {}, {"deleted": True}, ("DELETE", "/base/v1/users/%2E%2E", None)),
        ("ready", (), {}, {"ready": True}, ("GET", "/base/ready", None)),
        ("health", (), {}, {}, ("GET", "/base/health", None)),
    ],
)  # fmt: skip
def test_methods_send_what_the_schema_says_and_read_its_answers(ask, method, arguments, keywords, answer, sent):
    server = Server(ok(answer))
    found = ask(server, method, *arguments, **keywords)
    (request,) = server.requests
    verb, path, body = sent
    assert (request.method, request.url.raw_path.decode()) == (verb, path)
    if body is None:
        assert request.content == b""
    else:
        given_body = json.loads(request.content)
        for one in given_body.get("requests", [given_body]):
            # The server is told to stop when the caller does; what the caller said itself stays.
            if method in ("recommend", "recommend_many", "search", "score") and one.get("deadline_ms") != 7:
                assert 4_900 <= one.pop("deadline_ms") <= 5_000
        assert given_body == body
        assert request.headers["content-type"] == "application/json"
    expected = {
        "recommend_many": [ANSWER, ANSWER],
        "catalogs": [STATE],
        "forget": True,
        "ready": True,
        "health": True,
    }.get(method, answer)
    if isinstance(found, list):
        found = [one.model_dump(exclude_unset=True) for one in found]
    assert (found if isinstance(found, bool) else found if isinstance(found, list) else found.model_dump(
        exclude_unset=True
    )) == expected  # fmt: skip


def test_append_takes_events_dicts_and_ids(ask):
    server = Server(httpx.Response(204))
    assert ask(server, "append", "u", [StoredEvent(item="a", action="view"), {"item": "b"}, "c"]) is None
    assert server.bodies == [{"events": [{"item": "a", "action": "view"}, {"item": "b"}, {"item": "c"}]}]
    assert server.requests[0].url.raw_path == b"/base/v1/users/u/events"


def test_nothing_is_sent_for_no_requests(ask):
    server = Server(ok())
    assert ask(server, "recommend_many", []) == []
    assert server.requests == []


def test_options_are_the_schemas_fields():
    for options, model, apart in (
        (calls.RecommendOptions, RecommendRequest, {"history"}),
        (calls.AskedOptions, ScoreRequest, {"history", "items"}),
        (calls.SearchOptions, SearchRequest, {"query"}),
    ):
        assert set(options.__annotations__) | apart == set(model.model_fields)


def test_both_clients_have_the_same_methods():
    def methods(kind):
        return {
            name: inspect.signature(method)
            for name, method in vars(kind).items()
            if callable(method) and not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)
    assert set(methods(Client)) >= {"recommend", "recommend_many", "search", "score", "catalogs", "swap", "items",
                                    "history", "append", "forget", "ready", "health", "close"}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "said"),
    [
        ("recommend", (["a"],), {"k": 0}, "k: Input should be greater than or equal to 1"),
        ("recommend", (["a"],), {"user_id": "u"}, "Give exactly one of history, user_id and text"),
        ("recommend", (), {}, "Give exactly one"),
        ("recommend", ("abc",), {}, "history: Input should be a valid list"),
        ("recommend", (["\ud800"],), {}, "history.0"),
        ("recommend", (["a"],), {"nonsense": 1}, "nonsense: Extra inputs"),
        ("recommend", (["a"],), {"timeout": 0.0}, "timeout is 0.0"),
        ("recommend", (["a"],), {"timeout": float("nan")}, "timeout is nan"),
        ("recommend_many", ([{"history": []}] * 257,), {}, "at most 256"),
        ("score", ([], []), {}, "items: List should have at least 1"),
        ("append", ("u", []), {}, "at least 1 item"),
        ("append", ("", ["a"]), {}, "is no user id"),
        ("history", ("x" * 1001,), {}, "is no user id"),
        ("forget", ("\ud800",), {}, "is no user id"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_sent(ask, method, arguments, keywords, said):
    server = Server(ok())
    with pytest.raises(RequestError, match=said):
        ask(server, method, *arguments, **keywords)
    assert server.requests == []


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (httpx.Response(422, json={"error": {"message": "k is 7. Ask for less."}}), RequestError, "k is 7. Ask for"),
        (httpx.Response(422, json={"detail": "Not so. Otherwise."}), RequestError, "Not so. Otherwise."),
        (
            httpx.Response(422, json={"detail": [{"loc": ["body", "k"], "msg": "too large", "type": "x"}]}),
            RequestError,
            "k: too large",
        ),
        (httpx.Response(504, json={"error": {"message": "Too late."}}), DeadlineError, "Too late."),
        (httpx.Response(404, json={"error": {"message": "Nothing."}}), ServerError, "Nothing."),
        (httpx.Response(401, json={"error": "Unauthorized"}), ServerError, "Unauthorized"),
        (httpx.Response(502, text="<html>Bad\n Gateway</html>"), ServerError, "<html>Bad Gateway</html>"),
        (httpx.Response(500, content=b"\xff" * 9), ServerError, "HTTP 500"),
        (httpx.Response(500, text="[" * 100_000), ServerError, "…"),
        (httpx.Response(302, headers={"Location": "http://elsewhere"}), ServerError, "Found"),
        (httpx.Response(413), ServerError, "HTTP 413"),
    ],
)
def test_errors_are_the_librarys_with_what_the_server_said(ask, pauses, answer, kind, said):
    server = Server(answer)
    with pytest.raises(kind) as caught:
        ask(server, "recommend", ["a"])
    assert said in str(caught.value)
    assert f"HTTP {answer.status_code}" in str(caught.value)
    assert server.requests[0].headers["x-request-id"] in str(caught.value)
    assert len(str(caught.value)) < 1200
    if kind is ServerError:
        assert caught.value.status == answer.status_code
    assert len(server.requests) == 1  # never again
    assert pauses == []


def test_the_servers_request_id_is_kept(ask):
    with pytest.raises(RequestError, match="request theirs-7"):
        ask(Server(httpx.Response(422, headers={"X-Request-Id": "theirs-7"})), "recommend", ["a"])


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"items": 3}', b"\xff"])
def test_an_answer_that_is_not_llmrecs_is_said_to_be_none(ask, body):
    with pytest.raises(ServerError, match="is not llmrec's") as caught:
        ask(Server(httpx.Response(200, content=body)), "recommend", ["a"])
    assert caught.value.status == 200


def test_what_a_newer_server_adds_is_passed_over(ask):
    newer = {**ANSWER, "cost": 3, "items": [{**ANSWER["items"][0], "reason": "x"}]}
    assert ask(Server(ok(newer)), "recommend", ["a"]).items[0].id == "a"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(ask, pauses, status):
    busy = httpx.Response(status, headers={"Retry-After": "2"}, json={"error": {"message": "Full."}})
    server = Server(busy, busy, ok())
    assert ask(server, "recommend", ["a"], timeout=60.0).items[0].id == "a"
    assert len(server.requests) == 3
    assert len({request.headers["x-request-id"] for request in server.requests}) == 1
    assert all(2.0 <= pause <= 2.25 for pause in pauses)
    assert len(set(pauses)) == 2  # by chance
    server = Server(busy)
    with pytest.raises(BusyError, match=r"Full\.") as caught:
        ask(server, "recommend", ["a"], timeout=60.0)
    assert caught.value.retry_after == 2.0
    assert len(server.requests) == 3


def test_a_pause_that_there_is_no_time_for_is_not_begun(ask, pauses):
    for after, timeout in (("2", 1.5), ("31", 60.0), ("1e9", 60.0)):
        server = Server(httpx.Response(429, headers={"Retry-After": after}), ok())
        with pytest.raises(BusyError) as caught:
            ask(server, "recommend", ["a"], timeout=timeout)
        assert caught.value.retry_after == float(after)
        assert len(server.requests) == 1
    assert pauses == []


@pytest.mark.parametrize("after", ["soon", "inf", "nan", "-3", ""])
def test_a_retry_after_that_is_none_does_no_harm(ask, pauses, after):
    server = Server(httpx.Response(429, headers={"Retry-After": after}), ok())
    ask(server, "recommend", ["a"])
    assert 0.0 <= pauses[0] <= 1.25


def test_a_retry_after_may_be_a_date(ask, pauses):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    ask(Server(httpx.Response(503, headers={"Retry-After": date}), ok()), "recommend", ["a"])
    assert 1.0 <= pauses[0] <= 3.25


def test_without_a_retry_after_pauses_double(pauses):
    server = Server(httpx.Response(503))
    with pytest.raises(BusyError):
        Asked("sync", retries=4, timeout=100.0)(server, "recommend", ["a"])
    assert len(server.requests) == 5
    for attempt, pause in enumerate(pauses):
        assert 0.125 * 2**attempt <= pause <= 0.25 * 2**attempt


@pytest.mark.parametrize(
    ("error", "tries_of_reads", "tries_of_writes"),
    [
        (httpx.ConnectError("refused"), 3, 3),
        (httpx.ConnectTimeout("slow"), 3, 3),
        (httpx.RemoteProtocolError("gone"), 3, 1),
        (httpx.ReadError("reset"), 3, 1),
        (httpx.WriteError("reset"), 3, 1),
        (httpx.UnsupportedProtocol("x"), 1, 1),
    ],
)
def test_a_lost_connection_is_tried_again_but_a_change_only_if_it_was_not_carried_out(
    ask, pauses, error, tries_of_reads, tries_of_writes
):
    for method, arguments, tries in (
        ("recommend", (["a"],), tries_of_reads),
        ("history", ("u",), tries_of_reads),
        ("append", ("u", ["a"]), tries_of_writes),
        ("swap", (), tries_of_writes),
        ("forget", ("u",), tries_of_writes),
    ):
        server = Server(error)
        with pytest.raises(ServerError, match="gave no answer") as caught:
            ask(server, method, *arguments)
        assert caught.value.status == 0
        assert len(server.requests) == tries, method


def test_a_change_is_sent_again_to_a_server_that_was_busy(ask, pauses):
    server = Server(httpx.Response(503), httpx.Response(204))
    ask(server, "append", "u", ["a"])
    assert len(server.requests) == 2


def test_a_timeout_is_a_deadline_and_not_tried_again(ask, pauses):
    server = Server(httpx.ReadTimeout("slow"))
    with pytest.raises(DeadlineError, match=r"within 1\.5 s"):
        ask(server, "recommend", ["a"], timeout=1.5)
    assert len(server.requests) == 1


def test_each_try_has_what_is_left_of_the_time(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("llmrec.client.exchange.time.monotonic", lambda: now[0])
    monkeypatch.setattr("llmrec.client.client.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    server = Server(httpx.Response(429, headers={"Retry-After": "3"}), ok())
    Asked("sync")(server, "recommend", ["a"], timeout=10.0)
    first, second = (body["deadline_ms"] for body in server.bodies)
    assert first == 10_000
    assert 6_700 <= second <= 7_000
    assert server.requests[1].extensions["timeout"]["read"] == pytest.approx(second / 1000, abs=0.002)
    # The schema takes ten minutes at most.
    server = Server(ok())
    Asked("sync")(server, "recommend", ["a"], timeout=10_000.0)
    assert server.bodies[0]["deadline_ms"] == 600_000


@pytest.mark.parametrize("answer", [httpx.Response(503), httpx.ConnectError("refused"), httpx.ReadError("reset")])
def test_a_server_that_is_away_is_neither_ready_nor_healthy(ask, pauses, answer):
    for method in ("ready", "health"):
        server = Server(answer)
        assert ask(server, method) is False
        assert len(server.requests) == 1
    with pytest.raises(ServerError, match="401"):
        ask(Server(httpx.Response(401)), "ready")


def test_keys_are_sent_and_not_shown(ask, monkeypatch):
    def header(server: Server) -> str | None:
        return server.requests[0].headers.get("authorization")

    server = Server(ok())
    ask(server, "recommend", ["a"])
    assert header(server) is None
    monkeypatch.setenv(calls.API_KEY, "from-environment")
    server = Server(ok())
    ask(server, "recommend", ["a"])
    assert header(server) == "Bearer from-environment"
    server = Server(ok())
    Asked(ask.kind, api_key="given")(server, "recommend", ["a"])
    assert header(server) == "Bearer given"
    assert "given" not in repr(Client("http://h", api_key="given"))
    for bad in ("geheim\n", "geheim x", "geheimü"):
        with pytest.raises(RequestError) as caught:
            Client("http://h", api_key=bad)
        assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "h:8000", "ftp://h", "http://", "http://u:geheim@h", "http://h:port", "/x", None])
def test_what_is_no_servers_url_is_refused(url):
    for kind in (Client, AsyncClient):
        with pytest.raises(RequestError) as caught:
            kind(url)
        assert "geheim" not in str(caught.value)
    with pytest.raises(RequestError, match="retries is -1"):
        Client("http://h", retries=-1)


@settings(max_examples=200, deadline=None)
@given(user=st.text(min_size=1, max_size=20))
def test_a_users_id_is_one_segment_of_the_path(user):
    server = Server(httpx.Response(204))
    Asked("sync")(server, "append", user, ["a"])
    raw = server.requests[0].url.raw_path.decode()
    prefix, encoded, end = raw.rsplit("/", 2)
    assert (prefix, end) == ("/base/v1/users", "events")
    assert httpx.URL(f"http://h/{encoded}x").path == f"/{user}x"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections: set[tuple[str, int]]
    gone: threading.Event
    slow: float

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.connections.add(self.client_address)
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.slow:
            self.connection.settimeout(self.slow)
            try:
                if self.connection.recv(1) == b"":
                    self.gone.set()
            except TimeoutError:
                pass
            self.close_connection = True
            return
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


Start = Callable[[float], tuple[str, type[_Handler]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a real server: its URL and what it saw; a slow one answers nothing for so many seconds."""
    servers = []

    def started(slow: float) -> tuple[str, type[_Handler]]:
        seen = {"connections": set(), "gone": threading.Event(), "slow": slow}
        handler = type("Handler", (_Handler,), seen)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", handler

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def test_connections_are_used_again(start):
    url, seen = start(0.0)
    with Client(url) as client:
        for _ in range(10):
            client.recommend(["a"])
    assert len(seen.connections) == 1
    seen.connections.clear()

    async def body():
        async with AsyncClient(url, connections=3) as client:
            for _ in range(5):
                await asyncio.gather(*(client.recommend(["a"]) for _ in range(6)))

    asyncio.run(body())
    assert 1 <= len(seen.connections) <= 3


def test_a_cancelled_or_late_call_closes_its_connection(start):
    url, seen = start(20.0)

    async def body():
        async with AsyncClient(url) as client:
            task = asyncio.create_task(client.recommend(["a"]))
            while not seen.connections:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(seen.gone.wait, 5.0)

    asyncio.run(body())
    seen.gone.clear()
    begin = time.monotonic()
    with Client(url) as client, pytest.raises(DeadlineError):
        client.recommend(["a"], timeout=0.3)
    assert time.monotonic() - begin < 5.0
    assert seen.gone.wait(5.0)


def test_nobody_there_is_said_so():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", retries=1) as client:
        with pytest.raises(ServerError, match="gave no answer") as caught:
            client.catalogs()
        assert caught.value.status == 0
        assert client.ready() is False


def test_a_pause_ends_with_an_exchange_that_ends():
    """The exchange itself: what it yields is what a driver has to do, and it ends after its last try."""
    steps = exchange.exchange(calls.catalogs(), {}, 100.0, 1)
    first = next(steps)
    assert isinstance(first, exchange.Try)
    assert isinstance(steps.send(httpx.Response(429)), exchange.Pause)
    assert isinstance(steps.send(None), exchange.Try)
    with pytest.raises(BusyError):
        steps.send(httpx.Response(429))
