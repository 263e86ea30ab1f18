"""Admission: how many beam rows the engine is given at once, how many may wait for it; first come, first served.

A search that is still being prepared (its history is read, its filter's trie built) has its place, which counts as
waiting, and holds no rows of the engine: however slow a history store is, searches without one go on.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llmrec.service.errors import DrainingError, QueueFullError

# The measured rate forgets half of what it saw in so many seconds of work.
_HALF_LIFE = 20.0
_LONGEST_RETRY = 60.0


class Ticket:
    """The place of one search: being prepared, in the queue, then running, then over.

    Attributes:
        rows: what it costs.
    """

    def __init__(self, admission: "Admission", rows: int) -> None:
        self.rows = rows
        self._admission = admission
        self._granted = asyncio.Event()
        self.over = False

    @property
    def running(self) -> bool:
        return self._granted.is_set() and not self.over

    async def granted(self) -> None:
        """Returns when the search may begin; the rows are its until `release`. It stands in the queue from now on."""
        self._admission._line_up([self])
        await self._granted.wait()

    def release(self, completed: bool = True) -> None:
        """Gives the rows back, or leaves the queue; a second call does nothing.

        Args:
            completed: whether the engine did the work, which then counts in the measured rate.
        """
        self._admission._leave(self, completed)


class Admission:
    """A queue of searches, counted in beam rows.

    The head of the queue begins as soon as its rows fit beside the running ones. None overtakes it: a wide search
    waits for enough narrow ones to end, and not for all that come after it.

    Attributes:
        running, waiting, preparing: rows.
        rate: rows per second that the engine did while it had any; None before it did some.
        draining: whether nothing new is taken.
    """

    def __init__(
        self, max_running: int, max_waiting: int, clock: Callable[[], float] = time.monotonic, draining: bool = False
    ) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.draining = draining
        self.running = 0
        self.waiting = 0
        self.preparing = 0
        self.changed: Callable[[int, int], None] = lambda running, waiting: None
        self._queue: deque[Ticket] = deque()
        self._preparing: set[Ticket] = set()  # those that are being prepared
        self._clock = clock
        self._seen = clock()
        self._busy, self._done = 0.0, 0.0  # seconds with work, and rows that were done in them, both fading

    @property
    def rate(self) -> float | None:
        return self._done / self._busy if self._done > 0 and self._busy > 0 else None

    @property
    def retry_after(self) -> float:
        """Seconds until all that is here now should be done, 1 to 60; 1 as long as nothing was measured."""
        if self.rate is None:
            return 1.0
        return float(min(max(math.ceil((self.running + self._held) / self.rate), 1), _LONGEST_RETRY))

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether searches of so many rows each could ever enter together: they do when nothing else is here."""
        return self._left_waiting(rows, 0) <= self.max_waiting and max(rows, default=0) <= self.max_running

    @property
    def _held(self) -> int:
        """Rows that are here and do not run."""
        return self.waiting + self.preparing

    @contextmanager
    def enter(self, rows: Sequence[int], prepared: bool = True) -> Iterator[list[Ticket]]:
        """Places for searches of so many rows each, all or none; on the way out those that were not released are.

        Args:
            prepared: whether they could begin now; if not, each lines up when it asks to be granted.

        Raises:
            QueueFullError: if they do not fit into the queue.
            DrainingError: if nothing new is taken.
        """
        tickets = self._enter(rows, prepared)
        try:
            yield tickets
        finally:
            for ticket in tickets:
                ticket.release(completed=False)

    def _enter(self, rows: Sequence[int], prepared: bool = True) -> list[Ticket]:
        if self.draining:
            raise DrainingError(
                "The server is being stopped and takes no new requests. Ask another, or this one in a while.",
                self.retry_after,
            )
        if self._queue:
            waiting = self._held + sum(rows)
        else:  # those that are being prepared come first
            taken = self.running + self.preparing
            left = max(0, taken - self.max_running)
            waiting = left + self._left_waiting(rows, taken - left)
        if waiting > self.max_waiting:
            raise QueueFullError(
                f"{self.running} beam rows are running and {self._held} wait; {sum(rows)} more are over the "
                f"limit of {self.max_waiting} waiting. Ask again later, or for fewer items or beams.",
                self.retry_after,
            )
        tickets = [Ticket(self, count) for count in rows]
        self._preparing.update(tickets)
        self.preparing += sum(rows)
        if prepared:
            self._line_up(tickets)
        else:
            self._tell()
        return tickets

    def _line_up(self, tickets: Sequence[Ticket]) -> None:
        """Puts those that are being prepared at the end of the queue."""
        for ticket in tickets:
            if ticket in self._preparing:
                self._preparing.remove(ticket)
                self.preparing -= ticket.rows
                self._queue.append(ticket)
                self.waiting += ticket.rows
        self._admit()

    def _left_waiting(self, rows: Sequence[int], running: int) -> int:
        """Rows that would wait if these came to an empty queue."""
        for place, count in enumerate(rows):
            if running + count > self.max_running:
                return sum(rows[place:])
            running += count
        return 0

    def _admit(self) -> None:
        self._measure()
        while self._queue and self.running + self._queue[0].rows <= self.max_running:
            ticket = self._queue.popleft()
            self.waiting -= ticket.rows
            self.running += ticket.rows
            ticket._granted.set()
        self._tell()

    def _tell(self) -> None:
        self.changed(self.running, self._held)

    def _leave(self, ticket: Ticket, completed: bool) -> None:
        if ticket.over:
            return
        if ticket.running:
            self._measure()
            self.running -= ticket.rows
            if completed:
                self._done += ticket.rows
        elif ticket in self._preparing:
            self._preparing.remove(ticket)
            self.preparing -= ticket.rows
        else:
            self._queue.remove(ticket)
            self.waiting -= ticket.rows
        ticket.over = True
        self._admit()

    def _measure(self) -> None:
        """Counts the time since the last change as work if there was any."""
        now = self._clock()
        if self.running:
            fade = 0.5 ** ((now - self._seen) / _HALF_LIFE)
            self._busy = self._busy * fade + now - self._seen
            self._done *= fade
        self._seen = now
