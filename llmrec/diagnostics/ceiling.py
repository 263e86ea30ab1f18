"""Ceiling: what a tokenizer leaves to a perfect model, and what a beam search through it keeps of a reference.

Two things stand between a perfect model of the next item and a perfect list: items that share an ID cannot be told
apart, and a beam search loses an item whose prefix is not among the best, however probable the item itself is. The
first is a bound on every model. How much the second costs depends on the model: the surer it is, the fewer beams it
takes, so that what is measured of one reference bounds no other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.diagnostics.branching import prefix_groups
from llmrec.diagnostics.neighbours import leading
from llmrec.evaluation.baselines.ranking import batch_size, flattened
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError

Rows = npt.NDArray[np.integer[Any]]
Places = npt.NDArray[np.int64]
Score = Callable[[Sequence[Rows]], npt.NDArray[np.floating[Any]]]

# Probabilities are multiples of it: float64 holds their sums exactly, so that no order of summation decides a tie.
_QUANTUM = 2.0**-50


def collision_ceiling(
    codes: npt.NDArray[np.integer],
    targets: npt.ArrayLike,
    ks: Sequence[int],
    histories: Sequence[Rows] | None = None,
) -> dict[str, float]:
    """What a model reaches that ranks the target's ID first, always, and cannot tell the items of one ID apart.

    With g candidates on the target's ID, in random order, the target is at each of the places 0..g-1 with chance 1/g.

    Args:
        codes: (N, L).
        targets: (C,) item rows; those of a test, or all items for a catalog whose items are equally likely.
        ks: cut-offs.
        histories: C arrays of item rows that are no candidates, as where an evaluation leaves out what a user had;
            the target always is one. None: every item is a candidate.

    Returns:
        For each k "HR@k", the mean over targets of min(k, g) / g, and "NDCG@k", that of the expected gain
        1 / log2(place + 2) of the places below k.

    Raises:
        TokenizerError: if the codes are no (N, L) whole numbers of 0 and more.
        DataError: if there are no targets, a row is outside the N items, there are not as many histories as targets,
            or a k is below 1.

    >>> found = collision_ceiling(np.array([[3], [3], [4]]), targets=[0, 2], ks=[1, 10])
    >>> found["HR@1"], found["HR@10"], round(found["NDCG@10"], 4)  # (1/2 + 1) / 2; 1; ((1 + 0.6309) / 2 + 1) / 2
    (0.75, 1.0, 0.9077)
    """
    group = prefix_groups(codes)[-1]
    wanted = np.asarray(targets, dtype=np.int64).reshape(-1)
    if not len(wanted) or wanted.min() < 0 or wanted.max() >= len(group):
        raise DataError(
            f"There are {len(wanted)} targets, or one is outside the {len(group)} items. Give at least one row of "
            "these codes."
        )
    others = np.bincount(group)[group[wanted]] - 1
    if histories is not None:
        if len(histories) != len(wanted):
            raise DataError(f"{len(histories)} histories do not fit {len(wanted)} targets. Give one per target.")
        flat, case = _inside(histories, len(group))
        known = (group[flat] == group[wanted[case]]) & (flat != wanted[case])
        # A history may hold an item twice.
        distinct = np.unique(case[known] * len(group) + flat[known])
        others -= np.bincount(distinct // len(group), minlength=len(wanted))
    ranks = Ranks(np.zeros_like(others), others)
    names: tuple[Metric, ...] = ("HR", "NDCG")
    return {f"{name}@{k}": float(values(ranks, name, k).mean()) for k in ks for name in names}


def beam_recall(
    codes: npt.NDArray[np.integer],
    score: Score,
    histories: Sequence[Rows],
    widths: Sequence[int],
    k: int = 10,
    exclude: bool = True,
    smoothing: float = 0.01,
    temperature: float | None = None,
) -> dict[str, Any]:
    """How much of a reference recommender's best k a beam search over these codes would find.

    The reference stands for a model that has learnt the reference's p(item | history), no more and no less: of a
    sharper p the same beams keep more (scores to the power of 2 or 4 show how much), of a flatter one less. The figure
    is good for widths and for tokenizers beside each other, random codes among them, and is no bound on a model. Its
    scores become probabilities by division by their sum, or by a softmax; `smoothing` of the mass is then spread
    evenly over the candidates, for no model puts nothing on an item. A prefix has the probability of the items below
    it. The beam search starts at the root, extends its prefixes by every code that some item has there, and keeps the
    W most probable at each level, of equally probable ones the lexicographically lowest. Its final list is all items
    of the W IDs that are left. Looked for are the k most probable items, ties by lowest row, without those that the
    reference gives no score: their order would be made up.

    Probabilities are rounded to multiples of 2^-50. The cost is that of B · N scores and sums, in batches that hold
    some hundred million bytes each, and of B · W · K candidates per level and width.

    Args:
        codes: (N, L).
        score: B histories of item rows -> (B, N), such as `ItemCF.scores`.
        histories: item rows, oldest first.
        widths: beam widths W.
        k: how many items are looked for.
        exclude: whether items of a history are no candidates and have the probability 0; their prefixes stay.
        smoothing: the share of the mass that all candidates share evenly, from 0 to below 1.
        temperature: None if scores are >= 0 and proportional to probabilities; else the scores are real and the
            probabilities a softmax of them by this temperature.

    Returns:
        "k"; "cases", the histories that count, and "left_out", those of which no candidate has a score; "looked_for",
        the mean number of items; "recall": {"W": the mean over cases of the share of the items looked for that are in
        the final list}; "kept_mass": {"W": the mean share of the probability that the final list holds}. Both are
        keyed by the width as a string, and None without cases.

    Raises:
        TokenizerError: if the codes are no (N, L) whole numbers of 0 and more.
        DataError: if a width, k, the smoothing or the temperature is out of range, a history holds a row outside the
            items, or scores have another shape, are not finite, or are negative without a temperature.
    """
    tree = _Tree(codes)
    _check_settings(widths, k, smoothing, temperature)
    items = len(tree.order)
    found = {width: np.zeros(len(histories)) for width in widths}
    kept = {width: np.zeros(len(histories)) for width in widths}
    wanted = np.zeros(len(histories), dtype=np.int64)
    size = max(1, batch_size(items) // 4)
    for start in range(0, len(histories), size):
        batch = histories[start : start + size]
        here = slice(start, start + len(batch))
        scores, candidates = _scores(score, batch, items, exclude)
        chances, scored = _probabilities(scores, candidates, smoothing, temperature)
        best = _best(np.where(scored, chances, 0.0), k)
        wanted[here] = (best >= 0).sum(axis=1)
        masses = tree.masses(chances)
        whole = np.maximum(chances.sum(axis=1), _QUANTUM)
        for width in found:
            beams = tree.search(masses, width)
            listed = beams[:, tree.group]
            hits = np.take_along_axis(listed, np.maximum(best, 0), axis=1) & (best >= 0)
            found[width][here] = hits.sum(axis=1)
            kept[width][here] = np.where(beams, masses[-1], 0.0).sum(axis=1) / whole
    counted = wanted > 0
    cases = int(counted.sum())
    return {
        "k": k,
        "cases": cases,
        "left_out": len(histories) - cases,
        "looked_for": float(wanted[counted].mean()) if cases else None,
        "recall": {
            str(width): float((values[counted] / wanted[counted]).mean()) if cases else None
            for width, values in found.items()
        },
        "kept_mass": {str(width): float(values[counted].mean()) if cases else None for width, values in kept.items()},
    }


class _Tree:
    """The prefixes of all lengths, in lexicographic order.

    Attributes:
        group: (N,) the number of each item's ID.
        order: (N,) item rows by ID.
        begins: per level, where the run of each prefix begins: for level l < L among the prefixes of l + 1 codes, for
            level L among the items in `order`.
        children: per level 0..L-1 (0 is the root), the first child of each prefix, and one past the last of all.
    """

    def __init__(self, codes: npt.NDArray[np.integer]) -> None:
        groups = prefix_groups(codes)
        self.group: Places = groups[-1]
        self.order: Places = np.argsort(self.group, kind="stable").astype(np.int64)
        # In the order of IDs every level's numbers ascend.
        finer = np.arange(len(self.order))
        self.begins: list[Places] = []
        for group in reversed(groups):
            numbers = group[self.order]
            first = np.flatnonzero(np.diff(numbers, prepend=-1))
            self.begins.append(finer[first])
            finer = numbers
        self.begins.reverse()
        self.children = [np.append(begins, len(after)) for begins, after in self._with_children()]

    def _with_children(self) -> list[tuple[Places, Places]]:
        roots = np.zeros(1, dtype=np.int64)
        return list(zip([roots, *self.begins[:-1]], self.begins, strict=True))

    def masses(self, chances: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        """(B, N) -> per level (B, prefixes), sums over the items below."""
        below = chances[:, self.order]
        found = []
        for begins in reversed(self.begins):
            below = np.add.reduceat(below, begins, axis=1)
            found.append(below)
        return found[::-1]

    def search(self, masses: list[npt.NDArray[np.float64]], width: int) -> npt.NDArray[np.bool_]:
        """Which IDs (B, IDs) the beam search ends with."""
        batch = len(masses[0])
        owner, prefix = np.arange(batch), np.zeros(batch, dtype=np.int64)
        for level, mass in enumerate(masses):
            begins = self.children[level]
            counts = begins[prefix + 1] - begins[prefix]
            # Prefixes ascend within an owner, and so do their children: the order that decides ties.
            offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            owner, prefix = np.repeat(owner, counts), np.repeat(begins[prefix], counts) + offsets
            kept, _ = leading(owner, mass[owner, prefix], width)
            kept.sort()
            owner, prefix = owner[kept], prefix[kept]
        ends = np.zeros(masses[-1].shape, dtype=np.bool_)
        ends[owner, prefix] = True
        return ends


def _scores(
    score: Score, batch: Sequence[Rows], items: int, exclude: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Scores (B, N) and which items are candidates."""
    flat, owner = _inside(batch, items)
    scores = np.asarray(score(batch), dtype=np.float64)
    if scores.shape != (len(batch), items) or not np.isfinite(scores).all():
        raise DataError(
            f"The reference's scores have the shape {scores.shape} or are not finite. Give a finite number per "
            f"history and item, ({len(batch)}, {items})."
        )
    candidates = np.ones(scores.shape, dtype=np.bool_)
    if exclude:
        candidates[owner, flat] = False
    return scores, candidates


