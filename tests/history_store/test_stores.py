"""What is each store's own: what bounds, survives, breaks and is kept secret."""

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from llmrec.exceptions import BusyError, DataError, RequestError
from llmrec.history_store import open_store
from llmrec.history_store.memory import MemoryStore
from llmrec.history_store.redis import RedisStore
from llmrec.history_store.sqlite import SQLiteStore
from llmrec.history_store.store import StoreAwayError
from llmrec.service.schema import StoredEvent

SECRET = "geheim"


def events(*items: str) -> list[StoredEvent]:
    return [StoredEvent(item=item) for item in items]


async def names(store, user: str) -> list[str]:
    return [event.item for event in await store.read(user, 10_000)]


def test_memory_drops_the_user_that_was_not_used_for_longest():
    async def body():
        store = open_store("memory:?users=3", max_events=2)
        for user in "abc":
            await store.append(user, events(user))
        await store.read("a", 1)
        await store.append("b", events("b2"))
        await store.append("d", events("d"))
        assert [await names(store, user) for user in "abcd"] == [["a"], ["b", "b2"], [], ["d"]]
        # Users that are only asked for take no place.
        for number in range(10):
            await store.read(f"unknown {number}", 1)
        assert await names(store, "a") == ["a"]

    asyncio.run(body())


