"""Item level beside ID level: what a ranking is worth when several items share one semantic ID.

A model that writes semantic IDs cannot tell the items of one ID apart. Counting a hit as soon as the target's *ID* is
among the first k therefore credits the model with knowing which of the items it meant. llmrec counts items, under a
stated rule for those that share an ID, and shows the ID-level number beside them, labelled as such.

What is subtle:

- The catalog here may collide. A catalog that gave every item an ID of its own, by a further code, has both levels
  equal, whatever its first codes share.
- ID-level lists are shorter lists of larger things: ten IDs can cover more than ten items. Both effects, the target's
  unknown place inside its ID and the room that the IDs before it take, raise the ID-level number; neither lowers it.
- The items of a history are no candidates, and an ID of which every item is in the history is no candidate either. An
  ID that a history item shares with others stays one. A target that its history rules out is missed at both levels.
- IDs of equal score are in uniformly random order at the ID level. At the item level, the items of all those IDs are
  in uniformly random order together ("expected"); this is not the same as shuffling IDs and unfolding them one by one,
  but neither order can put the target before its own ID's place, so the ID level never reads lower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.levels import Levels
from llmrec.evaluation.ranks import Lists, Ranks, Rows, Score, flattened
from llmrec.exceptions import DataError

Rule = Literal["expected", "popularity"]
Pool = Literal["sum", "max"]

_BATCH = 256  # histories scored at once
_CASES = 2048  # lists read at once


@dataclass(frozen=True)
class Identifiers:
    """Which items share a semantic ID.

    Attributes:
        groups: (N,) the number of every item's ID; IDs are numbered by first appearance.
        sizes: (G,) how many items have each ID.

    >>> found = Identifiers.from_codes([[0, 1], [0, 2], [0, 1], [0, 1]])
    >>> found.groups.tolist(), found.sizes.tolist()
    ([0, 1, 0, 0], [3, 1])
    >>> found.beyond_unique, found.sharing, found.largest
    (0.5, 0.75, 3)
    """

    groups: npt.NDArray[np.int64] = field(repr=False)
    sizes: npt.NDArray[np.int64] = field(repr=False)

    @classmethod
    def from_codes(cls, codes: npt.ArrayLike) -> Self:
        """Groups items by their codes, (N, L) integers; raises DataError for another shape or no items."""
        table = np.asarray(codes)
        if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
            raise DataError(
                f"Codes have the shape {table.shape} and the type {table.dtype}, which is no table of integers with "
                "a row per item. Give one code per item and level."
            )
        _, inverse = np.unique(table, axis=0, return_inverse=True)
        return cls.from_groups(inverse.reshape(-1))

    @classmethod
    def from_groups(cls, groups: npt.ArrayLike) -> Self:
        """Takes any (N,) numbers of which equal ones mean one ID."""
        _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        number = np.empty(len(first), dtype=np.int64)
        number[np.argsort(first)] = np.arange(len(first))
        renumbered = number[inverse.reshape(-1)]
        return cls(renumbered, np.bincount(renumbered).astype(np.int64))

    def shuffled(self, seed: int) -> Self:
        """A control: groups of the same sizes, to which the items are dealt at random."""
        return type(self).from_groups(np.random.default_rng(seed).permutation(self.groups))

    @property
    def beyond_unique(self) -> float:
        """The share of items beyond one per ID, 1 - G / N: what a code of its own for every item would bring to 0."""
        return 1.0 - len(self.sizes) / len(self.groups)

    @property
    def sharing(self) -> float:
        """The share of items whose ID is also another item's."""
        return float((self.sizes[self.groups] > 1).mean())

    @property
    def largest(self) -> int:
        """The items of the most frequent ID."""
        return int(self.sizes.max())

    def document(self) -> dict[str, int | float]:
        """Counts and shares, JSON-ready."""
        return {
            "items": len(self.groups),
            "ids": len(self.sizes),
            "beyond_unique_share": self.beyond_unique,
            "sharing_share": self.sharing,
            "largest_group": self.largest,
        }

    def rank_lists(
        self,
        recommended: Lists,
        targets: npt.ArrayLike,
        histories: Sequence[Rows] | None = None,
        rule: Rule = "expected",
        counts: npt.ArrayLike | None = None,
    ) -> Levels:
        """Reads lists of items as lists of IDs: an ID stands where the first of its items stands.

        An ID before the target's takes as many places at the item level as it has candidates, listed or not: the
        model wrote the ID, and the ID means all of them. A list may end early, because only what stands before the
        target counts. The places of the lists' own order, which tells items of one ID apart, are
        `Ranks.from_lists(recommended, targets)`.

        Args:
            recommended: C lists of item rows, best first; negative values are padding.
            targets: (C,) item rows.
            histories: C arrays of item rows that are no candidates; None: every item is one.
            rule: "expected": the items of one ID are in uniformly random order (`Ranks.ties` holds the interval of
                places); "popularity": by falling `counts`, then by row.
            counts: (N,) occurrences in training, for the rule "popularity".

        Raises:
            DataError: if lengths disagree, a row is not in the catalog, or the counts are missing.
        """
        wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
        if len(recommended) != len(wanted):
            raise DataError(f"{len(recommended)} lists do not fit {len(wanted)} targets. Give one list per target.")
        if histories is not None and len(histories) != len(wanted):
            raise DataError(f"{len(histories)} histories do not fit {len(wanted)} targets. Give one per target.")
        parts = []
        for start in range(0, max(1, len(wanted)), _CASES):
            chunk = slice(start, start + _CASES)
            seen = None if histories is None else histories[chunk]
            parts.append(self._rank_listed(recommended[chunk], wanted[chunk], seen, rule, counts))
        columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return Levels(Ranks(columns[0], columns[1]), Ranks(columns[2], columns[3]))

    def _rank_listed(
        self,
        recommended: Lists,
        targets: npt.NDArray[np.int64],
        histories: Sequence[Rows] | None,
        rule: Rule,
        counts: npt.ArrayLike | None,
    ) -> tuple[npt.NDArray[np.int64], ...]:
        """Better and tied items, better and tied IDs, (B,) each, of so few cases that their histories fit memory."""
        wanted, seen = self._checked(targets, histories)
        flat, owner, _ = flattened(recommended)
        self._check_rows(flat, "A list")
        num_items, num_ids = len(self.groups), len(self.sizes)
        keep = (flat >= 0) & ~np.isin(owner * num_items + flat, seen)
        key = owner[keep] * num_ids + self.groups[flat[keep]]
        _, first = np.unique(key, return_index=True)
        key = key[np.sort(first)]  # every list's distinct IDs, in order of first appearance
        case, group = key // num_ids, key % num_ids
        candidates = self.sizes[group] - _occurrences(key, self._seen_ids(seen))
        start = np.searchsorted(case, np.arange(len(wanted)))
        before = np.concatenate([[0], np.cumsum(candidates)])  # candidates ahead of every listed ID, over all lists
        found = np.flatnonzero(group == self.groups[wanted][case])
        allowed = ~np.isin(np.arange(len(wanted)) * num_items + wanted, seen)
        found = found[allowed[case[found]]]
        hit = case[found]
        ids = np.full(len(wanted), -1, dtype=np.int64)
        items, ties = ids.copy(), np.zeros(len(wanted), dtype=np.int64)
        ids[hit] = found - start[hit]
        items[hit] = before[found] - before[start[hit]]
        if rule == "expected":
            ties[hit] = candidates[found] - 1
        else:
            place = self._places(counts)
            items[hit] += self._ahead_inside(wanted, place, seen)[hit]
        return items, ties, ids, np.zeros(len(wanted), dtype=np.int64)

    def rank_scores(
        self,
        score: Score,
        histories: Sequence[Rows],
        targets: npt.ArrayLike,
        pool: Pool = "sum",
        rule: Rule = "expected",
        counts: npt.ArrayLike | None = None,
        exclude_seen: bool = True,
        batch: int = _BATCH,
    ) -> Levels:
        """Scores every ID by its candidates' scores and ranks over the full catalog, in batches.

        Args:
            score: histories (B) to item scores (B, N), higher is better; -inf is no candidate.
            histories: C arrays of item rows, oldest first.
            targets: (C,) item rows.
            pool: an ID's score is its candidates' "sum" (a softmax over items becomes one over IDs) or "max".
            rule: "expected": all items whose IDs have the target's score are in uniformly random order;
                "popularity": they are ordered by falling `counts`, then by row, and IDs of equal score by the first
                of their candidates.
            counts: (N,) occurrences in training, for the rule "popularity".
            exclude_seen: whether the items of a history are no candidates.
            batch: histories scored at once; memory is proportional to batch × N.

        Raises:
            DataError: if lengths disagree, a row is not in the catalog, the counts are missing, or a score is NaN.
        """
        wanted, _ = self._checked(targets, histories)
        place = self._places(counts) if rule == "popularity" else None
        parts = []
        for start in range(0, len(wanted), batch):
            chunk = histories[start : start + batch]
            scores = np.asarray(score(chunk))
            if scores.shape != (len(chunk), len(self.groups)):
                raise DataError(
                    f"Scores of {len(chunk)} histories have the shape {scores.shape}, the catalog has "
                    f"{len(self.groups)} items. Score every item of the same catalog."
                )
            seen = chunk if exclude_seen else [np.empty(0, dtype=np.int64)] * len(chunk)
            parts.append(self._rank_batch(scores, seen, wanted[start : start + batch], pool, place, start))
        columns = [np.concatenate(part) for part in zip(*parts, strict=True)] if parts else [wanted] * 4
        return Levels(Ranks(columns[0], columns[1]), Ranks(columns[2], columns[3]))

    def _rank_batch(
        self,
        scores: npt.NDArray[np.floating[Any]],
        seen: Sequence[Rows],
        targets: npt.NDArray[np.int64],
        pool: Pool,
        place: npt.NDArray[np.int64] | None,
        start: int,
    ) -> tuple[npt.NDArray[np.int64], ...]:
        """Better and tied items, better and tied IDs, (B,) each, of one batch that starts with case `start`."""
        rows, owner, _ = flattened(seen)
        scores = scores.astype(np.float64)
        if np.isnan(scores.max()):
            case, row = np.argwhere(np.isnan(scores))[0]
            raise DataError(f"Case {start + case} has the score NaN for item row {row}. Mend the model's scores.")
        scores[owner, rows] = -np.inf
        gone = scores == -np.inf
        count = np.tile(self.sizes, (len(scores), 1))
        case, row = np.nonzero(gone)
        np.subtract.at(count, (case, self.groups[row]), 1)
        if pool == "sum":
            scores[gone] = 0.0
        pooled = self._pooled(scores, np.add if pool == "sum" else np.maximum)
        pooled[count == 0] = -np.inf
        each, group = np.arange(len(targets)), self.groups[targets]
        own = pooled[each, group][:, None]
        better, equal = pooled > own, pooled == own  # of a target that is no candidate, they are not used
        items, ids = (better * count).sum(axis=1), np.count_nonzero(better, axis=1)
        if place is None:
            item_ties, id_ties = (equal * count).sum(axis=1) - 1, np.count_nonzero(equal, axis=1) - 1
        else:
            rival = ~gone & equal[:, self.groups]
            items += np.count_nonzero(rival & (place < place[targets][:, None]), axis=1)
            first = self._pooled(np.where(gone, len(place), place), np.minimum)
            ids += np.count_nonzero(equal & (first < first[each, group][:, None]), axis=1)
            item_ties = id_ties = np.zeros(len(targets), dtype=np.int64)
        allowed = ~gone[each, targets]
        return (
            np.where(allowed, items, -1),
            np.where(allowed, item_ties, 0),
            np.where(allowed, ids, -1),
            np.where(allowed, id_ties, 0),
        )

    def _pooled(self, numbers: npt.NDArray[Any], pool: np.ufunc) -> npt.NDArray[Any]:
        """(B, G) the numbers (B, N) of every ID's items, put together; always in the order of rows."""
        order, starts = self._by_group
        pooled = np.take(numbers, order[starts], axis=1)
        shared = np.flatnonzero(self.sizes > 1)
        if len(shared):
            inside = np.repeat(self.sizes > 1, self.sizes)
            begin = np.cumsum(self.sizes[shared]) - self.sizes[shared]
            pooled[:, shared] = pool.reduceat(np.take(numbers, order[inside], axis=1), begin, axis=1)
        return pooled

    @cached_property
    def _by_group(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Item rows (N,), those of one ID together, and where each ID's begin (G,)."""
        return np.argsort(self.groups, kind="stable"), np.cumsum(self.sizes) - self.sizes

    def _checked(
        self, targets: npt.ArrayLike, histories: Sequence[Rows] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Targets (C,), and every distinct seen item as case · N + row, ascending."""
        wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
        if len(wanted) and wanted.min() < 0:
            raise DataError(f"A target is the item row {wanted.min()}. Rows count from 0: leave out such cases.")
        self._check_rows(wanted, "A target")
        if histories is None:
            return wanted, np.empty(0, dtype=np.int64)
        if len(histories) != len(wanted):
            raise DataError(f"{len(histories)} histories do not fit {len(wanted)} targets. Give one per target.")
        rows, owner, _ = flattened(histories)
        self._check_rows(rows, "A history")
        return wanted, np.unique(owner * len(self.groups) + rows)

    def _check_rows(self, rows: npt.NDArray[np.int64], what: str) -> None:
        if len(rows) and rows.max() >= len(self.groups):
            raise DataError(
                f"{what} has the item row {rows.max()}, the table of IDs {len(self.groups)} items. "
                "Use rows of the catalog that the codes are of."
            )

    def _seen_ids(self, seen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The IDs of seen items as case · G + group, ascending, as often as they have seen items."""
        case, row = np.divmod(seen, len(self.groups))
        return np.sort(case * len(self.sizes) + self.groups[row])

    def _places(self, counts: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
        """(N,) every item's place in the order of popularity, ties by row."""
        given = np.asarray([] if counts is None else counts)
        if given.shape != self.groups.shape:
            raise DataError(
                f"The rule 'popularity' was given {len(given)} counts for {len(self.groups)} items. "
                "Give every item's occurrences in training."
            )
        place = np.empty(len(given), dtype=np.int64)
        place[np.argsort(-given, kind="stable")] = np.arange(len(given))
        return place

    def _ahead_inside(
        self, targets: npt.NDArray[np.int64], place: npt.NDArray[np.int64], seen: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """(C,) how many candidates of the target's own ID precede it in the order of popularity."""
        order = np.lexsort((place, self.groups))
        within = np.empty(len(order), dtype=np.int64)
        within[order] = np.arange(len(order)) - np.repeat(self._by_group[1], self.sizes)
        case, row = np.divmod(seen, len(self.groups))
        gone = (self.groups[row] == self.groups[targets[case]]) & (place[row] < place[targets[case]])
        return within[targets] - np.bincount(case[gone], minlength=len(targets))


def _occurrences(keys: npt.NDArray[np.int64], among: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each key is in the ascending `among`."""
    return np.searchsorted(among, keys, side="right") - np.searchsorted(among, keys, side="left")
