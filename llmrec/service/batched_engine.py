"""BatchedEngine: a thread that runs a model, and searches together what waits for it; knows no model.

One thread takes what waits, puts requests of one group into batches within a budget, and answers them, each with its
own result or error.
"""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError, LLMRecError, RequestError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Asked:
    """A request on its way to the thread.

    Attributes:
        prompt, parameters, adapter: as asked.
        answer: what its asker waits for.
        items: which items it searches, in the engine's own form; once it is prepared.
    """

    prompt: list[int]
    parameters: SearchParameters
    adapter: str | None
    answer: "Future[Found]"
    items: Any = None


class BatchedEngine(ABC):
    """A `SearchEngine` on a model in this process.

    Attributes:
        max_tokens: whole numbers that the model reads at most, of a prompt and of an item behind it.
        dtype: of its weights.
        adapters: names of the LoRA adapters that a search may be run with.
    """

    max_tokens: int
    dtype: str
    adapters: list[str]

    def __init__(self, max_batch: int, budget: int) -> None:
        """Starts the thread, so a subclass calls it last.

        Args:
            max_batch: requests that are searched together.
            budget: what a batch may cost, see `_cost`; a single request may cost more.
        """
        self._max_batch, self._budget = max_batch, budget
        self._waiting: deque[Asked] = deque()
        self._wake = threading.Condition()
        self._ended = ""
        self._thread = threading.Thread(target=self._run, name="llmrec-search", daemon=True)
        self._thread.start()

    @abstractmethod
    def _prepare(self, asked: Asked) -> None:
        """Looks up the items that a request searches; what it raises is the request's answer."""

    @abstractmethod
    def _group(self, asked: Asked) -> Hashable:
        """What requests that go together have in common."""

    @abstractmethod
    def _cost(self, asked: Asked) -> int:
        """What a request adds to a batch, where all of its batch cost as much as the dearest."""

    @abstractmethod
    def _find(self, batch: Sequence[Asked]) -> list[Found]:
        """The answers of a batch of one group."""

    @property
    def errored(self) -> bool:
        """Whether it has ended for good."""
        return bool(self._ended) or not self._thread.is_alive()

    async def search(self, prompt: list[int], parameters: SearchParameters, adapter: str | None = None) -> Found:
        """One search. Cancelled before its turn it is never run; later, it ends with the batch that it is in.

        Raises:
            EngineError: if the search failed, its index file is not there, or the engine was closed.
            RequestError: if there is no such adapter, or the prompt or a cap does not fit the model or the catalog.
        """
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise RequestError(f"There is no adapter {adapter[:80]!r}. The server has: {known}.")
        asked = Asked(prompt, parameters, adapter, Future())
        with self._wake:
            if self._ended:
                raise EngineError(f"The engine has ended ({self._ended}). Restart the server.")
            self._waiting.append(asked)
            self._wake.notify()
        return await asyncio.wrap_future(asked.answer)

    def close(self) -> None:
        """Ends its thread, after the requests that it has taken; what waits fails with EngineError."""
        with self._wake:
            self._ended = self._ended or "it was closed"
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        taken: list[Asked] = []
        try:
            while taken := self._take():
                for batch in self._batches(taken):
                    self._answer(batch)
        except BaseException as error:  # a request's own errors are its answer; this is the end
            logger.exception("the engine's thread ended")
            self._ended = self._ended or f"{type(error).__name__}: {error}"
        with self._wake:
            left = [asked for asked in self._waiting if asked.answer.set_running_or_notify_cancel()]
            self._waiting.clear()
        for asked in [*taken, *left]:
            if not asked.answer.done():
                asked.answer.set_exception(EngineError(f"The engine has ended ({self._ended}). Restart the server."))

    def _take(self) -> list[Asked]:
        """What waits, once something does, as far as somebody still wants it; nothing when the engine is closed."""
        taken: list[Asked] = []
        while not taken:
            with self._wake:
                while not self._waiting and not self._ended:
                    self._wake.wait()
                if self._ended:
                    return []
                while self._waiting and len(taken) < self._max_batch:
                    taken.append(self._waiting.popleft())
            taken = [asked for asked in taken if asked.answer.set_running_or_notify_cancel()]
        return taken

    def _batches(self, taken: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Requests that go together, within the budget; those that fit no search are answered so."""
        groups: dict[Hashable, list[Asked]] = {}
        for asked in taken:
            try:
                self._prepare(asked)
                groups.setdefault(self._group(asked), []).append(asked)
            except Exception as error:
                asked.answer.set_exception(_told(error))
        for group in groups.values():
            batch: list[Asked] = []
            for asked in sorted(group, key=self._cost):
                if batch and (len(batch) + 1) * self._cost(asked) > self._budget:
                    yield batch
                    batch = []
                batch.append(asked)
            yield batch

    def _answer(self, batch: Sequence[Asked]) -> None:
        """Answers a batch; if it fails as a whole, each of its requests for itself."""
        try:
            found = self._find(batch)
        except Exception as error:
            if len(batch) > 1:
                for asked in batch:
                    self._answer([asked])
                return
            if not isinstance(error, LLMRecError):
                logger.exception("a search failed")
            batch[0].answer.set_exception(_told(error))
            return
        for asked, one in zip(batch, found, strict=True):
            asked.answer.set_result(one)


def _told(error: Exception) -> Exception:
    """An error as those who asked see it."""
    if isinstance(error, LLMRecError):
        return error
    return EngineError(f"The search failed ({type(error).__name__}: {str(error)[:200]}). The server's log has more.")
