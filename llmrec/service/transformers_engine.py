"""TransformersEngine: searches with a transformers model in this process; a whole server in seconds, without vLLM.

One thread runs the model. It takes what waits, puts requests of as many beams and of one adapter into one search
(`llmrec.decoding.decode`), each with its own trie, and answers them. What vLLM adds is a paged cache, prefixes shared
between requests and a GPU's speed; the parameters, the index files and the answers are the same.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrec.beam import normalizer
from llmrec.decoding import decode, pad_left
from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError, LLMRecError, RequestError
from llmrec.selection import Draw, PrefixCap
from llmrec.service.index_files import IndexFiles
from llmrec.trie_tensors import TrieTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# So many tokens, of prompts and beams, are held by one search's cache: bounds its memory.
CACHED_TOKENS = 32_000
_MAX_BATCH = 64
_MAX_TRIES = 128


@dataclass(eq=False)
class _Asked:
    """A request on its way to the thread."""

    prompt: list[int]
    parameters: SearchParameters
    adapter: str | None
    answer: "Future[Found]"
    trie: TrieTensors | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Requests of one group are searched together."""
        assert self.trie is not None
        return self.adapter or "", self.parameters.num_beams, self.trie.num_levels

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, and of the beams."""
        assert self.trie is not None
        return len(self.prompt) + min(self.parameters.num_beams, self.trie.num_leaves) * self.trie.num_levels


class TransformersEngine:
    """A `SearchEngine` on a transformers model.

    Attributes:
        max_tokens: the model's positions.
        dtype: of its weights.
        adapters: names of the LoRA adapters that a PEFT model holds; a plain model has none.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        index_folder: str | Path,
        index: str = "",
        max_batch: int = _MAX_BATCH,
        cached_tokens: int = CACHED_TOKENS,
    ) -> None:
        """Starts its thread.

        Args:
            model: a causal LM in eval mode, or a PEFT model around one. It is this engine's alone until `close`.
            index_folder: see `IndexFiles`.
            index: the file that requests without one mean.
            max_batch: requests that are searched together.
            cached_tokens: that one search holds; a single request may need more.
        """
        self.max_tokens = int(getattr(model.config, "max_position_embeddings", None) or 2**31 - 1)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.adapters = sorted(getattr(model, "peft_config", {}))
        self._model: Any = model
        self._files = IndexFiles(index_folder)
        self._index = index
        self._max_batch, self._cached_tokens = max_batch, cached_tokens
        self._tries: OrderedDict[str, TrieTensors] = OrderedDict()
        self._waiting: deque[_Asked] = deque()
        self._wake = threading.Condition()
        self._ended = ""
        self._thread = threading.Thread(target=self._run, name="llmrec-search", daemon=True)
        self._thread.start()

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
        asked = _Asked(prompt, parameters, adapter, Future())
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
        taken: list[_Asked] = []
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

    def _take(self) -> list[_Asked]:
        """What waits, once something does, as far as somebody still wants it; nothing when the engine is closed."""
        taken: list[_Asked] = []
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

    def _batches(self, taken: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Requests that go together, within the budget of cached tokens; those that fit no search are answered so."""
        groups: dict[tuple[Any, ...], list[_Asked]] = {}
        for asked in taken:
            try:
                asked.trie = self._trie_of(asked.parameters)
                groups.setdefault(asked.group, []).append(asked)
            except Exception as error:
                asked.answer.set_exception(_told(error))
        for group in groups.values():
            batch: list[_Asked] = []
            for asked in sorted(group, key=lambda one: one.cached_tokens):
                # The newest is the longest, and the batch is padded to it.
                if batch and (len(batch) + 1) * asked.cached_tokens > self._cached_tokens:
                    yield batch
                    batch = []
                batch.append(asked)
            yield batch

    def _answer(self, batch: Sequence[_Asked]) -> None:
        """Answers a batch; if it fails as a whole, each of its requests for itself."""
        try:
            with self._adapted(batch[0].adapter):
                found = self._search(batch) if batch[0].parameters.num_beams else self._next_tokens(batch)
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

    def _search(self, batch: Sequence[_Asked]) -> list[Found]:
        asked = [one.parameters for one in batch]
        ran: list[float] = []
        hook = self._model.register_forward_hook(lambda *_: ran.append(time.perf_counter()))
        try:
            beams = decode(
                self._model,
                [one.prompt for one in batch],
                [one.trie for one in batch if one.trie is not None],
                asked[0].num_beams,
                excluded=[np.array(one.excluded, dtype=np.int64) for one in asked],
                renormalize=[one.renormalize for one in asked],
                caps=[PrefixCap(one.cap_levels, one.cap) if one.cap else None for one in asked],
                draws=[Draw(one.temperature, one.seed) if one.temperature else None for one in asked],
            )
        finally:
            hook.remove()
        seconds = time.perf_counter() - ran[0] if ran else 0.0
        found = []
        for row, one in enumerate(asked):
            rows = beams.items[row, : one.k].tolist()
            count = sum(item >= 0 for item in rows)  # legal items come first
            scores, levels = beams.scores[row, :count].tolist(), beams.levels[row, :count].tolist()
            found.append(Found(rows[:count], scores, levels, seconds))
        return found

    @torch.inference_mode()
    def _next_tokens(self, batch: Sequence[_Asked]) -> list[Found]:
        """The log-probability of one token after each prompt, from an ordinary prefill."""
        if longest := [one for one in batch if not 0 < len(one.prompt) <= self.max_tokens]:
            raise RequestError(
                f"A prompt of {len(longest[0].prompt)} tokens does not fit the model's {self.max_tokens} positions. "
                "Shorten the history."
            )
        device = self._model.device
        tokens, mask, positions = pad_left([one.prompt for one in batch], device)
        output = self._model(input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        found = []
        for one, logits in zip(batch, output.logits[:, -1], strict=True):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            assert one.trie is not None
            value = float(logits[one.parameters.token] - normalizer(logits, one.trie.vocabulary)[0])
            found.append(Found([0], [value], [[value] + [0.0] * (one.trie.num_levels - 1)], 0.0))
        return found

    def _trie_of(self, asked: SearchParameters) -> TrieTensors:
        """The trie that a request searches; raises EngineError if there is no such file."""
        trie = self._mapped(asked.subset or asked.index or self._index)
        return trie if asked.allowed is None else trie.subset(np.array(asked.allowed, dtype=np.int64))

    def _mapped(self, name: str) -> TrieTensors:
        if name not in self._tries:
            # No request names a file that was removed, and what is mapped of it would go on taking its place on disk.
            for gone in [known for known in self._tries if not self._files.size(known)]:
                del self._tries[gone]
            try:
                path = self._files.path(name)
                self._tries[name] = TrieTensors.map(path, device=self._model.device)
            except LLMRecError as error:
                raise EngineError(f"A search's index cannot be read: {error}") from error
            while len(self._tries) > _MAX_TRIES:
                self._tries.popitem(last=False)
        self._tries.move_to_end(name)
        return self._tries[name]

    @contextmanager
    def _adapted(self, adapter: str | None) -> Iterator[None]:
        """Runs the model with one adapter, or with none."""
        if adapter is not None:
            self._model.set_adapter(adapter)
            yield
        elif self.adapters:
            with self._model.disable_adapter():
                yield
        else:
            yield


def _told(error: Exception) -> Exception:
    """An error as those who asked see it."""
    if isinstance(error, LLMRecError):
        return error
    return EngineError(f"The search failed ({type(error).__name__}: {str(error)[:200]}). The server's log has more.")
