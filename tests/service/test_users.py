"""The routes of users' histories, through both sides of HTTP: the client, and the application that it talks to."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from live_service import save_artefact, within

from llmrec.client import AsyncClient
from llmrec.exceptions import BusyError, LLMRecError, RequestError, ServerError
from llmrec.history_store import open_store
from llmrec.history_store.store import StoreAwayError
from llmrec.service.app import build_app
from llmrec.service.errors import problem_of
from llmrec.service.schema import StoredEvent
from llmrec.service.settings import ServiceSettings
from llmrec.service.users import users_router


def application(histories) -> FastAPI:
    """The routes alone, with the service's errors."""
    app = FastAPI()
    app.include_router(users_router())
    app.add_exception_handler(LLMRecError, lambda _, error: problem_of(error).response())
    app.state.llmrec = SimpleNamespace(histories=histories)
    return app


def served(body, histories) -> None:
    async def whole() -> None:
        transport = httpx.ASGITransport(application(histories))
        async with AsyncClient("http://h", transport=transport, retries=0) as client:
            await body(client)

    asyncio.run(whole())


def names(history) -> list[str]:
    return [event.item for event in history.events]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_history_is_kept_read_and_forgotten(kind, tmp_path):
    async def body(client):
        assert (await client.history("u")).events == []
        event = StoredEvent(item="a", action="view", domain="shop", timestamp=1.5)
        assert await client.append("u", [event, "b"]) is None
        await client.append("u", ["c"])
        await client.append("v", ["x"])
        found = await client.history("u")
        assert found.user_id == "u"
        assert found.events == [event, StoredEvent(item="b"), StoredEvent(item="c")]
        assert names(await client.history("u", last=2)) == ["b", "c"]
        assert names(await client.history("u", last=0)) == []
        assert await client.forget("u") is True
        assert await client.forget("u") is False
        assert (await client.history("u")).events == []
        assert names(await client.history("v")) == ["x"]

    served(body, open_store("memory:" if kind == "memory" else f"sqlite:{tmp_path}/h.db"))


PATHS = ["a/b", "/", "//", "a/events", "a/history", "events", "history", ".", "..", "../..", "a/../b", "\\"]
SIGNS = ["%2F", "%", "?x=1", "#x", "a;b", "*", "{user_id}", "+", "&", "a b", " ", "a"]
CONTROLS = ["a\n", "a\nb", "\n", "\r\n", "\x00"]
USERS = [*PATHS, *SIGNS, *CONTROLS, "ü", "日本", "x" * 1000, "🛋" * 1000]


def test_ids_of_any_characters_reach_the_store_as_they_are():
    store = open_store("memory:")

    async def body(client):
        for place, user in enumerate(USERS):
            await client.append(user, [str(place)])
        for place, user in enumerate(USERS):
            assert [event.item for event in await store.read(user, 10)] == [str(place)], ascii(user)
            found = await client.history(user)
            assert (found.user_id, names(found)) == (user, [str(place)])
        for place, user in enumerate(USERS):
            assert await client.forget(user)
            left = [len(await store.read(other, 10)) for other in USERS]
            assert left == [0] * (place + 1) + [1] * (len(USERS) - place - 1), ascii(user)

    served(body, store)


def raw(histories, method: str, path: str, **options) -> httpx.Response:
    async def whole() -> httpx.Response:
        transport = httpx.ASGITransport(application(histories))
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.request(method, path, **options)

    return asyncio.run(whole())


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/users//events", {"json": {"events": [{"item": "a"}]}}, 422),
        ("POST", f"/v1/users/{'x' * 1001}/events", {"json": {"events": [{"item": "a"}]}}, 422),
        ("POST", "/v1/users/u/events", {"json": {"events": []}}, 422),
        ("POST", "/v1/users/u/events", {"json": {"events": [{"item": "a", "more": 1}]}}, 422),
        ("POST", "/v1/users/u/events", {"json": {"events": [{"item": "a"}] * 10_001}}, 422),
        ("POST", "/v1/users/u/events", {"json": {"events": [{"item": "a", "timestamp": "nan"}]}}, 422),
        ("POST", "/v1/users/%FF/events", {"json": {"events": [{"item": "a"}]}}, 422),
        ("GET", "/v1/users/%FF%FE/history", {}, 422),
        ("GET", "/v1/users/u/history?last=-1", {}, 422),
        ("GET", "/v1/users/u/history?last=10001", {}, 422),
        ("DELETE", "/v1/users/%FF", {}, 422),
        ("GET", "/v1/users/u/events", {}, 405),
        ("POST", "/v1/users/u/history", {}, 405),
        ("GET", "/v1/users/u", {}, 405),
    ],
)
def test_what_cannot_be_done_is_refused(method, path, options, status):
    store = open_store("memory:")
    assert raw(store, method, path, **options).status_code == status
    assert not store._histories


def test_without_a_store_the_routes_say_so():
    async def body(client):
        for call in (client.history("u"), client.append("u", ["a"]), client.forget("u")):
            with pytest.raises(ServerError, match="keeps no histories") as caught:
                await call
            assert caught.value.status == 404

    served(body, None)


def test_a_store_that_is_away_is_a_503_with_a_time():
    class Away:
        async def append(self, user_id, events):
            raise StoreAwayError("Away. Later.")

        read = delete = append

    async def body(client):
        for call in (client.history("u"), client.append("u", ["a"])):
            with pytest.raises(BusyError, match=r"Away\. Later\. \(HTTP 503") as caught:
                await call
            assert caught.value.retry_after == 1.0

    served(body, Away())


def test_a_stored_history_is_what_is_recommended_for(tmp_path):
    """The whole service: a `user_id` gives the same answer as the history itself; unknown items are passed over."""

    async def body(service):
        async with AsyncClient("http://h", transport=httpx.ASGITransport(build_app(service)), retries=0) as client:
            await client.append("u", ["item-3", "item-7"])
            stored = await client.recommend(user_id="u", k=5)
            assert stored == await client.recommend(["item-3", "item-7"], k=5)
            assert stored != await client.recommend([], k=5)
            assert await client.recommend(user_id="nobody", k=5) == await client.recommend([], k=5)
            await client.append("u", ["not of the catalog"])
            assert await client.recommend(user_id="u", k=5) == stored
            with pytest.raises(RequestError, match="Give exactly one of"):
                await client.recommend(["item-3"], user_id="u")
            await client.forget("u")
            assert await client.recommend(user_id="u", k=5) == await client.recommend([], k=5)

    artefact = save_artefact(tmp_path / "artefact")
    within(artefact, ServiceSettings(history_store="memory:"), tmp_path / "index", body)
