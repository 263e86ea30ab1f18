"""Neighbours: whether items that belong together have codes that begin alike.

What "together" means is the caller's: items that one user takes shortly after another, or items of similar text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.diagnostics.branching import prefix_groups
from llmrec.embedding.collaborative import cooccurrence
from llmrec.exceptions import DataError
from llmrec.quantization.codebooks import sampled_rows
from llmrec.quantization.nearest import ROUND32, check_matrix, chunks

Rows = npt.NDArray[np.int64]

# Co-occurrences sorted at once: 4 M of them take some 200 MB.
_PAIRS = 1 << 22
# Queries searched at once, and float64 numbers gathered at once to measure their candidates.
_QUERIES, _NUMBERS = 1024, 1 << 23
# Candidates beyond k that the search in float32 gives, before it has to look for more.
_SPARE = 22
# Sums of the same parts in another order differ in their last bits, which must not decide.
_DECIMALS = 12


def co_sold(
    train: Sequence[npt.NDArray[np.integer]], num_items: int, k: int = 10, window: int = 5
) -> npt.NDArray[np.int64]:
    """For every item the k items that occur most with it: the highest C_ij / sqrt(C_i C_j).

    C is `llmrec.embedding.collaborative.cooccurrence`, in which a pair at distance d <= window in one history adds
    1/d, and C_i the sum of its row i: the cosine of Ochiai, with pairs as what is counted. Compared to 12 decimals;
    ties go to the lowest row. Memory is that of the sparse C and of some 4 million pairs at a time.

    Args:
        train: the users' training histories, item rows in order of time.
        num_items: N.
        k: neighbours per item.
        window: the largest distance between two items of a pair.

    Returns:
        (N, k) item rows, best first; -1 where an item has no more partners.

    Raises:
        DataError: if a history holds a row outside 0..N-1, or `k` or the window is not positive.

    >>> co_sold([np.array([0, 1]), np.array([2, 1]), np.array([0, 1])], num_items=4, k=2).tolist()
    [[1, -1], [0, 2], [1, -1], [-1, -1]]
    """
    _check_k(k)
    counts = cooccurrence(train, num_items, window)
    counts.sort_indices()
    totals = np.asarray(counts.sum(axis=1)).ravel()
    found = np.full((num_items, k), -1, dtype=np.int64)
    begins = counts.indptr.astype(np.int64)
    row = 0
    while row < num_items:
        end = max(row + 1, int(np.searchsorted(begins, begins[row] + _PAIRS, side="right")) - 1)
        pairs = slice(begins[row], begins[end])
        owner = np.repeat(np.arange(row, end), np.diff(begins[row : end + 1]))
        partner = counts.indices[pairs].astype(np.int64)
        cosines = np.round(counts.data[pairs] / np.sqrt(totals[owner] * totals[partner]), _DECIMALS)
        kept, place = leading(owner, cosines, k)
        found[owner[kept], place] = partner[kept]
        row = end
    return found


def nearest_texts(
    vectors: npt.NDArray[np.floating], k: int = 10, sample: int | None = None, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For items the k others with the highest cosine.

    The cosines are those of float64, compared to 12 decimals; ties go to the lowest row, and an item is not its own
    neighbour. Faiss searches all items in float32 block by block; where its rounding could have hidden a neighbour,
    it searches again for more, and the candidates are measured in float64. Vectors of 0 have no cosine: such items
    have no neighbours, and are nobody's. A float32 copy of the vectors is held. The cost is that of M · N · D
    products, and a few times more for items that have more than k + 21 equally near neighbours.

    Args:
        vectors: (N, D), such as embeddings of the items' texts.
        k: neighbours per item.
        sample: at most how many items are asked about; if there are more, so many are drawn without repetition.
        seed: of the draw.

    Returns:
        The item rows (M,) that were asked about, ascending, and their neighbours (M, k), nearest first; -1 where
        there are no more.

    Raises:
        DataError: if `k` or `sample` is not positive.
        TokenizerError: if the vectors are no finite (N, D).
    """
    _check_k(k)
    if sample is not None and sample < 1:
        raise DataError(f"A sample of {sample} items asks about nothing. Give 1 or more, or None for all.")
    matrix = check_matrix(vectors)
    rows = sampled_rows(len(matrix), len(matrix) if sample is None else sample, seed)
    norms = np.empty(len(matrix))
    unit = np.empty(matrix.shape, dtype=np.float32)
    for block in chunks(len(matrix)):
        wide = np.asarray(matrix[block], dtype=np.float64)
        norms[block] = np.linalg.norm(wide, axis=1)
        unit[block] = wide / np.where(norms[block] > 0, norms[block], 1)[:, None]
    known = np.flatnonzero(norms > 0)
    found = np.full((len(rows), k), -1, dtype=np.int64)
    asked = np.flatnonzero(norms[rows] > 0)
    if len(known) < len(matrix):
        unit = unit[known]
    for block in chunks(len(asked), _QUERIES):
        found[asked[block]] = _nearest(matrix, norms, unit, known, rows[asked[block]], k)
    return rows, found


