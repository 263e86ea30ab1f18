"""Item-CF: co-occurrence that knows order, decayed by distance and by age."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from scipy import sparse

from llmrec.evaluation.baselines.ranking import Places, Rows, Scores, batch_size, counted, filled, flattened, recent
from llmrec.exceptions import DataError


class ItemCF:
    """Item-to-item collaborative filtering: co-occurrence within a window, decayed by distance and by age.

    From the last `max_train` items of each training sequence, every pair at distance d = 1..`window` adds 1 / d to
    C[earlier, later] (1 more at d = 1) and `backward` / d to C[later, earlier]; C[i, j] is then divided by
    sqrt(count_i · count_j). An item's score is the sum, over the last `max_history` items of a history, of
    `decay`^age · C[item, ·], where the last item has age 0. Ties (scores are compared to 12 decimals, because the
    order of a float sum must not decide) go by training popularity, then by item row; items without a score follow
    by popularity.

    Attributes:
        similarity: (N, N) sparse, C after the division.
        counts: (N,) occurrences in the training items that were used.
        order: (N,) item rows, the most popular first.
    """

    # What `fit` does not look at: a fitted model may take another value of these.
    query_parameters = frozenset({"decay", "max_history"})

    similarity: Any
    counts: Places
    order: Places

    def __init__(
        self,
        window: int = 5,
        backward: float = 0.7,
        decay: float = 0.8,
        max_train: int = 200,
        max_history: int = 20,
    ) -> None:
        """Raises DataError if a value is out of range."""
        if min(window, max_train, max_history) < 1:
            raise DataError(
                f"window is {window}, max_train {max_train}, max_history {max_history}. Give at least 1 for each."
            )
        if backward < 0 or not 0 < decay <= 1:
            raise DataError(
                f"backward is {backward}, decay {decay}. Give a backward of 0 or more and a decay in (0, 1]."
            )
        self.window = window
        self.backward = backward
        self.decay = decay
        self.max_train = max_train
        self.max_history = max_history

    def fit(self, train: Sequence[Rows], num_items: int) -> Self:
        """Counts pairs over training sequences of item rows; raises DataError for a row outside the catalog."""
        train = [sequence[-self.max_train :] for sequence in train]
        self.counts, self.order = counted(train, num_items)
        flat, owner = flattened(train)
        total: Any = sparse.csr_array((num_items, num_items), dtype=np.float64)
        for distance in range(1, self.window + 1):
            same = owner[distance:] == owner[:-distance]
            earlier, later = flat[:-distance][same], flat[distance:][same]
            forward = 1.0 / distance + (1.0 if distance == 1 else 0.0)
            for source, destination, weight in (
                (earlier, later, forward),
                (later, earlier, self.backward / distance),
            ):
                pairs = (np.full(len(source), weight), (source, destination))
                total = total + sparse.coo_array(pairs, shape=(num_items, num_items)).tocsr()
        scale = sparse.diags_array(1.0 / np.sqrt(np.maximum(self.counts, 1)))
        self.similarity = (scale @ total @ scale).tocsr()
        return self

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[Places]:
        """The k best item rows per history, best first; fewer where fewer are left.

        Args:
            histories: item rows, oldest first; an empty one gets the most popular items.
            k: how many to recommend.
            exclude_seen: whether items of the whole history are no candidates.
        """
        num_items = len(self.order)
        place = np.empty(num_items, dtype=np.int64)  # in the order of popularity, which decides a tie
        place[self.order] = np.arange(num_items)
        seen = np.zeros(num_items, dtype=bool)
        nothing = np.empty(0, dtype=np.int64)
        recommended = []
        size = batch_size(num_items)
        for start in range(0, len(histories), size):
            batch = histories[start : start + size]
            scores = self._sparse_scores(batch)
            for user, history in enumerate(batch):
                run = slice(scores.indptr[user], scores.indptr[user + 1])
                rows, values = scores.indices[run], scores.data[run]
                excluded = history if exclude_seen else nothing
                seen[excluded] = True
                candidate = ~seen[rows] & (values > 0)
                seen[excluded] = False
                rows, values = rows[candidate], values[candidate]
                if 0 < k < len(values):
                    # All that tie with the k-th are kept until popularity has decided among them.
                    close = values >= np.partition(values, len(values) - k)[len(values) - k]
                    rows, values = rows[close], values[close]
                best = np.lexsort((place[rows], -values))[:k]
                recommended.append(filled(rows[best], self.order, excluded, k))
        return recommended

    def scores(self, histories: Sequence[Rows]) -> Scores:
        """(B, N) float64, 0 for an item without a score; by falling score, ties by `order`, they give `recommend`."""
        dense: Scores = self._sparse_scores(histories).toarray()
        return dense

    @property
    def parameters(self) -> int:
        """Stored numbers that are not 0."""
        return int(self.similarity.count_nonzero())

    def _sparse_scores(self, histories: Sequence[Rows]) -> Any:
        """Scores of the items that have one, (B, N) sparse, to 12 decimals."""
        items, user, age = recent(histories, self.max_history)
        shape = (len(histories), self.similarity.shape[0])
        scores = (sparse.coo_array((self.decay**age, (user, items)), shape=shape).tocsr() @ self.similarity).tocsr()
        scores.data = np.round(scores.data, 12)
        return scores
