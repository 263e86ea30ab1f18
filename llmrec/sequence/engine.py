"""SequenceEngine: searches with a sequence model in this process, behind the same service as a language model's.

A prompt is what `HistoryEncoder` makes. Every search looks at every item, whatever its beams, unless retrieval is
faiss's; what waits is read by the model in one batch.
"""

import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError, LLMRecError, RequestError
from llmrec.selection import Draw, require_levels
from llmrec.sequence.history_encoder import ASKED, PER_EVENT, history_of
from llmrec.sequence.index import Retrieval, Wanted
from llmrec.sequence.live_items import LiveItems, LivePool
from llmrec.sequence.recommender import queries_of
from llmrec.service.batched_engine import Asked, BatchedEngine

if TYPE_CHECKING:
    from llmrec.sequence.model import SequenceModel

_MAX_BATCH = 64


class SequenceEngine(BatchedEngine):
    """A `SearchEngine` on a sequence model.

    A search with `num_beams` 0 gives the log-probability of the one item `token`, from the logits of all items at once
    and without the search's chunks: what a search is checked by.

    Attributes:
        max_tokens: whole numbers of the longest prompt.
        dtype: of the weights.
        adapters: none.
        events: what the model is told of events.
        items: the catalog versions that it searches.
    """

    def __init__(
        self, model: "SequenceModel", retrieval: Retrieval = "exact", index: str = "", max_batch: int = _MAX_BATCH
    ) -> None:
        """Computes the items' vectors and starts its thread.

        Args:
            model: in evaluation mode. It is this engine's alone until `close`.
            retrieval: how items are found.
            index: the version that requests without one mean.
            max_batch: requests that are searched together.
        """
        self.max_tokens = ASKED + PER_EVENT * int(model.config.max_history)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.adapters = []
        self.events = model.events
        self.items = LiveItems(model, retrieval)
        self._index = index
        super().__init__(max_batch, max_batch * self.max_tokens)

    async def search(self, prompt: list[int], parameters: SearchParameters, adapter: str | None = None) -> Found:
        """See `BatchedEngine.search`; also raises RequestError for a prompt that is no history of the catalog."""
        if parameters.cap:
            require_levels(parameters.cap_levels, 1)  # and a cap on the one level holds nothing back
        return await super().search(prompt, parameters, adapter)

    def _prepare(self, asked: Asked) -> None:
        parameters = asked.parameters
        if len(asked.prompt) > self.max_tokens:
            raise RequestError(
                f"A prompt of {len(asked.prompt)} numbers is longer than the model's {self.max_tokens}. "
                "Shorten the history."
            )
        try:
            found = self.items.find(parameters.subset or parameters.index or self._index)
        except LLMRecError as error:
            raise EngineError(f"A search's items are not there: {error}") from error
        history_of(asked.prompt, len(found.pool.mask))  # refused here, and not with its whole batch
        if parameters.allowed is not None:
            found = LivePool(found.table, found.pool.subset(parameters.allowed))
        asked.items = found

    def _group(self, asked: Asked) -> Hashable:
        return id(asked.items.table), bool(asked.parameters.num_beams)

    def _cost(self, asked: Asked) -> int:
        return len(asked.prompt)

    def _find(self, batch: Sequence[Asked]) -> list[Found]:
        table = batch[0].items.table
        count = len(table.index.table)
        queries = queries_of(table.model, [history_of(one.prompt, count) for one in batch])
        begin = time.perf_counter()
        if not batch[0].parameters.num_beams:
            return [self._one(one, query) for one, query in zip(batch, queries.split(1), strict=True)]
        wanted = []
        for one in batch:
            asked = one.parameters
            draw = Draw(asked.temperature, asked.seed) if asked.temperature else None
            wanted.append(Wanted(asked.k, one.items.pool, asked.excluded, asked.renormalize, draw))
        found = table.index.search(queries, wanted)
        seconds = time.perf_counter() - begin
        answers = []
        for ranked in found:
            scores = ranked.scores.tolist()
            answers.append(Found(ranked.rows.tolist(), scores, [[score] for score in scores], seconds))
        return answers

    def _one(self, asked: Asked, query: torch.Tensor) -> Found:
        """The log-probability of one item."""
        index, row = asked.items.table.index, asked.parameters.token
        if not 0 <= row < len(index.table):
            raise RequestError(f"Row {row} is not in a catalog of {len(index.table)}. Rows count from 0.")
        value = float(index.log_probability(query, row))
        return Found([0], [value], [[value]], 0.0)
