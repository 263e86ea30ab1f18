"""One set of tests over every store: what holds of one holds of all."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrec.exceptions import RequestError
from llmrec.history_store import HistoryStore, open_store
from llmrec.service.schema import StoredEvent

Body = Callable[[HistoryStore], Awaitable[None]]
HOSTILE = [
    "u1",
    "ü" * 1000,
    "日本\u200d語🛋",
    "a\nb\r\nc",
    "*",
    "u*",
    "[a-z]?",
    "{u}",
    "{}",
    "{u}:x",
    "..",
    "a/b",
    "a:b",
    "a b",
    "%2F",
    "'; DROP TABLE events; --",
    '"',
    "\\",
    "\x00",
    "a\x00b",
    "a",
    "A",
    " a",
    "a ",
    "é",
    "e\u0301",
    "\ufffd",
    "None",
    "0",
]


@pytest.fixture(params=["memory", "sqlite", "redis"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """Runs a test's body with a new store of each kind."""
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")

    def url() -> str:
        name = uuid.uuid4().hex
        if request.param == "memory":
            return "memory:"
        return f"sqlite:{tmp_path / name}" if request.param == "sqlite" else f"{server.url}?prefix={name}"

    def inside(body: Body, max_events: int = 1000) -> None:
        async def whole() -> None:
            store = open_store(url(), max_events=max_events)
            try:
                await body(store)
            finally:
                await store.close()
                await store.close()

        asyncio.run(whole())

    return inside


def events(*items: str) -> list[StoredEvent]:
    return [StoredEvent(item=item) for item in items]


def names(found: list[StoredEvent]) -> list[str]:
    return [event.item for event in found]


def test_what_is_appended_is_read_in_order(run):
    async def body(store):
        assert await store.read("u", 10) == []
        await store.append("u", events("a", "b"))
        await store.append("u", events("c"))
        await store.append("v", events("x"))
        await store.append("u", [])
        assert names(await store.read("u", 10)) == ["a", "b", "c"]
        assert names(await store.read("u", 2)) == ["b", "c"]
        assert names(await store.read("u", 1)) == ["c"]
        assert await store.read("u", 0) == []
        assert names(await store.read("v", 10)) == ["x"]

    run(body)


def test_the_last_events_are_kept(run):
    async def body(store):
        for number in range(8):
            await store.append("u", events(str(number)))
        assert names(await store.read("u", 100)) == ["3", "4", "5", "6", "7"]
        await store.append("u", events(*"abc"))
        assert names(await store.read("u", 100)) == ["6", "7", "a", "b", "c"]
        await store.append("u", events(*map(str, range(100, 150))))
        assert names(await store.read("u", 100)) == ["145", "146", "147", "148", "149"]
        assert store.max_events == 5

    run(body, max_events=5)


def test_a_forgotten_user_is_gone_and_alone_so(run):
    async def body(store):
        await store.append("u", events("a"))
        await store.append("u2", events("b"))
        assert await store.delete("u") is True
        assert await store.delete("u") is False
        assert await store.read("u", 10) == []
        assert names(await store.read("u2", 10)) == ["b"]
        await store.append("u", events("c"))
        assert names(await store.read("u", 10)) == ["c"]

    run(body)


def test_ids_of_any_characters_are_users_of_their_own(run):
    async def body(store):
        for place, user in enumerate(HOSTILE):
            await store.append(user, events(user, f"{place}!"))
        for place, user in enumerate(HOSTILE):
            assert names(await store.read(user, 10)) == [user, f"{place}!"], ascii(user)
        for user in HOSTILE[::2]:
            assert await store.delete(user)
        for place, user in enumerate(HOSTILE):
            assert len(await store.read(user, 10)) == (2 if place % 2 else 0), ascii(user)

    run(body)


@pytest.mark.parametrize("user", ["", "x" * 1001, "\ud800", 7, None, b"u"])
def test_what_is_no_id_is_refused(run, user):
    async def body(store):
        with pytest.raises(RequestError, match="is no user id"):
            await store.append(user, events("a"))
        with pytest.raises(RequestError, match="is no user id"):
            await store.read(user, 1)
        with pytest.raises(RequestError, match="is no user id"):
            await store.delete(user)

    run(body)


def test_a_negative_count_is_refused(run):
    async def body(store):
        with pytest.raises(RequestError, match="last -1 events"):
            await store.read("u", -1)

    run(body)


TEXTS = st.one_of(st.none(), st.text(max_size=30))
EVENTS = st.builds(
    StoredEvent,
    item=st.text(min_size=1, max_size=30),
    action=TEXTS,
    domain=TEXTS,
    timestamp=st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
)


# `run` may serve many examples: every call makes a store of its own.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.tuples(st.text(min_size=1, max_size=3), st.lists(EVENTS, max_size=6)), max_size=12))
def test_events_come_back_as_they_were(run, calls):
    """Against a plain dict of lists, to the last bit of every timestamp."""

    async def body(store):
        kept: dict[str, list[StoredEvent]] = {}
        for user, some in calls:
            await store.append(user, some)
            kept[user] = (kept.get(user, []) + some)[-7:]
        for user, expected in kept.items():
            found = await store.read(user, 100)
            assert found == expected
            assert [repr(event.timestamp) for event in found] == [repr(event.timestamp) for event in expected]
            for last in (0, 1, 3):
                assert await store.read(user, last) == (expected[-last:] if last else [])

    run(body, max_events=7)


def test_appends_at_the_same_time_keep_their_order_and_lose_nothing(run):
    async def body(store):
        async def write(task: int) -> None:
            for number in range(12):
                await store.append("shared", events(*(f"{task}.{number}.{part}" for part in range(3))))
                await store.append(f"own {task}", events(str(number)))

        await asyncio.gather(*(write(task) for task in range(8)))
        found = names(await store.read("shared", 1000))
        assert len(found) == len(set(found)) == 8 * 12 * 3
        for task in range(8):
            mine = [item for item in found if item.startswith(f"{task}.")]
            assert mine == [f"{task}.{number}.{part}" for number in range(12) for part in range(3)]
            assert names(await store.read(f"own {task}", 100)) == [str(number) for number in range(12)]
        # What one call appended lies together.
        assert all(
            found[place].rpartition(".")[0] == found[place - place % 3].rpartition(".")[0] for place in range(288)
        )

    run(body)


def test_what_was_read_is_not_the_store(run):
    async def body(store):
        given_event = StoredEvent(item="a", action="view")
        await store.append("u", [given_event])
        given_event.action = "changed"
        found = await store.read("u", 1)
        found[0].item = "changed"
        found.clear()
        assert await store.read("u", 1) == [StoredEvent(item="a", action="view")]

    run(body)


def test_long_histories_fit(run):
    async def body(store):
        await store.append("u", events(*map(str, range(10_000))))
        assert names(await store.read("u", 10_000)) == [str(number) for number in range(10_000)]
        assert names(await store.read("u", 3)) == ["9997", "9998", "9999"]

    run(body, max_events=10_000)
