"""Ranking metrics with one target per user, counted on items, never on the strings that spell them.

A *rank* is the target's place in the recommended list, from 0, and -1 where the list lacks it. A list shorter than k
counts as it is: what it does not hold is missed. Where a ranking leaves a target's place open, `values` takes the mean
over the places that it can have.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.ranks import Lists, Ranks, flattened
from llmrec.exceptions import DataError

Metric = Literal["HR", "NDCG", "MRR"]
TieRule = Literal["expected", "optimistic", "pessimistic"]


def values(ranks: Ranks, metric: Metric, k: int, ties: TieRule = "expected") -> npt.NDArray[np.float64]:
    """The value (C,) of every case; their mean is the metric.

    With one target per case, HR@k is Recall@k; NDCG@k is 1 / log2(place + 2), the ideal gain being 1; and MRR@k is
    1 / (place + 1), which is MAP@k. Each is 0 for a place of k or more, and for an absent target under any rule.

    Args:
        ranks: places from `better` to `better + ties`.
        metric: its name.
        k: the cut-off.
        ties: "expected": the mean over a uniformly random order of the tied candidates, that is over the ties + 1
            places, which are equally likely (McSherry and Najork 2008, "Computing information retrieval performance
            measures efficiently in the presence of tied scores"). "optimistic" and "pessimistic": the value at the
            first and the last of them, between which every order lies.

    Raises:
        DataError: if `k` is below 1, or a name is not known.

    >>> values(Ranks([0, 9, 9, -1], [0, 0, 4, 0]), "HR", 10).tolist()
    [1.0, 1.0, 0.2, 0.0]
    """
    if metric not in get_args(Metric) or ties not in get_args(TieRule):
        raise DataError(
            f"{metric!r} with ties {ties!r} is not known. Choose one of {', '.join(get_args(Metric))} and one of "
            f"{', '.join(get_args(TieRule))}."
        )
    _check_cut_off(k)
    held = ~ranks.absent
    first = np.where(held, ranks.better, 0)
    last = first + np.where(held, ranks.ties, 0)
    if ties != "expected":
        last = first = first if ties == "optimistic" else last
    place = np.arange(min(k, int(last.max(initial=0)) + 1))
    gain = {"HR": np.ones(len(place)), "NDCG": 1 / np.log2(place + 2.0), "MRR": 1 / (place + 1.0)}[metric]
    total = np.concatenate([[0.0], np.cumsum(gain)])  # of the places before each
    end = len(gain)
    mean = (total[np.minimum(last + 1, end)] - total[np.minimum(first, end)]) / (last - first + 1)
    # Where nothing is open, the gain itself: a difference of sums would be off by a rounding.
    single = np.concatenate([gain, [0.0]])[np.minimum(first, end)]
    found: npt.NDArray[np.float64] = np.where(held, np.where(first == last, single, mean), 0.0)
    return found


def ranks_of(recommended: Lists, targets: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The place (B,) of each target in its list, from 0; -1 where it is absent, the first place where it is repeated.

    Args:
        recommended: B lists of item rows, best first, of any lengths; or (B, k), negative values being padding.
        targets: (B,) item rows.

    Raises:
        DataError: if there are not as many lists as targets, or a target is negative.

    >>> ranks_of([[4, 7], [], [3, 1, 2]], [7, 0, 3]).tolist()
    [1, -1, 0]
    """
    return Ranks.from_lists(recommended, targets).better


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


def ranking_metrics(ranks: npt.ArrayLike, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """HR and NDCG at every k; the lists behind `ranks` should have max(ks) items.

    >>> ranking_metrics([0, -1], ks=(10,))
    {'HR@10': 0.5, 'NDCG@10': 0.5}
    """
    return {f"{name}@{k}": metric(ranks, k) for k in ks for name, metric in (("HR", hit_rate), ("NDCG", ndcg))}


def invalid_rate(lists: Lists, num_items: int) -> float:
    """The share of recommended slots that hold no row of the catalog's `num_items`, -1 included; 0 without slots.

    >>> invalid_rate([[0, 1], [5, -1]], num_items=5)
    0.5
    """
    flat, _, _ = flattened(lists)
    return float(((flat < 0) | (flat >= num_items)).mean()) if len(flat) else 0.0


def duplicate_rate(lists: Lists) -> float:
    """The share of recommended slots that repeat an item of an earlier slot of the same list; 0 if there are no slots.

    A negative value is no item, and so repeats none.

    >>> duplicate_rate([[0, 1, 0, 0], [0, 1, 2, 3]])
    0.25
    """
    flat, owner, _ = flattened(lists)
    if not len(flat):
        return 0.0
    named = flat >= 0
    distinct = np.unique(np.stack([owner[named], flat[named]]), axis=1).shape[1]
    return float(named.sum() - distinct) / len(flat)


def _hits(ranks: npt.ArrayLike, k: int) -> npt.NDArray[np.bool_]:
    given = _checked(ranks, k)
    hits: npt.NDArray[np.bool_] = (given >= 0) & (given < k)
    return hits


def _gains(ranks: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    hits = _hits(ranks, k)
    given = np.asarray(ranks, dtype=np.int64).reshape(-1)
    gains: npt.NDArray[np.float64] = hits / np.log2(np.where(hits, given, 0) + 2.0)
    return gains


def _checked(ranks: npt.ArrayLike, k: int) -> npt.NDArray[np.int64]:
    given = np.asarray(ranks, dtype=np.int64).reshape(-1)
    _check_cut_off(k)
    if not len(given):
        raise DataError("There are no ranks, so nothing can be averaged. Evaluate at least one user.")
    return given


def _check_cut_off(k: int) -> None:
    if k < 1:
        raise DataError(f"k is {k}, which leaves no place for a hit. Give 1 or more.")
