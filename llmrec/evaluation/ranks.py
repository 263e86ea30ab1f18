"""Ranks: where each case's target stands, whatever did the ranking, and what the ranking leaves open.

A place in a list is one number only if the ranking decides everything. Equal scores, and items that share a semantic
ID, leave an interval of places open; sorting closes it by accident, by row number or memory order, and the metric
moves with it. `Ranks` keeps the interval, and `metrics.values` averages over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Rows = npt.NDArray[np.integer[Any]]
Lists = Sequence[Sequence[int] | Rows] | Rows
Score = Callable[[Sequence[Rows]], npt.NDArray[np.floating[Any]]]
Places = npt.NDArray[np.int64]

_MATRIX_BYTES = 64 * 2**20  # of the scores of one batch, at 8 bytes each


@dataclass(frozen=True)
class Ranks:
    """The open interval of places of every case's target: from `better` to `better + ties`, counted from 0.

    Attributes:
        better: (C,) candidates strictly before the target; -1 if the ranking does not hold the target.
        ties: (C,) other candidates that the ranking does not tell from the target; 0 if it does, or has no target.

    Raises:
        DataError: if shapes differ, a number is below the least that it can be, or an absent target has ties.
    """

    better: Places
    ties: Places

    def __post_init__(self) -> None:
        better, ties = np.asarray(self.better, dtype=np.int64), np.asarray(self.ties, dtype=np.int64)
        if better.ndim != 1 or better.shape != ties.shape:
            raise DataError(
                f"Ranks have the shapes {better.shape} and {ties.shape}. Give one number of better and one of tied "
                "candidates per case."
            )
        wrong = np.flatnonzero((better < -1) | (ties < 0) | ((better < 0) & (ties > 0)))
        if len(wrong):
            case = wrong[0]
            raise DataError(
                f"Case {case} has {better[case]} better and {ties[case]} tied candidates, which no ranking gives. "
                "An absent target is -1 and 0; else both are 0 or more."
            )
        object.__setattr__(self, "better", better)
        object.__setattr__(self, "ties", ties)

    def __len__(self) -> int:
        """C, the number of cases."""
        return len(self.better)

    @property
    def absent(self) -> npt.NDArray[np.bool_]:
        """(C,) whether the ranking does not hold the target."""
        return self.better < 0

    @classmethod
    def from_lists(cls, recommended: Lists, targets: npt.ArrayLike) -> Self:
        """Reads ranked lists, which leave nothing open; of a repeated target the first place counts.

        Args:
            recommended: C lists of item rows, best first, of any lengths; or (C, k), negative values being padding.
            targets: (C,) item rows.

        Raises:
            DataError: if there are not as many lists as targets, or a target is negative.

        >>> Ranks.from_lists([[4, 7], [], [3, 1, 2]], [7, 0, 3]).better.tolist()
        [1, -1, 0]
        """
        wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
        if len(recommended) != len(wanted):
            raise DataError(f"{len(recommended)} lists do not fit {len(wanted)} targets. Give one list per target.")
        if len(wanted) and wanted.min() < 0:
            raise DataError(
                f"A target is the item row {wanted.min()}. Rows count from 0: leave out users without one."
            )
        better = np.full(len(wanted), -1, dtype=np.int64)
        flat, owner, place = flattened(recommended)
        hit = np.flatnonzero(flat == wanted[owner])[::-1]  # backwards, so that a repeated target's first place is kept
        better[owner[hit]] = place[hit]
        return cls(better, np.zeros_like(better))

    @classmethod
    def from_groups(
        cls,
        beams: npt.ArrayLike,
        codes: npt.ArrayLike,
        targets: npt.ArrayLike,
        histories: Sequence[Rows] | None = None,
    ) -> tuple[Self, Self]:
        """Reads beams of semantic IDs, which may be shared, at item level and at ID level.

        At item level a beam stands for all candidates of its ID: those of distinct IDs before the target's are better,
        the others of the target's own ID are ties. At ID level the target's place is that of its ID among the distinct
        IDs, which is what several papers print as an item's place.

        A repeated ID counts at its first place. An invalid ID, one that no item has, takes a place at ID level, for it
        used up a beam, but holds no item and moves nothing at item level. An ID of which the history rules out every
        item takes no place at either level. A target that its history rules out is absent from both.

        Args:
            beams: (C, W, L) codes, best first; a beam with a negative code is padding.
            codes: (N, L) the code of every item, not negative.
            targets: (C,) item rows.
            histories: C arrays of item rows that are no candidates; None: every item is one.

        Returns:
            The ranks at item level, and those at ID level (which have no ties).

        Raises:
            DataError: if shapes disagree, a code of an item is negative, or a row is not in the catalog.

        >>> codes = [[0, 0], [0, 1], [0, 1]]
        >>> items, ids = Ranks.from_groups([[[5, 5], [0, 0], [0, 1]]], codes, [2])
        >>> items.better.tolist(), items.ties.tolist(), ids.better.tolist()
        ([1], [1], [2])
        """
        table, written = np.asarray(codes), np.asarray(beams)
        wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
        if table.ndim != 2 or written.ndim != 3 or written.shape[2] != table.shape[1] or len(written) != len(wanted):
            raise DataError(
                f"Beams {written.shape}, codes {table.shape} and {len(wanted)} targets do not fit. Give codes as "
                "(items, levels), beams as (cases, beams, levels) and one target per case."
            )
        if table.size and table.min() < 0:
            raise DataError(f"An item has the code {table.min()}. Codes count from 0: give every item a full ID.")
        num_cases, num_items = len(wanted), len(table)
        _check_rows(wanted, num_items, "target")
        seen = _seen(histories, num_cases, num_items)
        number = _numbered(np.concatenate([table, written.reshape(-1, table.shape[1])]))
        group_of = number[:num_items]
        num_groups = int(number.max(initial=-1)) + 1
        sizes = np.bincount(group_of, minlength=num_groups)

        width = written.shape[1]
        key = np.repeat(np.arange(num_cases), width) * num_groups + number[num_items:]
        key = key[(written >= 0).all(axis=2).reshape(-1)]
        _, first = np.unique(key, return_index=True)
        key = key[np.sort(first)]  # the distinct IDs of every case, in the order of their first places
        group = key % num_groups if num_groups else key
        case, row = np.divmod(seen, max(1, num_items))
        gone = np.sort(case * num_groups + group_of[row])
        candidates = sizes[group] - (np.searchsorted(gone, key, side="right") - np.searchsorted(gone, key))
        stays = (candidates > 0) | (sizes[group] == 0)
        key, group, candidates = key[stays], group[stays], candidates[stays]
        owner = key // max(1, num_groups)

        start = np.searchsorted(owner, np.arange(num_cases))
        before = np.cumsum(candidates) - candidates  # over the IDs of all cases
        possible = ~np.isin(np.arange(num_cases) * num_items + wanted, seen)
        found = np.flatnonzero((group == group_of[wanted][owner]) & possible[owner])
        hit = owner[found]
        item_better = np.full(num_cases, -1, dtype=np.int64)
        id_better, ties = item_better.copy(), np.zeros(num_cases, dtype=np.int64)
        id_better[hit] = found - start[hit]
        item_better[hit] = before[found] - before[start[hit]]
        ties[hit] = candidates[found] - 1
        return cls(item_better, ties), cls(id_better, np.zeros_like(ties))


def rank_scores(
    score: Score,
    histories: Sequence[Rows],
    targets: npt.ArrayLike,
    num_items: int,
    exclude_seen: bool = True,
    k: int = 0,
    batch: int | None = None,
) -> tuple[Ranks, Places]:
    """Ranks every target among all items by a score function, in batches; optionally keeps the first k of each case.

    Equal scores are ties. An item with the score -inf is no candidate, as if it were in the history; a target that is
    no candidate is absent. The lists, which have to choose, order by falling score, then by item row.

    Args:
        score: histories (B) to scores (B, N) of all items, higher is better; what it returns is not written to.
        histories: C arrays of item rows, oldest first.
        targets: (C,) item rows.
        num_items: N.
        exclude_seen: whether the items of a history are no candidates.
        k: length of the lists; 0 for none.
        batch: histories scored at once; default: as many as keep the scores of a batch under 64 MiB.

    Returns:
        The ranks, and the lists (C, k) of item rows, -1 where there are no candidates left.

    Raises:
        DataError: if lengths disagree, a row is not in the catalog, `k` or `batch` is too small, or scores have
            another shape, are no real numbers or hold NaN.

    >>> ranks, lists = rank_scores(lambda h: np.array([[1.0, 3.0, 1.0, 9.0]]), [np.array([3])], [2], 4, k=5)
    >>> ranks.better.tolist(), ranks.ties.tolist(), lists.tolist()
    ([1], [1], [[1, 0, 2, -1, -1]])
    """
    wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
    if len(histories) != len(wanted):
        raise DataError(f"{len(histories)} histories do not fit {len(wanted)} targets. Give one per target.")
    if k < 0 or (batch is not None and batch < 1):
        raise DataError(f"k is {k} and batch {batch}. Give a k of 0 or more and a batch of 1 or more.")
    _check_rows(wanted, num_items, "target")
    size = batch or max(1, _MATRIX_BYTES // (8 * max(1, num_items)))
    better = np.full(len(wanted), -1, dtype=np.int64)
    ties = np.zeros(len(wanted), dtype=np.int64)
    lists = np.full((len(wanted), k), -1, dtype=np.int64)
    for start in range(0, len(wanted), size):
        chunk = histories[start : start + size]
        here = slice(start, start + len(chunk))
        scores = _checked(score(chunk), len(chunk), num_items, start)
        if exclude_seen:
            rows, owner, _ = flattened(chunk)
            _check_rows(rows, num_items, "history's item")
            scores[owner, rows] = -np.inf
        own = scores[np.arange(len(chunk)), wanted[here]][:, None]
        held = own[:, 0] > -np.inf
        better[here] = np.where(held, np.count_nonzero(scores > own, axis=1), -1)
        ties[here] = np.where(held, np.count_nonzero(scores == own, axis=1) - 1, 0)
        if k:
            lists[here, : min(k, num_items)] = _first(scores, min(k, num_items))
    return Ranks(better, ties), lists


def flattened(lists: Lists) -> tuple[Places, Places, Places]:
    """All slots of ragged lists or of a (B, k) array in one row: values, the list of each, and its place there.

    >>> [part.tolist() for part in flattened([[7, 8], [], [9]])]
    [[7, 8, 9], [0, 0, 2], [0, 1, 0]]
    """
    if isinstance(lists, np.ndarray) and lists.ndim == 2:
        owner, place = np.divmod(np.arange(lists.size), max(1, lists.shape[1]))
        return lists.reshape(-1).astype(np.int64), owner, place
    lengths = np.array([len(one) for one in lists], dtype=np.int64)
    arrays = [np.asarray(one, dtype=np.int64) for one in lists]
    flat = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return flat, owner, place


def _checked(
    scores: npt.NDArray[np.floating[Any]], num_cases: int, num_items: int, start: int
) -> npt.NDArray[np.floating[Any]]:
    """A copy of a batch's scores that may be written to."""
    given = np.asarray(scores)
    if given.shape != (num_cases, num_items) or given.dtype.kind not in "fiub":
        raise DataError(
            f"Scores of {num_cases} histories have the shape {given.shape} and the type {given.dtype}, the catalog "
            f"has {num_items} items. Give one real number per history and item."
        )
    wrong = np.flatnonzero(np.isnan(given.max(axis=1)))  # a maximum with NaN is NaN
    if len(wrong):
        row = np.flatnonzero(np.isnan(given[wrong[0]]))[0]
        raise DataError(
            f"Case {start + wrong[0]} has the score NaN for item row {row}, which has no place in an order. "
            "Mend the scores; -inf means that an item is no candidate."
        )
    return given.copy() if given.dtype.kind == "f" else given.astype(np.float64)