def neighbour_purity(
    codes: npt.NDArray[np.integer], neighbours: npt.NDArray[np.integer], rows: npt.NDArray[np.integer] | None = None
) -> list[dict[str, Any]]:
    """How often an item and its neighbour have the same first l codes, beside how often chance would have it.

    Args:
        codes: (N, L).
        neighbours: (M, k) item rows, negative where there are none.
        rows: (M,) whose neighbours they are; None: those of all items in order.

    Returns:
        Per l = 1..L: "prefix", l; "purity", the share of the pairs (item, neighbour) that have the same first l codes;
        "chance", what it would be on average if each neighbour were a uniformly random other item of the N: the mean
        over the pairs of (n - 1) / (N - 1), with n the number of items that have the first l codes of the pair's item;
        "lift", purity / chance, None if that is 0; "pairs", their number; "interval95" of the purity, [low, high].
        All but "prefix" and "pairs" are None if there are no pairs.

        The interval takes the M items with their pairs as a random sample, and so pairs of one item as a cluster: the
        ratio of two sums over items with its linearised standard error (Cochran 1977, "Sampling Techniques", 6.3) and
        the normal distribution, kept within 0 and 1. It is None for one item, and has no width where no pair or every
        pair agrees.

    Raises:
        TokenizerError: if the codes are no (N, L) whole numbers of 0 and more.
        DataError: if shapes do not fit, a row is outside the N items, or an item is its own neighbour.

    >>> first, second = neighbour_purity(np.array([[0, 0], [0, 1], [1, 0], [1, 0]]), np.array([[1], [2], [3], [2]]))
    >>> first["purity"], round(first["chance"], 4), first["lift"], second["purity"], second["pairs"]
    (0.75, 0.3333, 2.25, 0.5, 4)
    """
    numbered = prefix_groups(codes)
    items = len(numbered[0])
    found = np.asarray(neighbours)
    asked = np.arange(items) if rows is None else np.asarray(rows)
    if found.ndim != 2 or asked.shape != found.shape[:1]:
        raise DataError(
            f"Neighbours of shape {found.shape} do not belong to rows of shape {asked.shape}. Give (M, k) and (M,)."
        )
    if found.size and (found.max() >= items or asked.min() < 0 or asked.max() >= items):
        raise DataError(f"Rows or neighbours are outside the {items} items. Give rows of these codes.")
    if (found == asked[:, None]).any():
        raise DataError("An item is its own neighbour, which says nothing of its codes. Leave it out.")
    pairs = (found >= 0).sum(axis=1)
    with_pairs = np.flatnonzero(pairs)
    asked, found, pairs = asked[with_pairs], found[with_pairs], pairs[with_pairs]
    total = int(pairs.sum())
    result: list[dict[str, Any]] = []
    for prefix, group in enumerate(numbered, start=1):
        row: dict[str, Any] = {"prefix": prefix, "purity": None, "chance": None, "lift": None, "pairs": total}
        row["interval95"] = None
        if total:
            same = ((group[found] == group[asked][:, None]) & (found >= 0)).sum(axis=1)
            purity = int(same.sum()) / total
            others = np.bincount(group)[group[asked]] - 1
            chance = int(pairs @ others) / (total * (items - 1))
            row |= {"purity": purity, "chance": chance, "lift": purity / chance if chance else None}
            row["interval95"] = _interval(same, pairs)
        result.append(row)
    return result


