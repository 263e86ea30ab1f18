"""MemoryStore: histories in this process; they end with it, and other replicas do not see them."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice

from llmrec.history_store.store import MAX_EVENTS, MAX_USERS, checked_last, checked_user
from llmrec.service.schema import StoredEvent


class MemoryStore:
    """A `HistoryStore` of the users that were used last; for one event loop.

    Attributes:
        max_events: kept of each user.
        max_users: kept; where one more comes, the one is dropped that was neither appended to nor read for longest.
    """

    def __init__(self, max_events: int = MAX_EVENTS, max_users: int | None = MAX_USERS) -> None:
        self.max_events = max_events
        self.max_users = max_users or MAX_USERS
        self._histories: OrderedDict[bytes, deque[StoredEvent]] = OrderedDict()

    async def append(self, user_id: str, events: Sequence[StoredEvent]) -> None:
        user = checked_user(user_id)
        if not events:
            return
        history = self._histories.setdefault(user, deque(maxlen=self.max_events))
        history.extend(event.model_copy() for event in events)
        self._histories.move_to_end(user)
        if len(self._histories) > self.max_users:
            self._histories.popitem(last=False)

    async def read(self, user_id: str, last: int) -> list[StoredEvent]:
        user, count = checked_user(user_id), checked_last(last)
        history = self._histories.get(user)
        if history is None:
            return []
        self._histories.move_to_end(user)
        return [event.model_copy() for event in islice(history, max(0, len(history) - count), None)]

    async def delete(self, user_id: str) -> bool:
        return self._histories.pop(checked_user(user_id), None) is not None

    async def close(self) -> None:
        self._histories.clear()
