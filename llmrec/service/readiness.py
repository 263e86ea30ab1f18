"""Readiness: whether a server would answer, found by asking it for a recommendation now and then."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from llmrec.exceptions import EngineError

logger = logging.getLogger(__name__)

Canary = Callable[[], Awaitable[object]]


class Readiness:
    """Asks a canary recommendation at the start and every `interval` seconds; a wrong, failed or late one tells.

    Attributes:
        failure: why the last one did not pass; None if it did.
    """

    def __init__(
        self,
        canary: Canary,
        interval: float,
        timeout: float,
        told: Callable[[bool], None] = lambda passed: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            canary: raises if what it gets is wrong.
            interval: seconds from the end of one to the beginning of the next.
            timeout: seconds after which one is given up.
            told: is told of each whether it passed.
        """
        self.failure: str | None = "No recommendation was tried yet. Ask again in some seconds."
        self._canary = canary
        self._interval, self._timeout = interval, timeout
        self._told = told
        self._clock = clock
        self._tried = clock()
        self._task: asyncio.Task[None] | None = None

    @property
    def reason(self) -> str | None:
        """Why it is not ready; None if it is."""
        if self.failure is not None:
            return self.failure
        silent = self._clock() - self._tried
        # A canary ends within its timeout; if it did not, the event loop or the task itself hangs.
        if silent > 2 * (self._interval + self._timeout):
            return f"No recommendation was tried for {silent:.0f} s. See the server's log."
        return None

    async def try_once(self, canary: Canary | None = None) -> None:
        """One canary, by default the usual one; raises EngineError if it does not pass."""
        try:
            async with asyncio.timeout(self._timeout):
                await (canary or self._canary)()
        except TimeoutError as error:
            self._failed(f"A recommendation took over {self._timeout:g} s")
            raise EngineError(f"{self.failure}") from error
        except Exception as error:
            # What failed may name files, which whoever asks for /ready has no business to know.
            self._failed("A recommendation failed or was wrong")
            raise EngineError(f"A canary recommendation failed: {error}") from error
        self.failure = None
        self._tried = self._clock()
        self._told(True)

    async def start(self, first: Canary) -> None:
        """A first canary of its own kind, then a task that goes on; raises EngineError if `first` does not pass."""
        await self.try_once(first)
        self._task = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.try_once()
            except EngineError as error:
                logger.error("Not ready: %s", error)
            except Exception:  # of who is told: the next one is tried all the same
                logger.exception("What a canary recommendation showed could not be told")

    def _failed(self, why: str) -> None:
        self.failure = f"{why}. See the server's log."
        self._tried = self._clock()
        self._told(False)
