"""Ranking metrics with several relevant items per case, counted on items; `metrics` is for one target.

What the literature leaves open is settled here: an item that a list repeats is found at its first place and takes a
place at the others; every metric divides by what a perfect list could reach within k, except Recall and Precision,
which are what their names say.
"""

from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.ranks import Lists, Places, flattened
from llmrec.exceptions import DataError

SetMetric = Literal["HR", "Recall", "Precision", "NDCG", "MRR", "MAP"]


@dataclass(frozen=True)
class Relevance:
    """At which places C ranked lists hold relevant items, H hits in all.

    Attributes:
        owner: (H,) the list of every hit, ascending.
        place: (H,) its place in the list, from 0, ascending inside a list.
        totals: (C,) how many items are relevant, found or not; 1 or more.

    >>> found = Relevance.from_lists([[5, 7, 9], [1, 2]], [[9, 5, 3], [4]])
    >>> found.place.tolist(), found.values("Recall", 2).round(4).tolist(), found.values("HR", 2).tolist()
    ([0, 2], [0.3333, 0.0], [1.0, 0.0])
    """

    owner: Places = field(repr=False)
    place: Places = field(repr=False)
    totals: Places = field(repr=False)

    @classmethod
    def from_lists(cls, recommended: Lists, relevant: Lists) -> Self:
        """Looks up what lists hold of sets of relevant items.

        Args:
            recommended: C lists of item rows, best first, of any lengths; or (C, k), negative values being padding,
                which takes a place and is no item.
            relevant: C lists of item rows in any order, or an array padded with negative values; a repeated item
                counts once.

        Raises:
            DataError: if there are not as many lists as sets, or a set is empty: its recall is 0 / 0.
        """
        if len(recommended) != len(relevant):
            raise DataError(f"{len(recommended)} lists do not fit {len(relevant)} sets of relevant items. Give pairs.")
        num_cases = len(relevant)
        flat, owner, place = flattened(recommended)
        wanted, case, _ = flattened(relevant)
        case, wanted = case[wanted >= 0], wanted[wanted >= 0]
        num_rows = int(max(flat.max(initial=0), wanted.max(initial=0))) + 1
        keys = np.unique(case * num_rows + wanted)
        totals = np.bincount(keys // num_rows, minlength=num_cases).astype(np.int64)
        empty = np.flatnonzero(totals == 0)
        if len(empty):
            raise DataError(
                f"{len(empty)} case(s) have no relevant item, such as case {empty[0]}. "
                "Leave them out and say how many."
            )
        slots = owner * num_rows + flat
        hit = np.flatnonzero((flat >= 0) & np.isin(slots, keys))
        _, first = np.unique(slots[hit], return_index=True)
        hit = hit[np.sort(first)]
        return cls(owner[hit], place[hit], totals)

    def values(self, metric: SetMetric, k: int) -> npt.NDArray[np.float64]:
        """The value (C,) of every case at the cut-off k; their mean is the metric.

        With h_i = 1 for a relevant item at place i from 1, n = Σ_{i≤k} h_i of R relevant items:

        * HR: 1 if n > 0. Recall: n / R, which k < R keeps below 1. Precision: n / k, also for lists shorter than k.
        * NDCG: Σ_{i≤k} h_i / log2(i + 1), by the same sum of a list that begins with min(k, R) relevant items
          (Järvelin and Kekäläinen 2002, with binary gains).
        * MRR: 1 / i of the first hit, 0 if it is beyond k.
        * MAP: Σ_{i≤k} h_i · (hits up to i) / i, by min(k, R). Others divide by R, so that k < R keeps a perfect list
          below 1, or by n, so that what is missed costs nothing.

        Raises:
            DataError: if k is below 1, or the metric is not known.
        """
        if metric not in get_args(SetMetric):
            raise DataError(f"{metric!r} is not known. Choose one of {', '.join(get_args(SetMetric))}.")
        if k < 1:
            raise DataError(f"k is {k}, which leaves no place for a hit. Give 1 or more.")
        start = np.searchsorted(self.owner, np.arange(len(self.totals)))
        nth = np.arange(len(self.owner)) - start[self.owner]  # hits of the same list before this one
        inside = self.place < k
        owner, place, nth = self.owner[inside], self.place[inside], nth[inside]
        if metric == "NDCG":
            most = int(min(k, self.totals.max(initial=1)))
            ideal = np.cumsum(1 / np.log2(np.arange(most) + 2.0))
            gains, best = 1 / np.log2(place + 2.0), ideal[np.minimum(self.totals, most) - 1]
        elif metric == "MAP":
            gains, best = (nth + 1) / (place + 1), np.minimum(self.totals, k).astype(np.float64)
        elif metric in ("HR", "MRR"):  # both are of the first hit alone
            gains = (nth == 0) / (place + 1 if metric == "MRR" else np.ones(len(place)))
            best = np.ones(len(self.totals))
        elif metric == "Precision":
            gains, best = np.ones(len(place)), np.full(len(self.totals), float(k))
        else:
            gains, best = np.ones(len(place)), self.totals.astype(np.float64)
        found: npt.NDArray[np.float64] = np.bincount(owner, weights=gains, minlength=len(self.totals)) / best
        return found