def leading(owner: Rows, scores: npt.NDArray[np.float64], most: int) -> tuple[Rows, Rows]:
    """Of entries that belong to owners, the places of the `most` best of each, and their ranks from 0.

    By falling score, ties by place; owners ascending.

    >>> [found.tolist() for found in leading(np.array([1, 0, 1, 1]), np.array([3.0, 1.0, 5.0, 3.0]), 2)]
    [[1, 2, 0], [0, 0, 1]]
    """
    order = np.lexsort((-scores, owner))
    sorted_owner = owner[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_owner, sorted_owner)
    kept = rank < most
    return order[kept], rank[kept]


def _nearest(
    matrix: npt.NDArray[np.floating],
    norms: npt.NDArray[np.float64],
    unit: npt.NDArray[np.float32],
    known: Rows,
    queries: Rows,
    k: int,
) -> Rows:
    """(m, k) neighbours of the queries, all of them `known` rows, to which `unit` belongs."""
    import faiss

    found = np.full((len(queries), k), -1, dtype=np.int64)
    # A product of D terms in float32, of numbers that were rounded to it, is off by less (Higham 2002, section 3.1).
    error = (matrix.shape[1] + 4) * ROUND32 * 1.01 + 10.0**-_DECIMALS
    open_, depth = np.arange(len(queries)), k + _SPARE
    while len(open_):
        depth = min(depth, len(known))
        again = []
        # At each depth only so many queries together as their candidates fit.
        for part in chunks(len(open_), max(1, _NUMBERS // (depth * matrix.shape[1]))):
            asked = open_[part]
            rows = queries[asked]
            similar, places = faiss.knn(unit[np.searchsorted(known, rows)], unit, depth, faiss.METRIC_INNER_PRODUCT)
            candidates = known[places]
            candidates.sort(axis=1)
            wide = np.asarray(matrix[rows], dtype=np.float64)
            products = np.empty(candidates.shape)
            for some in chunks(depth, max(1, _NUMBERS // wide.size)):
                others = np.asarray(matrix[candidates[:, some]], dtype=np.float64)
                products[:, some] = np.einsum("mcd,md->mc", others, wide)
            cosines = np.round(products / (norms[candidates] * norms[rows][:, None]), _DECIMALS)
            cosines[candidates == rows[:, None]] = -np.inf
            order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(cosines, order, axis=1)
            # What the search left out has at most its last similarity, give or take its rounding.
            sure = np.full(len(asked), depth == len(known))
            if best.shape[1] == k:
                sure |= best[:, -1] > similar.min(axis=1).astype(np.float64) + 2 * error
            chosen = np.where(np.isfinite(best), np.take_along_axis(candidates, order, axis=1), -1)
            found[asked[sure], : chosen.shape[1]] = chosen[sure]
            again.append(asked[~sure])
        open_, depth = np.concatenate(again), 8 * depth
    return found


def _interval(same: Rows, pairs: Rows) -> list[float] | None:
    """95 % of the ratio of the sums, over the items whose terms they are."""
    items = len(pairs)
    if items < 2:
        return None
    ratio = same.sum() / pairs.sum()
    left = same - ratio * pairs
    half = 1.959963984540054 * float(np.sqrt(items / (items - 1) * (left @ left)) / pairs.sum())
    return [max(0.0, float(ratio) - half), min(1.0, float(ratio) + half)]


def _check_k(k: int) -> None:
    if k < 1:
        raise DataError(f"k is {k}, which leaves no place for a neighbour. Give 1 or more.")
