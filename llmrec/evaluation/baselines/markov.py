"""Markov: the next item by what followed the last one, or the last two, in training."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from llmrec.evaluation.baselines.ranking import Places, Rows, Scores, best, counted, flattened, recent
from llmrec.exceptions import DataError


class Markov:
    """A Markov chain of order 1 or 2 over items, smoothed towards popularity.

    With n(i, j) the times that item j directly followed item i in a training sequence, n(i) their sum over j, p(j) the
    share of j among all training items and s = `smoothing`,

        P(j | i) = (n(i, j) + s p(j)) / (n(i) + s)

    and with `order` 2, for the items h, i before j,

        P(j | h, i) = (n(h, i, j) + s P(j | i)) / (n(h, i) + s)

    which is P(j | i) for a pair that training lacks (hierarchical Dirichlet smoothing: MacKay and Peto, Natural
    Language Engineering 1(3), 1995). Pseudo-counts are spread by popularity because even ones would not change the
    order of any list at order 1. Where n and s are both 0, the context adds nothing at order 1, and order 2 falls back
    on order 1.

    A history's score is the sum of `decay`^a P(· | the item of age a, and the one before it) over the ages
    a < `max_history`, where the last item has age 0; 1 is the plain chain. An empty history scores p. Scores are
    compared to 12 decimals; ties go by training popularity, then by item row.

    Attributes:
        transitions: (N, N) sparse, n(i, j).
        pairs: (Q,) the contexts of order 2 as h · N + i, ascending; empty at order 1.
        pair_transitions: (Q, N) sparse, n(h, i, j).
        share: (N,) p.
        counts: (N,) occurrences in training.
        popular: (N,) item rows, the most popular first.

    >>> model = Markov(smoothing=0).fit([np.array([0, 1, 2]), np.array([0, 1, 3]), np.array([1, 3])], num_items=4)
    >>> model.scores([np.array([0, 1])]).round(2).tolist()
    [[0.0, 0.0, 0.33, 0.67]]
    """

    query_parameters = frozenset({"smoothing", "decay", "max_history"})

    transitions: Any
    pairs: Places
    pair_transitions: Any
    share: npt.NDArray[np.float64]
    counts: Places
    popular: Places

    def __init__(self, smoothing: float = 1.0, order: int = 1, max_history: int = 1, decay: float = 0.8) -> None:
        """Raises DataError if a value is out of range."""
        if not (smoothing >= 0 and np.isfinite(smoothing)):
            raise DataError(f"smoothing is {smoothing}. Give pseudo-counts of 0 or more.")
        if order not in (1, 2):
            raise DataError(f"order is {order}. Give 1 or 2.")
        if max_history < 1 or not 0 < decay <= 1:
            raise DataError(f"max_history is {max_history}, decay {decay}. Give at least 1, and a decay in (0, 1].")
        self.smoothing = smoothing
        self.order = order
        self.max_history = max_history
        self.decay = decay

    def fit(self, train: Sequence[Rows], num_items: int) -> Self:
        """Counts transitions over training sequences of item rows; raises DataError for a row outside the catalog."""
        self.counts, self.popular = counted(train, num_items)
        self.share = self.counts / max(1, int(self.counts.sum()))
        flat, owner = flattened(train)
        follows = owner[1:] == owner[:-1]
        self.transitions = _count(flat[:-1][follows], flat[1:][follows], (num_items, num_items))
        self.pairs = np.empty(0, dtype=np.int64)
        self.pair_transitions = sparse.csr_array((0, num_items))
        if self.order == 2:
            follows = owner[2:] == owner[:-2]
            keys = flat[:-2][follows] * num_items + flat[1:-1][follows]
            self.pairs, places = np.unique(keys, return_inverse=True)
            self.pair_transitions = _count(places, flat[2:][follows], (len(self.pairs), num_items))
        return self

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[Places]:
        """The k best item rows per history, best first; fewer where fewer are left."""
        return best(self.scores, histories, k, self.popular, exclude_seen)

    def scores(self, histories: Sequence[Rows]) -> Scores:
        """(B, N) float64, the sums of probabilities, to 12 decimals."""
        num_items = len(self.counts)
        # One item more than is summed over: the one before the oldest context of order 2.
        items, user, age = recent(histories, self.max_history + 1)
        weight = self.decay**age
        used = age < self.max_history
        shape = (len(histories), num_items)
        dense = np.zeros(shape)
        if self.order == 2 and len(self.pairs):
            # The entry after one is the item before it, if the history goes on.
            before = np.flatnonzero(used[:-1] & (user[1:] == user[:-1]))
            keys = items[before + 1] * num_items + items[before]
            places = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
            known = self.pairs[places] == keys
            before, places = before[known], places[known]
            totals = self.pair_transitions.sum(axis=1)[places] + self.smoothing
            context = (weight[before] / totals, (user[before], places))
            contexts = sparse.coo_array(context, shape=(len(histories), len(self.pairs))).tocsr()
            dense += (contexts @ self.pair_transitions).toarray()
            weight[before] *= self.smoothing / totals
        items, user, weight = items[used], user[used], weight[used]
        totals = self.transitions.sum(axis=1)[items] + self.smoothing
        weight = np.divide(weight, totals, out=np.zeros(len(weight)), where=totals > 0)
        contexts = sparse.coo_array((weight, (user, items)), shape=shape).tocsr()
        dense += (contexts @ self.transitions).toarray()
        popularity = self.smoothing * np.bincount(user, weights=weight, minlength=len(histories))
        popularity[[len(history) == 0 for history in histories]] = 1.0
        dense += popularity[:, None] * self.share
        rounded: Scores = np.round(dense, 12, out=dense)
        return rounded

    @property
    def parameters(self) -> int:
        """Stored numbers that are not 0: counts of transitions, and shares."""
        return int(self.transitions.nnz + self.pair_transitions.nnz + np.count_nonzero(self.share))


def _count(sources: Places, destinations: Places, shape: tuple[int, int]) -> Any:
    """How often each pair occurs, as a sparse matrix."""
    return sparse.coo_array((np.ones(len(sources)), (sources, destinations)), shape=shape).tocsr()
