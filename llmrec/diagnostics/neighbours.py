"""Neighbours: whether items that belong together have codes that begin alike.

What "together" means is the caller's: items that one user takes shortly after another, or items of similar text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    neighbour. Faiss searches the distinct vectors in float32 block by block; where its rounding could have hidden a
    neighbour, it searches again for more, the candidates are measured in float64, and each stands for all items that
    have it. Vectors of 0 have no cosine: such items have no neighbours, and are nobody's. A float32 copy of the
    distinct vectors is held. The cost is that of M · N · D products, and a few times more for items that have more
    than k + 22 different vectors equally near.

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
    catalog = _Distinct.of(matrix)
    found = np.full((len(rows), k), -1, dtype=np.int64)
    asked = np.flatnonzero(catalog.place[rows] >= 0)
    queries, query = np.unique(catalog.place[rows[asked]], return_inverse=True)
    for block in chunks(len(queries), _QUERIES):
        near = _nearest(catalog, queries[block], k + 1)
        here = (query >= block.start) & (query < block.stop)
        mine = near[query[here] - block.start]
        # An item's own row is left out, or else the last one: equal items come by row, and it may be beyond them.
        own = mine == rows[asked[here]][:, None]
        own[~own.any(axis=1), -1] = True
        found[asked[here]] = mine[~own].reshape(-1, k)
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

        The interval is of the normal distribution, kept within 0 and 1, and its variance allows for pairs that have an
        item in common, be it as owner or as neighbour, to agree alike: the sum of the products of their deviations
        over all such pairs of pairs (Fafchamps, Gubert 2007; Aronow, Samii, Assenova 2015, "Cluster-Robust Variance
        Estimation for Dyadic Data"). Of two nearest items each is often the other's neighbour, which says one thing
        twice; clusters of owners, or of owners and of neighbours apart, would count it as two. The variance is at
        least those of owners as clusters (Cochran 1977, "Sampling Techniques", 6.3) and of pairs of the same two
        items. The interval is None for one item, and has no width where no pair or every pair agrees. For random codes
        and the graph of the nearest among random points it was measured to hold the expected purity in 92 to 97 % of
        draws.

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
    ends = _Ends.of(asked, found, items)
    result: list[dict[str, Any]] = []
    for prefix, group in enumerate(numbered, start=1):
        row: dict[str, Any] = {"prefix": prefix, "purity": None, "chance": None, "lift": None, "pairs": total}
        row["interval95"] = None
        if total:
            same = group[ends.owner] == group[ends.neighbour]
            purity = int(same.sum()) / total
            others = np.bincount(group)[group[asked]] - 1
            chance = int(pairs @ others) / (total * (items - 1))
            row |= {"purity": purity, "chance": chance, "lift": purity / chance if chance else None}
            row["interval95"] = _interval(same, ends, len(asked))
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


@dataclass(frozen=True)
class _Distinct:
    """The different vectors among N, without those of 0, by their first rows.

    Attributes:
        matrix: (N, D) as given.
        place: (N,) which of the V different vectors a row has, -1 for a vector of 0.
        first: (V,) the lowest row that has it, ascending.
        norms: (V,) float64.
        unit: (V, D) float32, of length 1.
        members: rows by vector, ascending in each.
        begins: (V + 1,) where a vector's rows begin in `members`.
    """

    matrix: npt.NDArray[np.floating]
    place: Rows
    first: Rows
    norms: npt.NDArray[np.float64]
    unit: npt.NDArray[np.float32]
    members: Rows
    begins: Rows

    @classmethod
    def of(cls, matrix: npt.NDArray[np.floating]) -> "_Distinct":
        # By a digest of their bytes: to sort whole rows would hold all of a memory map, twice.
        digests = np.empty((len(matrix), 2), dtype=np.uint64)
        zero = np.empty(len(matrix), dtype=np.bool_)
        for block in chunks(len(matrix)):
            rows = np.ascontiguousarray(matrix[block]) + matrix.dtype.type(0)  # -0.0 becomes 0.0
            zero[block] = ~rows.any(axis=1)
            bytes_ = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
            digests[block] = np.frombuffer(bytes_, dtype=np.uint64).reshape(-1, 2)
        known = np.flatnonzero(~zero)
        order = np.lexsort((known, digests[known, 1], digests[known, 0]))
        new = np.ones(len(known), dtype=np.bool_)
        new[1:] = (digests[known[order[1:]]] != digests[known[order[:-1]]]).any(axis=1)
        number = np.empty(len(known), dtype=np.int64)
        number[order] = np.cumsum(new) - 1
        lowest = known[order[new]]
        by_row = np.argsort(lowest)
        rank = np.empty(len(lowest), dtype=np.int64)
        rank[by_row] = np.arange(len(lowest))
        place = np.full(len(matrix), -1, dtype=np.int64)
        place[known] = rank[number]
        first = lowest[by_row]
        norms = np.empty(len(first))
        unit = np.empty((len(first), matrix.shape[1]), dtype=np.float32)
        for block in chunks(len(first)):
            wide = np.asarray(matrix[first[block]], dtype=np.float64)
            norms[block] = np.linalg.norm(wide, axis=1)
            unit[block] = wide / norms[block][:, None]
        members = known[np.argsort(place[known], kind="stable")]
        begins = np.concatenate([[0], np.cumsum(np.bincount(place[known], minlength=len(first)))])
        return cls(matrix, place, first, norms, unit, members, begins)

    def expanded(self, chosen: Rows, most: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """The first `most` rows (m, c, most) of each of the vectors (m, c), and which of them there are."""
        rank = self.begins[chosen][..., None] + np.arange(most)
        there = rank < self.begins[chosen + 1][..., None]
        return self.members[np.where(there, rank, 0)], there


def _nearest(catalog: _Distinct, queries: Rows, k: int) -> Rows:
    """(m, k) the nearest rows to each of the vectors `queries`, its own among them; -1 where there are no more."""
    import faiss

    matrix, norms, unit = catalog.matrix, catalog.norms, catalog.unit
    found = np.full((len(queries), k), -1, dtype=np.int64)
    # A product of D terms in float32, of numbers that were rounded to it, is off by less (Higham 2002, section 3.1).
    error = (matrix.shape[1] + 4) * ROUND32 * 1.01 + 10.0**-_DECIMALS
    open_, depth = np.arange(len(queries)), k + _SPARE
    while len(open_):
        depth = min(depth, len(unit))
        again = []
        # At each depth only so many queries together as their candidates fit.
        for part in chunks(len(open_), max(1, _NUMBERS // (depth * matrix.shape[1]))):
            asked = open_[part]
            similar, candidates = faiss.knn(unit[queries[asked]], unit, depth, faiss.METRIC_INNER_PRODUCT)
            candidates.sort(axis=1)
            wide = np.asarray(matrix[catalog.first[queries[asked]]], dtype=np.float64)
            products = np.empty(candidates.shape)
            for some in chunks(depth, max(1, _NUMBERS // wide.size)):
                others = np.asarray(matrix[catalog.first[candidates[:, some]]], dtype=np.float64)
                products[:, some] = np.einsum("mcd,md->mc", others, wide)
            cosines = np.round(products / (norms[candidates] * norms[queries[asked]][:, None]), _DECIMALS)
            # The k nearest rows are among those of the k nearest vectors, ties by their lowest rows.
            order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
            chosen, cosines = np.take_along_axis(candidates, order, axis=1), np.take_along_axis(cosines, order, axis=1)
            rows, there = catalog.expanded(chosen, k)
            worth = np.where(there, cosines[:, :, None], -np.inf).reshape(len(asked), -1)
            rows = rows.reshape(len(asked), -1)
            best = np.lexsort((rows, -worth))[:, :k]
            rows, worth = np.take_along_axis(rows, best, axis=1), np.take_along_axis(worth, best, axis=1)
            # What the search left out has at most its last similarity, give or take its rounding.
            sure = np.full(len(asked), depth == len(unit))
            if worth.shape[1] == k:
                sure |= worth[:, -1] > similar.min(axis=1).astype(np.float64) + 2 * error
            found[asked[sure], : rows.shape[1]] = np.where(np.isfinite(worth), rows, -1)[sure]
            again.append(asked[~sure])
        open_, depth = np.concatenate(again), 8 * depth
    return found


@dataclass(frozen=True)
class _Ends:
    """Pairs of items by what they have in common.

    Attributes:
        owner, neighbour: (P,) item rows.
        two: (P,) the number of the pair's two items, whichever is whose neighbour.
    """

    owner: Rows
    neighbour: Rows
    two: Rows

    @classmethod
    def of(cls, asked: Rows, found: Rows, items: int) -> "_Ends":
        owner, neighbour = np.repeat(asked, (found >= 0).sum(axis=1)), found[found >= 0]
        keys = np.minimum(owner, neighbour) * items + np.maximum(owner, neighbour)
        return cls(owner, neighbour, np.unique(keys, return_inverse=True)[1].reshape(-1))


def _interval(same: npt.NDArray[np.bool_], ends: _Ends, owners: int) -> list[float] | None:
    """95 % of the share of pairs that agree, pairs with an item in common being alike."""
    if owners < 2:
        return None
    ratio = float(same.mean())
    left = same - ratio
    by_owner = np.bincount(ends.owner, left, int(max(ends.owner.max(), ends.neighbour.max())) + 1)
    by_item = by_owner + np.bincount(ends.neighbour, left, len(by_owner))
    by_two = np.bincount(ends.two, left)
    # Pairs of the same two items have both in common, and stand in the first sum twice.
    once = float(by_two @ by_two)
    squares = max(float(by_owner @ by_owner), once, float(by_item @ by_item) - once)
    half = 1.959963984540054 * float(np.sqrt(owners / (owners - 1) * squares)) / len(same)
    return [max(0.0, ratio - half), min(1.0, ratio + half)]


def _check_k(k: int) -> None:
    if k < 1:
        raise DataError(f"k is {k}, which leaves no place for a neighbour. Give 1 or more.")
