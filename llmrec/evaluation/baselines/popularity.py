"""Popularity: everyone is recommended what is taken most, of all time or of late."""

import logging
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.baselines.ranking import Places, Rows, Scores, counted, filled, flattened
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

_DAY = 86_400.0


class Popularity:
    """Everyone is recommended the items most frequent in training; the frequency may be that of the last days alone.

    * `half_life_days` h: an interaction that is d days older than the newest of training counts 2^(-d / h).
    * `last_share` s: the newest interactions count, a share s of those of known time; all that tie with the oldest of
      them count too, so that the order inside a day does not decide.
    * Neither: every interaction counts 1.

    Weights are compared to 9 decimals, because the order of a float sum must not decide. Ties go by the occurrences in
    all of training, then by item row.

    Attributes:
        weights: (N,) what each item's interactions count together, its score for everyone.
        counts: (N,) occurrences in training.
        order: (N,) item rows, the best first.

    >>> model = Popularity().fit([np.array([2, 1]), np.array([2, 0])], num_items=4)
    >>> [rows.tolist() for rows in model.recommend([np.array([2])], k=3)]
    [[0, 1, 3]]
    >>> times = [np.array([0.0, 8640000.0]), np.array([0.0, 0.0])]
    >>> Popularity(half_life_days=50).fit([np.array([2, 1]), np.array([2, 0])], 4, times).weights.tolist()
    [0.25, 1.0, 0.5, 0.0]
    """

    weights: npt.NDArray[np.float64]
    counts: Places
    order: Places

    def __init__(self, half_life_days: float | None = None, last_share: float | None = None) -> None:
        """Raises DataError if both are given, or a value is out of range."""
        if half_life_days is not None and last_share is not None:
            raise DataError("half_life_days and last_share are two ways of the same. Give one of them.")
        if half_life_days is not None and not half_life_days > 0:
            raise DataError(f"half_life_days is {half_life_days}. Give days above 0.")
        if last_share is not None and not 0 < last_share <= 1:
            raise DataError(f"last_share is {last_share}. Give a share above 0 and up to 1.")
        self.half_life_days = half_life_days
        self.last_share = last_share

    @property
    def needs_times(self) -> bool:
        """Whether `fit` needs timestamps."""
        return self.half_life_days is not None or self.last_share is not None

    def fit(
        self,
        train: Sequence[Rows],
        num_items: int,
        timestamps: Sequence[npt.NDArray[np.floating[Any]]] | None = None,
    ) -> Self:
        """Counts items over training sequences of item rows.

        Args:
            train: item rows, one array per user.
            num_items: N.
            timestamps: unix seconds, one array per user, as long as its items; NaN where unknown. Only for recent
                popularity, where interactions of unknown time do not count, which is warned of with their number.

        Raises:
            DataError: if a row lies outside the catalog, or recent popularity gets no timestamps, none that is known,
                or not one per item.
        """
        self.counts, _ = counted(train, num_items)
        self.weights = self.counts.astype(np.float64)
        if self.needs_times:
            flat, _ = flattened(train)
            weights = self._recency(train, timestamps)
            self.weights = np.round(np.bincount(flat, weights=weights, minlength=num_items), 9)
        self.order = np.lexsort((-self.counts, -self.weights)).astype(np.int64)
        return self

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[Places]:
        """The k best item rows per history, best first; fewer where fewer are left."""
        nothing = np.empty(0, dtype=np.int64)
        return [filled(nothing, self.order, h if exclude_seen else nothing, k) for h in histories]

    def scores(self, histories: Sequence[Rows]) -> Scores:
        """(B, N) the weights, once per history."""
        return np.tile(self.weights, (len(histories), 1))

    @property
    def parameters(self) -> int:
        """Stored numbers that are not 0."""
        return int(np.count_nonzero(self.weights))

    def _recency(
        self, train: Sequence[Rows], timestamps: Sequence[npt.NDArray[np.floating[Any]]] | None
    ) -> npt.NDArray[np.float64]:
        """What every interaction counts, users one after another."""
        if timestamps is None:
            raise DataError(
                "Recent popularity needs timestamps, and these interactions have none. "
                "Name their column with --timestamp-column, or use the popularity of all time."
            )
        lengths, expected = [len(one) for one in timestamps], [len(one) for one in train]
        if lengths != expected:
            raise DataError(
                f"Training has {sum(expected)} items of {len(expected)} users, the timestamps are {sum(lengths)} of "
                f"{len(lengths)}, or differ by user. Give one timestamp per item."
            )
        times = np.concatenate([np.asarray(one, dtype=np.float64) for one in timestamps] or [np.empty(0)])
        known = np.isfinite(times)
        if not known.any():
            raise DataError(
                f"None of the {len(times)} training interactions has a known time. "
                "Name another column with --timestamp-column, or use the popularity of all time."
            )
        if not known.all():
            logger.warning(
                "%d of %d training interactions have no known time and do not count as recent, such as number %d",
                int((~known).sum()),
                len(times),
                int(known.argmin()) + 1,
            )
        weights = np.zeros(len(times))
        if self.half_life_days is not None:
            weights[known] = np.exp2((times[known] - times[known].max()) / (_DAY * self.half_life_days))
        elif self.last_share is not None:
            # A hair less than the product, which a float may put above the whole number that it is.
            newest = max(1, int(np.ceil(int(known.sum()) * self.last_share - 1e-9)))
            weights[known & (times >= np.sort(times[known])[-newest])] = 1.0
        return weights
