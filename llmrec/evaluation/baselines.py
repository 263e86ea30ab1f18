"""Baselines without parameters to learn: popularity, and item-to-item co-occurrence that knows order.

A generative model that was shown only against weak baselines proves nothing; this item-CF beats the TIGER paper's
figures on its own data.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from llmrec.exceptions import DataError

Rows = npt.NDArray[np.integer[Any]]

_BATCH = 1024  # users scored at once


class Popularity:
    """Everyone is recommended the items most frequent in training, ties by item row.

    Attributes:
        counts: (N,) occurrences in training.
        order: (N,) item rows, the most popular first.

    >>> model = Popularity().fit([np.array([2, 1]), np.array([2, 0])], num_items=4)
    >>> [rows.tolist() for rows in model.recommend([np.array([2])], k=3)]
    [[0, 1, 3]]
    """

    counts: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    def fit(self, train: Sequence[Rows], num_items: int) -> Self:
        """Counts items over training sequences of item rows; raises DataError for a row outside the catalog."""
        self.counts, self.order = _popularity(train, num_items)
        return self

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[npt.NDArray[np.int64]]:
        """The k best item rows per history, best first; fewer where fewer are left."""
        nothing = np.empty(0, dtype=np.int64)
        return [_filled(nothing, self.order, h if exclude_seen else nothing, k) for h in histories]


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

    similarity: Any
    counts: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    def __init__(
        self,
        window: int = 5,
        backward: float = 0.7,
        decay: float = 0.8,
        max_train: int = 200,
        max_history: int = 20,
    ) -> None:
        self.window = window
        self.backward = backward
        self.decay = decay
        self.max_train = max_train
        self.max_history = max_history

    def fit(self, train: Sequence[Rows], num_items: int) -> Self:
        """Counts pairs over training sequences of item rows; raises DataError for a row outside the catalog."""
        train = [sequence[-self.max_train :] for sequence in train]
        self.counts, self.order = _popularity(train, num_items)
        flat, owner = _flattened(train)
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

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[npt.NDArray[np.int64]]:
        """The k best item rows per history, best first; fewer where fewer are left.

        Args:
            histories: item rows, oldest first; an empty one gets the most popular items.
            k: how many to recommend.
            exclude_seen: whether items of the whole history are no candidates.
        """
        num_items = len(self.order)
        # Columns in order of popularity, so that a lower column wins a tie.
        similarity = self.similarity[:, self.order]
        column = np.empty(num_items, dtype=np.int64)
        column[self.order] = np.arange(num_items)
        seen = np.zeros(num_items, dtype=bool)
        nothing = np.empty(0, dtype=np.int64)
        recommended = []
        for start in range(0, len(histories), _BATCH):
            batch = histories[start : start + _BATCH]
            scores = self._scores(batch, similarity)
            for user, history in enumerate(batch):
                run = slice(scores.indptr[user], scores.indptr[user + 1])
                columns, values = scores.indices[run], scores.data[run]
                excluded = history if exclude_seen else nothing
                seen[column[excluded]] = True
                candidate = ~seen[columns] & (values > 0)
                seen[column[excluded]] = False
                columns, values = columns[candidate], values[candidate]
                best = np.lexsort((columns, -values))[:k]
                recommended.append(_filled(self.order[columns[best]], self.order, excluded, k))
        return recommended

    def _scores(self, histories: Sequence[Rows], similarity: Any) -> Any:
        """Scores of the items that have one, (B, N) sparse, from a similarity (N, N) whose columns may be permuted."""
        recent = [history[::-1][: self.max_history] for history in histories]
        items, user = _flattened(recent)
        age = np.concatenate([np.arange(len(history)) for history in recent])
        shape = (len(histories), similarity.shape[0])
        scores = (sparse.coo_array((self.decay**age, (user, items)), shape=shape).tocsr() @ similarity).tocsr()
        scores.data = np.round(scores.data, 12)
        return scores


def _popularity(train: Sequence[Rows], num_items: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Occurrences (N,) and item rows (N,) by falling occurrences, ties by row."""
    flat, _ = _flattened(train)
    if len(flat) and (flat.min() < 0 or flat.max() >= num_items):
        wrong = flat.min() if flat.min() < 0 else flat.max()
        raise DataError(f"Training has the item row {wrong}, the catalog {num_items} items. Use rows of one catalog.")
    counts = np.bincount(flat, minlength=num_items).astype(np.int64)
    return counts, np.argsort(-counts, kind="stable").astype(np.int64)


def _filled(rows: Rows, order: npt.NDArray[np.int64], excluded: Rows, k: int) -> npt.NDArray[np.int64]:
    """`rows` and, up to k, the most popular items that are neither among them nor excluded."""
    if len(rows) >= k:
        return np.asarray(rows, dtype=np.int64)
    taken = np.concatenate([rows, excluded])
    popular = order[: k + len(taken)]
    filled: npt.NDArray[np.int64] = np.append(rows, popular[~np.isin(popular, taken)][: k - len(rows)])
    return filled.astype(np.int64)


def _flattened(sequences: Sequence[Rows]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All rows one after another, and the place of the sequence that each comes from."""
    lengths = [len(sequence) for sequence in sequences]
    flat = np.concatenate(sequences).astype(np.int64) if sequences else np.empty(0, dtype=np.int64)
    return flat, np.repeat(np.arange(len(lengths)), lengths)