def _first(scores: npt.NDArray[np.floating[Any]], k: int) -> Places:
    """(B, k) the k best item rows by falling score, then by row; -1 for those of score -inf."""
    num_items = scores.shape[1]
    chosen = np.argpartition(scores, num_items - k, axis=1)[:, num_items - k :]
    least = np.take_along_axis(scores, chosen, axis=1).min(axis=1)
    # Where more items have the last chosen score than fit, argpartition took any of them: the lowest rows are due.
    crowded = np.flatnonzero((np.count_nonzero(scores >= least[:, None], axis=1) > k) & (least > -np.inf))
    above = scores[crowded] > least[crowded, None]
    equal = scores[crowded] == least[crowded, None]
    room = k - np.count_nonzero(above, axis=1)
    equal &= np.cumsum(equal, axis=1, dtype=np.int32) <= room[:, None]
    chosen[crowded] = np.nonzero(above | equal)[1].reshape(len(crowded), k)
    chosen.sort(axis=1)
    kept = np.take_along_axis(scores, chosen, axis=1)
    order = np.argsort(-kept, axis=1, kind="stable")
    rows = np.take_along_axis(chosen, order, axis=1)
    return np.where(np.take_along_axis(kept, order, axis=1) > -np.inf, rows, -1)


def _check_rows(rows: Places, num_items: int, what: str) -> None:
    wrong = (rows < 0) | (rows >= num_items)
    if wrong.any():
        raise DataError(
            f"A {what} is the item row {rows[wrong][0]}, the catalog has {num_items} items. "
            "Use rows of the same catalog, counted from 0, and leave out cases without a target."
        )


def _seen(histories: Sequence[Rows] | None, num_cases: int, num_items: int) -> Places:
    """The distinct seen items as case · N + row, ascending."""
    if histories is None:
        return np.empty(0, dtype=np.int64)
    if len(histories) != num_cases:
        raise DataError(f"{len(histories)} histories do not fit {num_cases} targets. Give one per target.")
    rows, owner, _ = flattened(histories)
    _check_rows(rows, num_items, "history's item")
    return np.unique(owner * num_items + rows)


def _numbered(codes: npt.NDArray[Any]) -> Places:
    """A number for every row of codes, the same for equal rows; level by level, so that no key can overflow."""
    number = np.zeros(len(codes), dtype=np.int64)
    for column in codes.T:
        _, digit = np.unique(column, return_inverse=True)
        _, number = np.unique(number * (digit.max(initial=0) + 1) + digit, return_inverse=True)
    return number.reshape(-1).astype(np.int64)
