"""The page's actions over real HTTP: a small server of the API's shape, whose every request is kept."""

import socket
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from llmrec.demo.actions import Actions
from llmrec.demo.servers import Target, in_words, is_silence
from llmrec.demo.session import PAGE_ITEMS, Session
from llmrec.demo.settings import NAMES, Settings
from llmrec.exceptions import BusyError, RequestError, ServerError

INPUTS = {name: getattr(Settings(), name) for name in NAMES}


class Small:
    """A server of 20 items whose answers are the first k, and that fails when told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict, str]] = []
        self.fail: tuple[int, dict] | None = None
        self.stored = ["i3", "gone"]
        self.app = FastAPI()

        @self.app.middleware("http")
        async def keep(request: Request, call_next):
            body = await request.json() if request.method == "POST" else dict(request.query_params)
            self.asked.append((request.url.path, body, request.headers.get("authorization", "")))
            if self.fail:
                status, headers = self.fail
                error = {"message": "The <b>server</b> is unwell. Wait.", "type": "x", "param": None, "code": status}
                return JSONResponse({"error": error}, status, headers)
            return await call_next(request)

        @self.app.get("/v1/catalog")
        def catalogs():
            kinds = {"brand": "text", "price": "number", "stocked": "flag", "tags": "list"}
            return {
                "catalogs": [
                    {"name": name, "version": "v", "items": 20, "live": 20, "levels": 2, "attributes": kinds,
                     "versions": ["v"]}
                    for name in ("main", "other")
                ]
            }  # fmt: skip

        @self.app.get("/v1/catalog/items")
        def items(search: str = "", offset: int = 0, limit: int = 50):
            rows = [n for n in range(20) if search in f"i{n}"]
            found = [
                {"id": f"i{n}", "title": f"T{n}", "semantic_id": [n, 0], "retired": False, "attributes": {}}
                for n in rows[offset : offset + limit]
            ]
            return {"items": found, "total": len(rows)}

        @self.app.get("/v1/users/{user}/history")
        def history(user: str):
            events = self.stored if user == "known" else []
            return {"user_id": user, "events": [{"item": item} for item in events]}

        @self.app.post("/v1/recommend")
        def recommend(body: dict):
            items = [
                {"id": f"i{n}", "rank": n + 1, "log_probability": -1.0 - n, "title": f"T{n}", "semantic_id": [n, 0],
                 "level_log_probabilities": [-1.0, -float(n)]}
                for n in range(body["k"])
            ]  # fmt: skip
            return {"items": items, "model": "m", "catalog": "main", "catalog_version": "v"}


def serve(app: FastAPI) -> tuple[uvicorn.Server, str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    return server, f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def small():
    small = Small()
    server, small.url = serve(small.app)
    yield small
    server.should_exit = True


@pytest.fixture
def actions(small):
    return Actions(Target(small.url))


@pytest.fixture
def session(actions, small):
    session = Session()
    assert actions.open(session) is True
    assert session.problem == ""
    small.asked.clear()
    return session


def found(session: Session) -> list[str]:
    return [item.id for item in session.found.items]


def number(session: Session, name: str) -> int:
    from llmrec.demo.session import Item

    return session.number(Item(name, name.replace("i", "T")))


def click(actions: Actions, session: Session, action: object, on: object = 0) -> None:
    actions.click(session, {"action": action, "number": str(on)})


def test_the_catalog_is_opened_searched_and_paged(actions, session):
    assert [state.name for state in session.catalogs] == ["main", "other"]
    assert found(session) == [f"i{n}" for n in range(PAGE_ITEMS)]
    click(actions, session, "turn", 1)
    assert found(session) == [f"i{n}" for n in range(PAGE_ITEMS, 2 * PAGE_ITEMS)]
    actions.search(session, " i1 ")
    assert found(session)[:3] == ["i1", "i10", "i11"]
    assert session.found.total == 11
    actions.use_catalog(session, "nowhere")
    assert session.catalog == "main"
    actions.use_catalog(session, "other")
    assert (session.catalog, session.search) == ("other", "")
    assert found(session)[1] == "i1"


def test_a_recommendation_is_asked_for_with_all_that_was_clicked(actions, session, small):
    for name in ("i4", "i2"):
        click(actions, session, "add", number(session, name))
    click(actions, session, "deny", number(session, "i7"))
    actions.filter(session, "price", "", False, "1", "5", None)
    actions.recommend(session, INPUTS | {"k": 3.0, "num_beams": 8.0, "legal": True})
    assert session.problem == ""
    path, body, _ = small.asked[-1]
    assert path == "/v1/recommend"
    assert body.pop("deadline_ms") > 0
    assert body == {
        "history": ["i4", "i2"], "k": 3, "num_beams": 8, "exclude_seen": True, "deny": ["i7"], "explain": True,
        "filters": {"price": {"min": 1.0, "max": 5.0}}, "normalize": "legal", "catalog": "main",
        "ignore_unknown": False,
    }  # fmt: skip
    [answer] = session.answers
    assert [item.id for item in answer.response.items] == ["i0", "i1", "i2"]
    assert 0 < answer.seconds < 30
    assert not session.stale
    click(actions, session, "unfilter", 0)
    assert session.stale
    click(actions, session, "again")
    assert small.asked[-1][1]["filters"] == {}
    assert not session.stale


def test_one_path_is_chosen_and_let_go(actions, session):
    actions.recommend(session, INPUTS)
    click(actions, session, "choose", number(session, "i1"))
    assert session.chosen == "i1"
    actions.recommend(session, INPUTS)
    assert session.chosen == "i1"
    click(actions, session, "choose", number(session, "i1"))
    assert session.chosen == ""
    click(actions, session, "choose", number(session, "i9"))
    actions.recommend(session, INPUTS | {"k": 2})
    assert session.chosen == ""  # it is not among the answer's items any more


@pytest.mark.parametrize("kind", ["brand", "tags"])
def test_filters_take_the_place_of_those_of_their_attribute(actions, session, kind):
    actions.filter(session, kind, "a, b", False, "", "", None)
    actions.filter(session, kind, "c", True, "", "", None)
    assert [one.model_dump(exclude_none=True) for one in session.filters.values()] == [{"none_of": ["c"]}]
    actions.filter(session, "stocked", "", False, "", "", "no")
    assert session.filters["stocked"].any_of == [False]
    actions.filter(session, "colour", "red", False, "", "", None)
    assert "No attribute is chosen" in session.problem
    actions.filter(session, "price", "", False, "", "", None)
    assert "no bound" in session.problem
    assert list(session.filters) == [kind, "stocked"]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"action": "add"},
        {"action": "add", "number": "x"},
        {"action": "add", "number": "9" * 5000},
        {"action": "add", "number": {"$gt": 0}},
        {"action": ["add"], "number": "0"},
        {"action": "__class__", "number": "0"},
        {"action": "use_catalog", "number": "0"},
        {"action": "add", "number": "-1"},
        {"action": "add", "number": "77"},
        {"action": "add", "number": "٣"},
    ],
)
def test_what_no_button_sends_does_nothing(actions, session, sent):
    actions.click(session, sent)
    assert session.history == []
    assert session.problem == ""


def test_a_stored_user_s_items_can_be_taken_over(actions, session, small):
    actions.take_stored(session, "known")
    assert [(entry.item.id, entry.item.title) for entry in session.history] == [("i3", "T3"), ("gone", "gone")]
    actions.take_stored(session, "nobody")
    assert "no history of 'nobody'" in session.problem
    actions.take_stored(session, "  ")
    assert "empty" in session.problem
    actions.recommend(session, INPUTS | {"user_id": "known"})
    assert small.asked[-1][1]["user_id"] == "known"
    assert "history" not in small.asked[-1][1]


def test_two_servers_are_asked_alike_and_get_their_own_keys(small):
    other = Small()
    server, url = serve(other.app)
    actions = Actions(Target(small.url, "first-key"), Target(url, "second-key"))
    session = Session()
    actions.open(session)
    click(actions, session, "add", number(session, "i5"))
    actions.recommend(session, INPUTS | {"compare": True, "adapter": "a", "other_adapter": "b"})
    assert [answer.label for answer in session.answers] == [f"{small.url} with a", f"{url} with b"]
    first, second = (one.asked[-1][1] for one in (small, other))
    assert (first.pop("adapter"), second.pop("adapter")) == ("a", "b")
    assert first.pop("catalog") == "main"
    first.pop("deadline_ms"), second.pop("deadline_ms")
    assert first == second  # the default catalog is the other's own, whatever its name
    assert {key for *_, key in small.asked} == {"Bearer first-key"}
    assert {key for *_, key in other.asked} == {"Bearer second-key"}
    actions.use_catalog(session, "other")
    actions.recommend(session, INPUTS | {"compare": True})
    assert other.asked[-1][1]["catalog"] == "other"
    server.should_exit = True


def test_an_environment_s_key_goes_to_no_server_by_itself(small, monkeypatch):
    monkeypatch.setenv("LLMREC_API_KEY", "environment")
    Actions(Target(small.url)).open(Session())
    assert {key for *_, key in small.asked} == {""}


def test_without_a_second_server_the_first_is_asked_twice(actions, session, small):
    actions.recommend(session, INPUTS | {"compare": True, "other_adapter": "b"})
    assert [body.get("adapter") for path, body, _ in small.asked if path == "/v1/recommend"] == [None, "b"]


def test_a_server_that_is_away_is_said_and_asked_again(small):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    actions, session = Actions(Target(url)), Session()
    assert actions.open(session) is False
    assert "does not answer" in session.problem
    assert session.lost
    actions.recommend(session, INPUTS)
    assert "does not answer" in session.answers[0].error
    actions.first = Target(small.url)
    click(actions, session, "retry")
    assert session.problem == ""
    assert found(session)[0] == "i0"


@pytest.mark.parametrize(
    ("status", "headers", "said", "again"),
    [
        (401, {}, "LLMREC_API_KEY", False),
        (422, {}, "server</b> is unwell", False),
        (429, {"Retry-After": "40"}, "pause of 40 s", True),
        (500, {}, "is unwell", False),
        (503, {"Retry-After": "40"}, "pause of 40 s", True),
        (504, {}, "is unwell", True),
    ],
)
def test_errors_of_the_server_are_words(actions, session, small, status, headers, said, again):
    small.fail = (status, headers)
    actions.search(session, "i1")
    assert said in session.problem
    assert session.lost == again
    actions.recommend(session, INPUTS)
    assert said in session.answers[0].error
    assert session.answers[0].response is None
    assert session.problem == ""  # it stands where the answer would
    small.fail = None
    actions.search(session, "i1")
    assert session.problem == ""


def test_an_error_of_the_page_s_own_goes_to_the_log(caplog):
    said = in_words(KeyError("secret"))
    assert "KeyError" in said
    assert "secret" not in said
    assert "KeyError: 'secret'" in caplog.text
    assert in_words(RequestError("x" * 9000)) == "x" * 1000
    assert not is_silence(KeyError("x"))
    assert is_silence(BusyError("x", 1.0))
    assert is_silence(ServerError("x", 0))


def test_names_have_no_password_and_urls_are_checked():
    assert Target("http://127.0.0.1:8000/under/").name == "http://127.0.0.1:8000/under"
    for url in ("ftp://127.0.0.1", "http://user:secret@127.0.0.1:8000", "nowhere"):
        with pytest.raises(RequestError) as error:
            Target(url)
        assert "secret" not in str(error.value)
