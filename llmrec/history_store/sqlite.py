"""SQLiteStore: histories in a file, for one machine; several processes may share it."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from llmrec.exceptions import DataError
from llmrec.history_store.store import (
    MAX_EVENTS,
    StoreAwayError,
    checked_last,
    checked_user,
    packed,
    unpacked,
)
from llmrec.service.schema import StoredEvent

SCHEMA = 1
_APPLICATION = 0x6C6C6D72  # "llmr", in the file's header
_LOCK_SECONDS = 5.0  # a writer waits so long for another process's
_TABLE = """
CREATE TABLE events (
    user BLOB NOT NULL, place INTEGER NOT NULL, event TEXT NOT NULL, PRIMARY KEY (user, place)
) WITHOUT ROWID
"""

Result = TypeVar("Result")


class SQLiteStore:
    """A `HistoryStore` in an SQLite file with a write-ahead log.

    One thread writes and another reads, so that a read never waits for a write's fsync. An append that was answered is
    on the disk: it survives a kill -9 and a power cut. The file is for its owner's eyes alone.

    Attributes:
        path: of the file; `-wal` and `-shm` lie beside it.
        max_events: kept of each user.
    """

    def __init__(self, path: str | Path, max_events: int = MAX_EVENTS) -> None:
        """Opens the file, or makes it.

        Raises:
            DataError: if it cannot be opened, or was not made by this version of the store.
        """
        self.path = Path(path).absolute()
        self.max_events = max_events
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="histories-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="histories-reader")
        try:
            # The owner's alone from its first byte on; SQLite gives the files beside it the same rights.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._writing = self._writer.submit(self._open).result()
            self._reading = self._reader.submit(self._connect).result()
        except (OSError, sqlite3.Error, DataError) as error:
            self._writer.shutdown()
            self._reader.shutdown()
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"The history store {self.path} cannot be opened ({error}). Name a file of llmrec's, or a new one in "
                "a folder that is there and may be written to."
            ) from error

    def __repr__(self) -> str:
        return f"SQLiteStore({str(self.path)!r}, max_events={self.max_events})"

    async def append(self, user_id: str, events: Sequence[StoredEvent]) -> None:
        user = checked_user(user_id)
        lines = [packed(event) for event in events[-self.max_events :]]
        if lines:
            await self._run(self._writer, lambda: self._append(user, lines))

    async def read(self, user_id: str, last: int) -> list[StoredEvent]:
        user, count = checked_user(user_id), min(checked_last(last), self.max_events)
        query = "SELECT event FROM events WHERE user = ? ORDER BY place DESC LIMIT ?"
        rows = await self._run(self._reader, lambda: self._reading.execute(query, (user, count)).fetchall())
        return unpacked([line for (line,) in reversed(rows)])

    async def delete(self, user_id: str) -> bool:
        user = checked_user(user_id)
        deleted = await self._run(
            self._writer, lambda: self._writing.execute("DELETE FROM events WHERE user = ?", (user,)).rowcount
        )
        return deleted > 0

    async def close(self) -> None:
        for thread, connection in ((self._writer, self._writing), (self._reader, self._reading)):
            try:
                closed = thread.submit(connection.close)
            except RuntimeError:  # closed before
                continue
            thread.shutdown(wait=False)
            await asyncio.wrap_future(closed)

    def _append(self, user: bytes, lines: Sequence[str]) -> None:
        with _transaction(self._writing) as database:
            (end,) = database.execute(
                "SELECT COALESCE(MAX(place), -1) + 1 FROM events WHERE user = ?", (user,)
            ).fetchone()
            rows = [(user, place, line) for place, line in enumerate(lines, start=end)]
            database.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)
            oldest = end + len(lines) - self.max_events
            database.execute("DELETE FROM events WHERE user = ? AND place < ?", (user, oldest))

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except sqlite3.OperationalError as error:
            raise StoreAwayError(
                f"The history store {self.path.name} cannot be used now ({error}). Try again; if it stays so, look at "
                "its disk."
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"The history store {self.path.name} is damaged ({error}). Restore it, or start with a new file."
            ) from error
        except RuntimeError as error:  # what a thread says that takes no more work
            raise StoreAwayError("The history store is closed. Try again when the server is back.") from error

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_LOCK_SECONDS, isolation_level=None)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # who is forgotten does not live on in free pages
        return connection

    def _open(self) -> sqlite3.Connection:
        connection = self._connect()
        connection.execute("PRAGMA journal_mode = WAL")
        with _transaction(connection) as database:
            ((application,), (version,)) = (
                database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
            )
            tables = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if not tables and not application and not version:
                database.execute(_TABLE)
                database.execute(f"PRAGMA application_id = {_APPLICATION}")
                database.execute(f"PRAGMA user_version = {SCHEMA}")
            elif application != _APPLICATION:
                raise DataError(f"{self.path} is another program's database. Name another file for the histories.")
            elif version != SCHEMA:
                raise DataError(
                    f"The history store {self.path} is of schema {version}, and this llmrec reads {SCHEMA}. Use the "
                    "llmrec that wrote it, or name another file."
                )
        return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing, and the only writer of all processes'."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
