"""Ranking metrics with one target per user, counted on items, never on the strings that spell them.

A *rank* is the target's place in the recommended list, from 0, and -1 where the list lacks it. A list shorter than k
counts as it is: what it does not hold is missed.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Ranks = npt.NDArray[np.int64]
Lists = Sequence[Sequence[int] | npt.NDArray[np.integer[Any]]] | npt.NDArray[np.integer[Any]]

_Z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def ranks_of(recommended: Lists, targets: npt.ArrayLike) -> Ranks:
    """The place (B,) of each target in its list, from 0; -1 where it is absent, the first place where it is repeated.

    Args:
        recommended: B lists of item rows, best first, of any lengths; or (B, k), negative values being padding.
        targets: (B,) item rows.

    Raises:
        DataError: if there are not as many lists as targets, or a target is negative.

    >>> ranks_of([[4, 7], [], [3, 1, 2]], [7, 0, 3]).tolist()
    [1, -1, 0]
    """
    wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
    if len(recommended) != len(wanted):
        raise DataError(f"{len(recommended)} lists do not fit {len(wanted)} targets. Give one list per target.")
    if len(wanted) and wanted.min() < 0:
        raise DataError(f"A target is the item row {wanted.min()}. Rows count from 0: leave out users without one.")
    ranks = np.full(len(wanted), -1, dtype=np.int64)
    flat, owner, place = _flattened(recommended)
    hit = np.flatnonzero(flat == wanted[owner])[::-1]  # backwards, so that a repeated target's first place is kept
    ranks[owner[hit]] = place[hit]
    return ranks


def hit_rate(ranks: npt.ArrayLike, k: int) -> float:
    """HR@k, the share of users whose target is among the first k (Recall@k, there being one target).

    >>> hit_rate([0, 3, -1, 12], k=10)
    0.5
    """
    return float(_hits(ranks, k).mean())


def ndcg(ranks: npt.ArrayLike, k: int) -> float:
    """NDCG@k with one target: the mean of 1 / log2(rank + 2), 0 for a rank of k or more (the ideal gain is 1).

    >>> ndcg([0, 2, -1, 12], k=10)  # (1 + 1/2 + 0 + 0) / 4
    0.375
    """
    return float(_gains(ranks, k).mean())


def interval95(ranks: npt.ArrayLike, k: int, metric: Literal["HR", "NDCG"] = "HR") -> tuple[float, float]:
    """The 95 % confidence interval of HR@k (Wilson 1927) or NDCG@k (normal, with the sample's deviation) over users.

    It is about users drawn like these; it says nothing of training seeds. NDCG's needs two users: one has (0, 1).

    >>> low, high = interval95([0] * 10 + [-1] * 90, k=10)
    >>> round(low, 4), round(high, 4)
    (0.0552, 0.1744)
    """
    if metric == "HR":
        hits = _hits(ranks, k)
        n, p = len(hits), float(hits.mean())
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * float(np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)))
    else:
        gains = _gains(ranks, k)
        if len(gains) < 2:
            return 0.0, 1.0
        centre = float(gains.mean())
        half = _Z * float(gains.std(ddof=1)) / float(np.sqrt(len(gains)))
    return max(0.0, centre - half), min(1.0, centre + half)


def ranking_metrics(ranks: npt.ArrayLike, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """HR and NDCG at every k; the lists behind `ranks` should have max(ks) items.

    >>> ranking_metrics([0, -1], ks=(10,))
    {'HR@10': 0.5, 'NDCG@10': 0.5}
    """
    return {f"{name}@{k}": metric(ranks, k) for k in ks for name, metric in (("HR", hit_rate), ("NDCG", ndcg))}


def invalid_rate(lists: Lists, num_items: int) -> float:
    """The share of recommended slots that hold no row of the catalog's `num_items`; 0 if there are no slots.

    >>> invalid_rate([[0, 1], [5, -1]], num_items=5)
    0.5
    """
    flat, _, _ = _flattened(lists)
    return float(((flat < 0) | (flat >= num_items)).mean()) if len(flat) else 0.0


def duplicate_rate(lists: Lists) -> float:
    """The share of recommended slots that repeat an earlier slot of the same list; 0 if there are no slots.

    >>> duplicate_rate([[0, 1, 0, 0], [0, 1, 2, 3]])
    0.25
    """
    flat, owner, _ = _flattened(lists)
    if not len(flat):
        return 0.0
    return 1.0 - len(np.unique(np.stack([owner, flat]), axis=1).T) / len(flat)


def _flattened(lists: Lists) -> tuple[Ranks, Ranks, Ranks]:
    """All slots in one row: their values, the list that each belongs to, and its place there."""
    lengths = np.array([len(one) for one in lists], dtype=np.int64)
    arrays = [np.asarray(one, dtype=np.int64) for one in lists]
    flat = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return flat, owner, place


def _hits(ranks: npt.ArrayLike, k: int) -> npt.NDArray[np.bool_]:
    given = np.asarray(ranks, dtype=np.int64).reshape(-1)
    if k < 1:
        raise DataError(f"k is {k}, which leaves no place for a hit. Give 1 or more.")
    if not len(given):
        raise DataError("There are no ranks, so nothing can be averaged. Evaluate at least one user.")
    hits: npt.NDArray[np.bool_] = (given >= 0) & (given < k)
    return hits


def _gains(ranks: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    hits = _hits(ranks, k)
    given = np.asarray(ranks, dtype=np.int64).reshape(-1)
    gains: npt.NDArray[np.float64] = hits / np.log2(np.where(hits, given, 0) + 2.0)
    return gains