def _inside(histories: Sequence[Rows], items: int) -> tuple[Places, Places]:
    """The rows of all histories, and whose they are."""
    flat, owner = flattened(histories)
    if len(flat) and (flat.min() < 0 or flat.max() >= items):
        raise DataError(
            f"Histories name item rows {flat.min()}..{flat.max()}, there are codes of {items} items. "
            "Give rows of these codes."
        )
    return flat, owner


def _probabilities(
    scores: npt.NDArray[np.float64], candidates: npt.NDArray[np.bool_], smoothing: float, temperature: float | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(B, N) probabilities in multiples of the quantum, and which of them the reference gave."""
    if temperature is None:
        if scores.min(initial=0) < 0:
            raise DataError(
                f"A score of the reference is {scores.min()}, which is no probability. Give scores of 0 or more, or a "
                "temperature for a softmax."
            )
        weights = np.where(candidates, scores, 0.0)
        # Divided by the largest first: sums of very large scores would be infinite.
        weights /= np.maximum(weights.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    else:
        logits = np.where(candidates, scores / temperature, -np.inf)
        highest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
    totals = weights.sum(axis=1, keepdims=True)
    chances = weights / np.where(totals > 0, totals, 1.0)
    share = smoothing / np.maximum(candidates.sum(axis=1, keepdims=True), 1)
    spread = np.where(candidates, (1 - smoothing) * chances + share, 0.0)
    return np.rint(spread / _QUANTUM) * _QUANTUM, np.rint(chances / _QUANTUM) > 0


def _best(chances: npt.NDArray[np.float64], k: int) -> Places:
    """(B, k) rows of the most probable, ties by lowest row; -1 where the chance is 0."""
    possible = chances > 0
    items = chances.shape[1]
    if k < items:
        # All that tie with the k-th are kept until the row has decided among them.
        possible &= chances >= np.partition(chances, items - k, axis=1)[:, items - k, None]
    owner, row = np.nonzero(possible)
    kept, rank = leading(owner, chances[owner, row], k)
    best = np.full((len(chances), k), -1, dtype=np.int64)
    best[owner[kept], rank] = row[kept]
    return best


def _check_settings(widths: Sequence[int], k: int, smoothing: float, temperature: float | None) -> None:
    if not widths or min(widths) < 1 or k < 1:
        raise DataError(f"Beam widths are {list(widths)} and k {k}. Give at least one width, and 1 or more for each.")
    if not 0 <= smoothing < 1 or not (temperature is None or 0 < temperature < np.inf):
        raise DataError(
            f"The smoothing is {smoothing}, the temperature {temperature}. Give a smoothing of 0 to below 1, and a "
            "temperature above 0 or None."
        )
