"""HistoryStore: what the service asks of a store of histories; `open_store` makes one from a URL."""

import os
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import parse_qsl, urlencode

from pydantic import ValidationError

from llmrec.exceptions import BusyError, DataError, RequestError
from llmrec.service.schema import MAX_HISTORY, StoredEvent

REDIS_PASSWORD = "LLMREC_REDIS_PASSWORD"
MAX_EVENTS = 1_000
MAX_USERS = 100_000

_LONGEST_ID = 1_000  # characters, as in the schema
_KINDS = "Give memory:, sqlite:PATH, redis://HOST:PORT/DB, rediss://… or unix://PATH."


class StoreAwayError(BusyError):
    """The store cannot be asked now: Redis is away, a file locked, a disk full."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after=1.0)


class HistoryStore(Protocol):
    """The last events of each user, in the order in which they were appended.

    All that one call of `append` is given lands together and in its order, and calls for one user land one after the
    other. The last `max_events` of each user are kept. A `read` after an `append` sees it.

    Every method raises RequestError for a user id that is none (it has 1 to 1,000 characters that UTF-8 can spell),
    StoreAwayError where the store cannot be asked now and nothing was changed (the service's 503), and DataError where
    it holds what no store of llmrec's wrote. `append` raises DeadlineError (504) where nobody knows whether it was
    done.
    """

    max_events: int

    async def append(self, user_id: str, events: Sequence[StoredEvent]) -> None:
        """Puts events at the end of a user's history, oldest first. All of them land or none."""
        ...

    async def read(self, user_id: str, last: int) -> list[StoredEvent]:
        """The last so many events, oldest first; none of an unknown user. RequestError where `last` is below 0."""
        ...

    async def delete(self, user_id: str) -> bool:
        """Forgets a user; whether there was anything to forget."""
        ...

    async def close(self) -> None:
        """Gives back connections, files and threads; a second time does nothing."""
        ...


def open_store(url: str, max_events: int = MAX_EVENTS) -> HistoryStore:
    """The store that a URL names; Redis is connected to at the first call.

    Args:
        url: `memory:` (the 100,000 users that were used last; `memory:?users=N`), `sqlite:PATH`, or `redis://`,
            `rediss://` (TLS) and `unix://` as redis-py reads them. Keys in Redis begin with `llmrec`
            (`?prefix=NAME`) and are kept for ever (`?ttl=SECONDS` after a user's last event). Process lists show a
            password in a URL; it may stand in the variable LLMREC_REDIS_PASSWORD instead.
        max_events: kept of each user.

    Raises:
        RequestError: if the URL or a number is none. No message shows the URL, which may hold a password.
        DataError: if the file cannot be opened, or is no store of llmrec's.
        DependencyError: if redis-py is not installed.
    """
    if not 1 <= max_events <= MAX_HISTORY:
        raise RequestError(f"max_events is {max_events}. Keep 1 to {MAX_HISTORY} events of each user.")
    scheme, colon, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        from llmrec.history_store.sqlite import SQLiteStore

        return SQLiteStore(rest, max_events)  # as it is: a path may have a question mark
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if scheme == "memory" and colon and not place.strip("/"):
        from llmrec.history_store.memory import MemoryStore

        if options.keys() - {"users"}:
            raise RequestError("The history store memory: has one option, users. Leave the others out.")
        return MemoryStore(max_events, _number(options, "users", MAX_USERS))
    if scheme in ("redis", "rediss", "unix"):
        from llmrec.history_store.redis import PREFIX, RedisStore

        prefix, ttl = options.pop("prefix", PREFIX), _number(options, "ttl", None)
        options.pop("ttl", None)
        address = f"{scheme}:{place}" + (f"?{urlencode(options)}" if options else "")
        return RedisStore(address, max_events, prefix, ttl, os.environ.get(REDIS_PASSWORD))
    raise RequestError(f"The history store's URL names no kind that there is. {_KINDS}")


def checked_user(user_id: str) -> bytes:
    """A user's id in UTF-8; raises RequestError if it is none."""
    try:
        if not 1 <= len(user_id) <= _LONGEST_ID:
            raise ValueError(f"it has {len(user_id)} characters")
        return user_id.encode()
    except (TypeError, AttributeError, ValueError) as error:
        raise RequestError(
            f"{ascii(user_id)[:80]} is no user id. Give a string of 1 to 1,000 characters that UTF-8 can spell."
        ) from error


def checked_last(last: int) -> int:
    """How many events to read; raises RequestError below 0."""
    if last < 0:
        raise RequestError(f"The last {last} events of a history were asked for. Ask for 0 or more.")
    return last


def packed(event: StoredEvent) -> str:
    """An event as JSON."""
    return event.model_dump_json(exclude_none=True)


def unpacked(lines: Sequence[str | bytes]) -> list[StoredEvent]:
    """Events that `packed` wrote; raises DataError for others, and does not show them."""
    try:
        return [StoredEvent.model_validate_json(line) for line in lines]
    except ValidationError:
        raise DataError(
            "The history store holds for this user what is no event. Give llmrec a file, or a prefix in Redis, of its "
            "own, or delete the user."
        ) from None


def _number(options: dict[str, str], name: str, default: int | None) -> int | None:
    value = options.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 2**31):
        raise RequestError(f"The history store's option {name} is {value[:40]!r}. Give a whole number above 0.")
    return int(value)