def test_urls_open_their_store(tmp_path, monkeypatch):
    assert isinstance(open_store("memory:"), MemoryStore)
    assert isinstance(open_store("memory://"), MemoryStore)
    odd = open_store(f"sqlite:{tmp_path}/what?.db", max_events=3)
    assert isinstance(odd, SQLiteStore)
    assert odd.path == tmp_path / "what?.db"
    assert odd.max_events == 3
    monkeypatch.chdir(tmp_path)
    relative = open_store("sqlite:here.db")
    assert (tmp_path / "here.db").is_file()
    redis = open_store("rediss://u:p@h:1/2?ttl=60&prefix=shop&socket_timeout=9")
    assert isinstance(redis, RedisStore)
    assert (redis.prefix, redis.ttl, redis.max_events) == ("shop", 60, 1000)
    for store in (odd, relative, redis):
        asyncio.run(store.close())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory:x",
        "memory:?user=3",
        "memory:?users=0",
        "memory:?users=x",
        "sqlite:",
        "postgres://u:geheim@h/db",
        "redis://:geheim@h:port/0",
        "redis://:geheim#@h/0",
        "redis://:geheim/x@h:1/0",
        "redis://:geheim@h/0?prefix=a:b",
        "redis://:geheim@h/0?prefix=",
        "redis://:geheim@h/0?ttl=-1",
        "redis://:geheim@h/0?ttl=soon",
        "redis://:geheim@h/0?socket_timeout=soon",
        "redis://:geheim@h/0?nonsense=1",
        "redis://[geheim",
    ],
)
def test_a_url_that_is_none_is_refused_without_being_shown(url):
    with pytest.raises(RequestError) as caught:
        open_store(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("count", [0, -1, 10_001])
def test_a_store_of_no_or_too_many_events_is_refused(count):
    with pytest.raises(RequestError, match=f"max_events is {count}"):
        open_store("memory:", max_events=count)


# SQLite.


def test_sqlite_is_there_after_closing_and_is_the_owners(tmp_path):
    async def write():
        store = open_store(f"sqlite:{tmp_path}/h.db")
        await store.append("u", events("a", "b"))
        for name in ("h.db", "h.db-wal"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        await store.close()
        with pytest.raises(StoreAwayError, match="closed"):
            await store.append("u", events("c"))

    async def read():
        store = open_store(f"sqlite:{tmp_path}/h.db", max_events=1)
        assert await names(store, "u") == ["b"]
        await store.close()

    asyncio.run(write())
    asyncio.run(read())


KILLED = """
import asyncio, sys
from llmrec.history_store import open_store
from llmrec.service.schema import StoredEvent
async def main():
    store = open_store(sys.argv[1], max_events=10_000)
    for number in range(100_000):
        await store.append("u", [StoredEvent(item=f"{number}.{part}") for part in range(4)])
        print(number, flush=True)
asyncio.run(main())
"""


def test_sqlite_survives_kill_9_with_all_that_it_answered(tmp_path):
    url = f"sqlite:{tmp_path}/h.db"
    process = subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE, text=True)
    answered = -1
    for line in process.stdout:
        answered = int(line)
        if answered >= 60:
            break
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    answered = int(rest[-1]) if rest and rest[-1] else answered

    async def read():
        store = open_store(url, max_events=10_000)
        found = await names(store, "u")
        await store.append("u", events("after"))
        assert (await names(store, "u"))[-1] == "after"
        await store.close()
        return found

    found = asyncio.run(read())
    whole = [f"{number}.{part}" for number in range(len(found) // 4) for part in range(4)]
    assert found == whole  # calls whole, in order
    assert len(found) // 4 in (answered + 1, answered + 2)  # the one being written may have landed


SHARED = """
import asyncio, sys
from llmrec.history_store import open_store
from llmrec.service.schema import StoredEvent
async def main():
    store = open_store(sys.argv[1])
    for number in range(25):
        await store.append("u", [StoredEvent(item=f"{sys.argv[2]}.{number}.{part}") for part in range(2)])
    await store.close()
asyncio.run(main())
"""


def test_sqlite_is_shared_by_processes(tmp_path):
    """Which open it at the same time, when it is not there yet."""
    url = f"sqlite:{tmp_path}/h.db"
    processes = [subprocess.Popen([sys.executable, "-c", SHARED, url, str(number)]) for number in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]

    async def read():
        store = open_store(url)
        found = await names(store, "u")
        await store.close()
        return found

    found = asyncio.run(read())
    assert len(found) == len(set(found)) == 150
    for number in range(3):
        mine = [item for item in found if item.startswith(f"{number}.")]
        assert mine == [f"{number}.{call}.{part}" for call in range(25) for part in range(2)]


def test_sqlite_says_so_where_another_writes_for_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("llmrec.history_store.sqlite._LOCK_SECONDS", 0.05)

    async def body():
        store = open_store(f"sqlite:{tmp_path}/h.db")
        await store.append("u", events("a"))
        other = sqlite3.connect(tmp_path / "h.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError, match="locked") as caught:
            await store.append("u", events("b"))
        assert caught.value.retry_after == 1.0
        assert await names(store, "u") == ["a"]  # reading needs no lock
        other.execute("ROLLBACK")
        await store.append("u", events("c"))
        assert await names(store, "u") == ["a", "c"]
        await store.close()

    asyncio.run(body())


def _other_database(path: Path, statements: str) -> None:
    database = sqlite3.connect(path)
    database.executescript(statements)
    database.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no database at all, but long enough for a header" * 10), "cannot be opened"),
        (lambda path: path.mkdir(), "cannot be opened"),
        (lambda path: _other_database(path, "CREATE TABLE mine (x)"), "another program's"),
        (lambda path: _other_database(path, "PRAGMA application_id = 77"), "another program's"),
        (
            lambda path: _other_database(path, "PRAGMA application_id = 1819045234; PRAGMA user_version = 2"),
            "schema 2",
        ),
    ],
)
def test_sqlite_touches_no_file_of_others(tmp_path, make, message):
    path = tmp_path / "h.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(DataError, match=message):
        open_store(f"sqlite:{path}")
    if before is not None and message == "cannot be opened":
        assert path.read_bytes() == before
    elif before is not None:
        tables = sqlite3.connect(path).execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'events'").fetchone()
        assert tables == (0,)


def test_sqlite_needs_its_folder(tmp_path):
    with pytest.raises(DataError, match="in a folder that is there"):
        open_store(f"sqlite:{tmp_path}/no/h.db")


def test_sqlite_forgets_for_good(tmp_path):
    async def body(forget: bool):
        store = open_store(f"sqlite:{tmp_path}/h.db")
        if forget:
            await store.delete("u")
        else:
            await store.append("u", events("the-secret-item"))
            await store.append("v", events("another-item"))
        await store.close()

    asyncio.run(body(False))
    assert b"the-secret-item" in (tmp_path / "h.db").read_bytes()
    asyncio.run(body(True))
    assert b"the-secret-item" not in (tmp_path / "h.db").read_bytes()
    assert b"another-item" in (tmp_path / "h.db").read_bytes()


def test_sqlite_keeps_no_more_than_the_last_events(tmp_path):
    """In the file, that is, and not only in what is read."""

    async def body():
        store = open_store(f"sqlite:{tmp_path}/h.db", max_events=3)
        for number in range(7):
            await store.append("u", events(f"{number}a", f"{number}b"))
        other = sqlite3.connect(tmp_path / "h.db")
        assert other.execute("SELECT COUNT(*) FROM events").fetchone() == (3,)
        other.close()
        await store.close()

    asyncio.run(body())


def test_a_damaged_event_is_an_error_that_does_not_show_it(tmp_path):
    async def body():
        store = open_store(f"sqlite:{tmp_path}/h.db")
        await store.append("u", events("a"))
        other = sqlite3.connect(tmp_path / "h.db")
        other.execute("UPDATE events SET event = ?", ('{"item": "a", "geheim": 1}',))
        other.commit()
        with pytest.raises(DataError, match="no event") as caught:
            await store.read("u", 1)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        await store.close()

    asyncio.run(body())


# Redis.


def test_redis_has_a_list_per_user_under_its_prefix(redis_server):
    import redis

    plain = redis.Redis(port=redis_server.port)

    async def body():
        store = open_store(f"{redis_server.url}?prefix=one&ttl=100", max_events=2)
        other = open_store(f"{redis_server.url}?prefix=two", max_events=2)
        await store.append("ü:{x}*", events("a", "b", "c"))
        await other.append("ü:{x}*", events("d"))
        assert await names(other, "ü:{x}*") == ["d"]
        key = "one:ü:{x}*".encode()
        assert plain.lrange(key, 0, -1) == [b'{"item":"b"}', b'{"item":"c"}']
        assert 0 < plain.ttl(key) <= 100
        assert plain.ttl("two:ü:{x}*") == -1
        plain.expire(key, 10)
        await store.append("ü:{x}*", events("d"))
        assert plain.lrange(key, 0, -1) == [b'{"item":"c"}', b'{"item":"d"}']
        assert plain.ttl(key) > 10  # counted from the last append
        plain.set("one:number", "1")
        for use in (store.append("number", events("a")), store.read("number", 1)):
            with pytest.raises(DataError, match="no history under this user's key"):
                await use
        plain.rpush("one:other", "not json")
        with pytest.raises(DataError, match="no event"):
            await store.read("other", 1)
        await store.close()
        await other.close()

    asyncio.run(body())
    plain.close()


def test_redis_comes_back(own_redis):
    """Stopped and started again: errors say so in between, and then neither an append nor a read fails."""

    async def body():
        store = open_store(own_redis.url)
        await asyncio.gather(*(store.append(f"u{number}", events("a")) for number in range(20)))
        own_redis.stop()
        for use in (store.append("u0", events("lost")), store.read("u0", 1), store.delete("u0")):
            with pytest.raises(BusyError, match="cannot be asked now") as caught:
                await use
            assert caught.value.retry_after == 1.0
            assert SECRET not in "".join(traceback.format_exception(caught.value))
        own_redis.start()
        await asyncio.gather(*(store.append(f"u{number}", events("b")) for number in range(20)))
        assert [await names(store, f"u{number}") for number in range(20)] == [["a", "b"]] * 20
        await store.close()

    asyncio.run(body())


def test_redis_restarted_between_two_calls_is_not_noticed(own_redis):
    async def body():
        store = open_store(own_redis.url)
        for round_ in range(3):
            await asyncio.gather(*(store.append(f"u{number}", events(str(round_))) for number in range(10)))
            await asyncio.to_thread(own_redis.stop)
            await asyncio.to_thread(own_redis.start)
        assert await names(store, "u3") == ["0", "1", "2"]
        await store.close()

    asyncio.run(body())


def test_redis_password_is_read_from_the_environment_and_shown_nowhere(own_redis, monkeypatch, caplog):
    caplog.set_level(0)
    plain = f"redis://127.0.0.1:{own_redis.port}/0"

    async def body():
        monkeypatch.setenv("LLMREC_REDIS_PASSWORD", own_redis.password)
        store = open_store(plain)
        await store.append("u", events("a"))
        assert await names(store, "u") == ["a"]
        assert SECRET not in repr(store)
        await store.close()
        for url in (plain, f"redis://:{SECRET}wrong@127.0.0.1:{own_redis.port}/0"):
            monkeypatch.setenv("LLMREC_REDIS_PASSWORD", "")
            refused = open_store(url)
            with pytest.raises(BusyError, match="cannot be asked now") as caught:
                await refused.append("u", events("a"))
            assert SECRET not in "".join(traceback.format_exception(caught.value))
            assert SECRET not in repr(refused)
            await refused.close()

    asyncio.run(body())
    assert SECRET not in caplog.text


def test_a_cancelled_call_leaves_the_next_one_its_own_answer(redis_server):
    async def body():
        store = open_store(f"{redis_server.url}?prefix=cancelled")
        for number in range(20):
            await store.append(f"u{number}", events(str(number)))
        for number in range(100):
            reading = asyncio.create_task(store.read(f"u{number % 20}", 1))
            await asyncio.sleep(0.0002 * (number % 5))
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            other = (number + 1) % 20
            assert [event.item for event in await store.read(f"u{other}", 1)] == [str(other)]
        await store.close()

    asyncio.run(body())
