"""RedisStore: histories in Redis, which replicas share: one list of JSON per user."""

from collections.abc import Awaitable, Callable, Sequence
from re import compile as pattern
from typing import Any, TypeVar

from llmrec.exceptions import DataError, DeadlineError, DependencyError, RequestError
from llmrec.history_store.store import MAX_EVENTS, StoreAwayError, checked_last, checked_user, packed, unpacked
from llmrec.service.schema import StoredEvent

PREFIX = "llmrec"
_PREFIX = pattern("[A-Za-z0-9_.-]{1,64}")
_CONNECTIONS = 50
_SECONDS = 5.0  # for a connection, and for each answer

Result = TypeVar("Result")


class RedisStore:
    """A `HistoryStore` in Redis; a user's key is the prefix, a colon and the id, whatever characters that has.

    An append is one transaction of RPUSH, LTRIM and, with a time to live, EXPIRE. Commands touch one key each, so that
    a cluster's proxy may stand between. A dead connection is replaced; a read is tried a second time, an append never,
    for it may have been carried out: where Redis falls silent in the middle of one, DeadlineError says that nobody
    knows, and callers who try again when a store is away do not put the events there twice.

    Attributes:
        max_events: kept of each user.
        prefix: of all keys.
        ttl: seconds after a user's last append until Redis forgets the user; None for never.
    """

    def __init__(
        self,
        url: str,
        max_events: int = MAX_EVENTS,
        prefix: str = PREFIX,
        ttl: int | None = None,
        password: str | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: as redis-py reads it.
            max_events, prefix, ttl: see the attributes.
            password: where the URL has none.

        Raises:
            RequestError: if the URL cannot be read (it is not shown), or the prefix has other characters than letters,
                digits, `_`, `.` and `-`: with a colon, two stores could share keys.
            DependencyError: if redis-py is not installed.
        """
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as error:
            raise DependencyError("Histories in Redis need redis-py. Run: pip install 'llmrec[redis]'") from error
        if not _PREFIX.fullmatch(prefix):
            raise RequestError(
                f"{prefix[:80]!r} is no prefix of keys. Give 1 to 64 letters, digits, underscores, dots or hyphens."
            )
        self.max_events = max_events
        self.prefix = prefix
        self.ttl = ttl
        own: dict[str, Any] = {} if password is None else {"password": password}
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                # With RESP3, redis-py 8 listens for notices of maintenance, and looks no longer whether a connection
                # that it kept has been closed meanwhile. (What the URL says comes after these, and wins.)
                protocol=2,
                max_connections=_CONNECTIONS,
                timeout=_SECONDS,
                socket_timeout=_SECONDS,
                socket_connect_timeout=_SECONDS,
                retry=Retry(NoBackoff(), 0),
                **own,
            )
            pool.make_connection()  # which finds options that there are not
        except (ValueError, TypeError):
            # From nothing: the causes quote the URL's parts, the password among them.
            raise RequestError(
                "The URL of Redis cannot be read. Give one such as redis://127.0.0.1:6379/0, special characters of a "
                "password percent-encoded."
            ) from None
        self._redis = Redis.from_pool(pool)

    def __repr__(self) -> str:
        return f"RedisStore(prefix={self.prefix!r}, max_events={self.max_events}, ttl={self.ttl})"

    async def append(self, user_id: str, events: Sequence[StoredEvent]) -> None:
        key = self._key(user_id)
        lines = [packed(event) for event in events[-self.max_events :]]
        if not lines:
            return

        async def push() -> None:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.rpush(key, *lines)
                pipeline.ltrim(key, -self.max_events, -1)
                if self.ttl is not None:
                    pipeline.expire(key, self.ttl)
                await pipeline.execute()

        # A connection that has died is found out now, when nothing has been asked of it yet.
        await _asked(self._redis.ping, tries=2)
        await _asked(push, tries=1, changes=True)

    async def read(self, user_id: str, last: int) -> list[StoredEvent]:
        key, count = self._key(user_id), min(checked_last(last), self.max_events)
        if not count:  # -0 would be the first of all
            return []
        lines: list[bytes | str] = await _asked(lambda: self._redis.lrange(key, -count, -1), tries=2)
        return unpacked(lines)

    async def delete(self, user_id: str) -> bool:
        key = self._key(user_id)
        deleted: int = await _asked(lambda: self._redis.delete(key), tries=1)
        return deleted > 0

    async def close(self) -> None:
        await self._redis.aclose()

    def _key(self, user_id: str) -> bytes:
        return self.prefix.encode() + b":" + checked_user(user_id)


async def _asked(ask: Callable[[], Awaitable[Result]], tries: int, changes: bool = False) -> Result:
    """What Redis answers; where the connection is lost, it is asked up to `tries` times in all.

    `changes` says that what was asked may have been done although no answer came.
    """
    from redis.exceptions import ConnectionError as NotConnectedError
    from redis.exceptions import RedisError, ResponseError
    from redis.exceptions import TimeoutError as SilentError

    while True:
        tries -= 1
        try:
            return await ask()
        except (RedisError, OSError) as error:
            if isinstance(error, ResponseError) and "WRONGTYPE" in str(error):
                raise DataError(
                    "Redis keeps no history under this user's key. Give llmrec a database or a prefix of its own."
                ) from error
            if tries and isinstance(error, NotConnectedError):
                continue
            if changes and isinstance(error, (NotConnectedError, SilentError, OSError)):
                raise DeadlineError(
                    f"Redis gave no answer to a change of a history ({type(error).__name__}): whether it was made is "
                    "not known. Read the history before sending the events again."
                ) from error
            # By its kind alone: what redis-py says may quote addresses and more, and this text goes to whoever asked.
            raise StoreAwayError(
                f"The history store in Redis cannot be asked now ({type(error).__name__}). Try again; if it stays so, "
                "look at Redis and at the store's URL."
            ) from error
