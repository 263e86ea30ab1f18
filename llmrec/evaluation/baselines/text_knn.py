"""TextKNN: items whose text is near that of the last items."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from llmrec.evaluation.baselines.ranking import Places, Rows, Scores, best, counted, recent
from llmrec.exceptions import DataError


class TextKNN:
    """Nearest neighbours of a history's decayed mean in the space of item embeddings.

    Embeddings are scaled to norm 1. A history's vector is the mean of its last `max_history` items' embeddings with
    weights `decay`^age, where the last item has age 0, and an item's score is the cosine between the two. An empty
    history, or one whose vector is 0, scores 0 throughout, and an item without an embedding (a vector of 0) scores 0.
    Scores are compared to 6 decimals, because products of the same texts may differ in their last bits; ties go by
    training popularity, then by item row. Training has no other part in it.

    Attributes:
        embeddings: (N, D) float32, rows of norm 1 or 0.
        counts: (N,) occurrences in training.
        order: (N,) item rows, the most popular first.

    >>> model = TextKNN(np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])).fit([np.array([0])], num_items=3)
    >>> model.scores([np.array([0])]).round(1).tolist()
    [[1.0, 0.0, 0.6000000238418579]]
    """

    query_parameters = frozenset({"decay", "max_history"})

    embeddings: npt.NDArray[np.float32]
    counts: Places
    order: Places

    def __init__(self, embeddings: npt.NDArray[np.floating[Any]], decay: float = 0.8, max_history: int = 20) -> None:
        """`embeddings` is (N, D); raises DataError if it is no finite matrix, or a value is out of range."""
        vectors = np.asarray(embeddings, dtype=np.float32)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise DataError(
                f"The embeddings have the shape {vectors.shape}, or hold NaN or infinity. "
                "Give one finite vector per item."
            )
        if max_history < 1 or not 0 < decay <= 1:
            raise DataError(f"max_history is {max_history}, decay {decay}. Give at least 1, and a decay in (0, 1].")
        self.embeddings = _unit(vectors)
        self.decay = decay
        self.max_history = max_history

    def fit(self, train: Sequence[Rows], num_items: int) -> Self:
        """Counts items, for ties.

        Raises:
            DataError: if there is not one embedding per item, or a row lies outside the catalog.
        """
        if len(self.embeddings) != num_items:
            raise DataError(
                f"There are {len(self.embeddings)} embeddings and {num_items} items. Embed the items of this table."
            )
        self.counts, self.order = counted(train, num_items)
        return self

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[Places]:
        """The k best item rows per history, best first; fewer where fewer are left."""
        return best(self.scores, histories, k, self.order, exclude_seen)

    def scores(self, histories: Sequence[Rows]) -> Scores:
        """(B, N) float32 cosines, to 6 decimals."""
        items, user, age = recent(histories, self.max_history)
        weights = (self.decay**age).astype(np.float32)
        shape = (len(histories), len(self.embeddings))
        # A sum has the mean's direction.
        sums = sparse.coo_array((weights, (user, items)), shape=shape).tocsr() @ self.embeddings
        cosines: Scores = _unit(sums) @ self.embeddings.T
        return np.round(cosines, 6, out=cosines)

    @property
    def parameters(self) -> int:
        """Stored numbers that are not 0; they were given, not fitted."""
        return int(np.count_nonzero(self.embeddings))


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = vectors / np.where(norms > 0, norms, 1)
    return scaled
