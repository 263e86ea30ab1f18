"""Codes for new items: from the codebooks as they are, none given twice, and none changed that is given already."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from llmrec.exceptions import TokenizerError
from llmrec.quantization.codebooks import check_codes
from llmrec.quantization.nearest import check_matrix, chunks, squared_distances
from llmrec.quantization.occupancy import OccupiedCodes
from llmrec.quantization.quantizer import Quantizer
from llmrec.quantization.reassignment import ENTRIES, ROUGH, last_level_costs

# Beginnings of codes that are kept at each level while a free code is sought for an item that found no room.
BEAM = 8

Rows = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Wide = npt.NDArray[np.float64]
# Items (n,) that ask for one prefix, its free last codes, and what spilling costs each item if they do not suffice.
Group = tuple[Rows, Rows, Wide | None]


@dataclass(frozen=True)
class AssignmentReport:
    """What became of the new items.

    Attributes:
        items: M.
        taken: N, codes that were given before.
        contested: items whose encoded code was taken, or asked for by another new item.
        moved: items whose code of the quantizer's levels is not the encoded one.
        spilled: items that left their prefix: its last codes (or its code's digits) did not suffice for all.
        distortion: mean squared distance of a new item to its encoded code's point; None without items.
        added_distortion: what the moves added to that mean; None without items.
        free_codes: codes that nobody has, afterwards, of the whole product of the levels.
        free_in_fullest: last codes that are left in the fullest prefix that a new item has; None without items.
        full_prefixes: prefixes of all levels but the last without a free code, in the whole catalog. The more there
            are, the sooner to build the semantic IDs again.
    """

    items: int
    taken: int
    contested: int
    moved: int
    spilled: int
    distortion: float | None
    added_distortion: float | None
    free_codes: int
    free_in_fullest: int | None
    full_prefixes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Assignment:
    """The new items' codes (M, L') int32, and the report."""

    codes: Codes
    report: AssignmentReport


def assign(
    vectors: npt.NDArray[np.floating],
    quantizer: Quantizer,
    taken: npt.NDArray[np.integer],
    codebook_sizes: Sequence[int],
    codes: npt.NDArray[np.integer] | None = None,
) -> Assignment:
    """Codes for new items of a living catalog, unique and different from all that are taken, which stay as they are.

    An item gets its encoded code, unless its prefix (the first L - 1 codes) is contested: one where some new item's
    code is taken, or asked for by several. There, all new items of the prefix are dealt its free last codes so that
    the sum of squared distances to the decoded points is the least possible.

    If a prefix has more new items than free last codes, it is filled and the rest spills. An item that spills goes to
    the prefix of its refuge: the free code that a beam search over the levels finds nearest to it, in which the
    beginning of a code stands for the point that it makes with the item's own remaining codes, and the BEAM nearest
    with a free code below are kept. Those stay for whom the sum of their squared distances and of the others' to their
    refuges is least. The free last codes of the new prefixes are dealt to those who come in the same way, and so on
    until every item has a code; there is one, as long as any code is free.

    With one level more than the quantizer has, the last one is a digit that tells apart the items of one code (TIGER).
    A new item takes the lowest free digit of its code, several do so in row order. If the digits do not suffice, it
    is decided as above who goes to a refuge.

    The same input gives the same codes. The order of the items matters to ties alone: of items with equal vectors and
    encoded codes the lower row gets the nearer code, then the lower one; digits go by rows. Which of several least
    sums is taken depends on the vectors, not on their order; which of equally near refuges, on the nearer beginning,
    then the lower code.

    `HashedCodes` has no geometry: all its points are the same, so that every free last code of the prefix is as good,
    and every refuge. Where a catalog's codes are hashed from ids, hash the new ids with `encode_ids` and give them as
    `codes`; without, `encode` hashes the vectors.

    Memory beyond the inputs: float64 copies of the vectors of contested prefixes, and the taken codes as numbers.

    Args:
        vectors: (M, D) of the new items, M >= 0, in the space that the quantizer was fitted in.
        quantizer: its `encode`, `decode` and `codebook_sizes` are used, and `level_points` if it has that.
        taken: (N, L') codes that are given, to live or retired items; N >= 0, no two alike.
        codebook_sizes: (L',) sizes of the catalog's levels: the quantizer's, and that of the digit if there is one.
        codes: (M, L) encoded codes, where they are known already or are not to come from `encode`.

    Raises:
        TokenizerError: if the inputs do not fit together, vectors hold NaN or infinity, taken codes repeat, or fewer
            codes are free than there are new items.

    >>> from llmrec.quantization import ResidualKMeans
    >>> quantizer = ResidualKMeans(2, 2)
    >>> quantizer.codebooks = (np.array([[0.0], [9.0]], dtype=np.float32), np.array([[0.0], [1.0]], dtype=np.float32))
    >>> assign(np.array([[9.2], [0.3]]), quantizer, np.array([[0, 0]]), (2, 2)).codes.tolist()
    [[1, 0], [0, 1]]
    """
    sizes, levels = tuple(int(size) for size in codebook_sizes), quantizer.codebook_sizes
    appended = len(sizes) == len(levels) + 1
    if sizes[: len(levels)] != tuple(levels) or len(sizes) > len(levels) + 1 or min(sizes) < 1:
        raise TokenizerError(
            f"Levels of {list(sizes)} codes are not the quantizer's {list(levels)}, with a digit or without. "
            "Give the catalog and the codebooks of one build."
        )
    matrix, wanted = _encoded(vectors, quantizer, codes)
    occupied = OccupiedCodes(taken, sizes)
    before = len(occupied.keys)
    left = prod(sizes) - before - len(matrix)
    if left < 0:
        raise TokenizerError(
            f"{len(matrix)} new items do not fit beside {before} taken codes into the {prod(sizes)} codes of "
            f"{list(sizes)} levels. Fit larger codebooks or more levels and build the semantic IDs again."
        )
    given = np.column_stack([wanted, np.zeros(len(wanted), dtype=np.int32)]) if appended else wanted.copy()
    keys, prefixes = occupied.pack(given), occupied.pack(given[:, :-1])
    _, code, asking = np.unique(keys, return_inverse=True, return_counts=True)
    clashes = (asking[code.reshape(-1)] > 1) | _among(keys, occupied.keys)
    contested = _among(prefixes, np.sort(prefixes[clashes]))
    occupied.add(given[~contested])
    deal = _Deal(matrix, wanted, quantizer, occupied, given, appended)
    rows = np.flatnonzero(contested)
    rows = rows[_canonical(np.column_stack([matrix[rows].astype(np.float64), wanted[rows]]))]
    while len(rows):
        rows = deal.round(rows)
    if len(occupied.keys) != before + len(matrix) or (occupied.keys[1:] == occupied.keys[:-1]).any():
        raise TokenizerError("New codes are not unique. This is a bug of llmrec: please report it.")
    moved = (given[:, : len(levels)] != wanted).any(axis=1)
    spilled = (given[:, : len(sizes) - 1] != wanted[:, : len(sizes) - 1]).any(axis=1)
    distances = _distortions(matrix, wanted, quantizer)
    added = _distortions(matrix[moved], given[moved, : len(levels)], quantizer) - distances[moved]
    begins, ends = occupied.spans(occupied.pack(given[:, :-1]))
    report = AssignmentReport(
        items=len(matrix),
        taken=before,
        contested=int(clashes.sum()),
        moved=int(moved.sum()),
        spilled=int(spilled.sum()),
        distortion=float(distances.mean()) if len(matrix) else None,
        added_distortion=float(added.sum() / len(matrix)) if len(matrix) else None,
        free_codes=left,
        free_in_fullest=sizes[-1] - int((ends - begins).max()) if len(matrix) else None,
        full_prefixes=len(occupied.full(len(sizes) - 1)),
    )
    return Assignment(np.ascontiguousarray(given, dtype=np.int32), report)


@dataclass
class _Deal:
    """The dealing out of free codes, round by round; `given` holds the prefix (M, L' - 1) that each item asks for."""

    matrix: npt.NDArray[np.floating]
    wanted: Codes
    quantizer: Quantizer
    occupied: OccupiedCodes
    given: Codes
    appended: bool

    def round(self, rows: Rows) -> Rows:
        """Deals the free last codes of each prefix to the rows that ask for it, and returns those that spill."""
        prefixes = self.occupied.pack(self.given[rows, :-1])
        order = np.argsort(prefixes, kind="stable")
        ascending = prefixes[order]
        begins = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
        groups = np.split(rows[order], begins[1:])
        dealt = list(zip(groups, self.occupied.free(ascending[begins]), strict=True))
        fitting: list[Group] = [(group, free, None) for group, free in dealt if len(group) <= len(free)]
        crowded = [(group, free) for group, free in dealt if len(group) > len(free)]
        for group, last in self._last_codes(fitting):
            self.given[group, -1] = last
        if fitting:
            self.occupied.add(self.given[np.concatenate([group for group, _, _ in fitting])])
        if not crowded:
            return rows[:0]
        # Whoever stays in them, these prefixes are full after this round: refuges are sought elsewhere.
        first = np.repeat([group[0] for group, _ in crowded], [len(free) for _, free in crowded])
        filled = np.concatenate([free for _, free in crowded])
        self.occupied.add(np.column_stack([self.given[first, :-1], filled]))
        ends = np.cumsum([len(group) for group, _ in crowded])[:-1]
        refuges, prices = self._refuges(np.concatenate([group for group, _ in crowded]))
        priced = [(*pair, price) for pair, price in zip(crowded, np.split(prices, ends), strict=True)]
        spilling = np.zeros(len(self.given), dtype=bool)
        for (group, last), refuge in zip(self._last_codes(priced), np.split(refuges, ends), strict=True):
            spilling[group] = last < 0
            self.given[group, -1] = last
            self.given[group[last < 0]] = refuge[last < 0]
        return np.asarray(rows[spilling[rows]])

    def _last_codes(self, groups: Sequence[Group]) -> Iterator[tuple[Rows, Rows]]:
        """Each group's rows (n,) with their last codes (n,), -1 for those that spill."""
        if self.appended:
            for group, free, prices in groups:
                losses = np.zeros(len(group))
                if prices is not None:
                    losses = _distortions(self.matrix[group], self.given[group, :-1], self.quantizer) - prices
                yield group, _digits(group, free, losses)
            return
        size, width = self.occupied.sizes[-1], self.matrix.shape[1]
        weights = [max(len(group) * size, min(len(group) ** 2, len(free)) * width) for group, free, _ in groups]
        batches = np.cumsum(weights, dtype=np.int64) // ENTRIES
        for batch in np.unique(batches):
            part = [groups[place] for place in np.flatnonzero(batches == batch)]
            rows = np.concatenate([group for group, _, _ in part])
            ends = np.cumsum([len(group) for group, _, _ in part])
            spans = [slice(end - len(group), end) for (group, _, _), end in zip(part, ends, strict=True)]
            wide = self.matrix[rows].astype(np.float64)
            rough = last_level_costs(wide, self.given[rows], self.quantizer)
            norms = np.einsum("nd,nd->n", wide, wide)
            shortlists = [
                _shortlist(rough[span], norms[span], free) for (_, free, _), span in zip(part, spans, strict=True)
            ]
            counts = [len(shortlist) for shortlist in shortlists]
            prefixes = self.given[np.repeat([group[0] for group, _, _ in part], counts), :-1]
            points = self.quantizer.decode(np.column_stack([prefixes, np.concatenate(shortlists)]))
            solved = zip(part, spans, shortlists, np.split(points, np.cumsum(counts)[:-1]), strict=True)
            for (group, _, prices), span, shortlist, decoded in solved:
                yield group, _cheapest(wide[span], decoded, shortlist, prices, self.wanted[group])

    def _refuges(self, rows: Rows) -> tuple[Codes, Wide]:
        """The free codes (n, L') nearest to the rows, as far as a beam search finds them, and their distances (n,)."""
        sizes, levels = self.occupied.sizes, self.wanted.shape[1]
        full = [self.occupied.full(level + 1) for level in range(levels)]
        refuges = np.zeros((len(rows), len(sizes)), dtype=np.int32)
        prices = np.empty(len(rows))
        largest, width = max(sizes), self.matrix.shape[1]
        numbers = max(largest, width) if hasattr(self.quantizer, "level_points") else largest * width
        for part in chunks(len(rows), max(1, ENTRIES // (BEAM * numbers))):
            block = self.matrix[rows[part]].astype(np.float64)
            here = np.arange(len(block))
            beams = self.wanted[rows[part], None]  # (n, b, L), nearest first
            errors = np.zeros((len(block), 1))
            for level, size in enumerate(sizes[:levels]):
                flat = beams.reshape(-1, levels)
                costs = _level_costs(np.repeat(block, beams.shape[1], axis=0), flat, level, self.quantizer)
                children = self.occupied.pack(flat[:, :level])[:, None] * size + np.arange(size)
                costs[_among(children, full[level])] = np.inf
                costs[np.isinf(errors).reshape(-1)] = np.inf
                costs = costs.reshape(len(block), -1)
                most = min(BEAM, costs.shape[1]) if level < levels - 1 else 1
                found, errors = np.empty((len(block), most), dtype=np.int64), np.empty((len(block), most))
                for place in range(most):  # argmin takes the first of equals
                    found[:, place] = costs.argmin(axis=1)
                    errors[:, place] = costs[here, found[:, place]]
                    costs[here, found[:, place]] = np.inf
                parents, chosen = np.divmod(found, size)
                beams = beams[here[:, None], parents]
                beams[:, :, level] = chosen
            refuges[part, :levels] = beams[:, 0]
            prices[part] = squared_distances(block, self.quantizer.decode(beams[:, 0]))
        return refuges, prices


def _encoded(
    vectors: npt.NDArray[np.floating], quantizer: Quantizer, codes: npt.NDArray[np.integer] | None
) -> tuple[npt.NDArray[np.floating], Codes]:
    """The checked vectors (M, D) and their codes (M, L); no items are no error."""
    matrix, levels = np.asarray(vectors), quantizer.codebook_sizes
    width = quantizer.decode(np.zeros((1, len(levels)), dtype=np.int32)).shape[1]
    if matrix.shape != (0, width):
        matrix = check_matrix(vectors, width)
    if codes is not None:
        wanted = check_codes(codes, levels)
    else:
        wanted = quantizer.encode(matrix) if len(matrix) else np.empty((0, len(levels)), dtype=np.int32)
    if len(wanted) != len(matrix):
        raise TokenizerError(f"{len(wanted)} codes do not belong to {len(matrix)} vectors. Give a code for each.")
    return matrix, wanted


def _among(keys: npt.NDArray[Any], ascending: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which keys, of any shape, are in the ascending array.

    >>> _among(np.array([[1, 2], [9, 5]]), np.array([2, 5, 7])).tolist()
    [[False, True], [False, True]]
    """
    if not len(ascending):
        return np.zeros(keys.shape, dtype=bool)
    places = np.searchsorted(ascending, keys)
    return np.asarray(ascending[np.minimum(places, len(ascending) - 1)] == keys, dtype=bool)


def _canonical(numbers: Wide) -> Rows:
    """An order of the rows (n, d) that their numbers alone decide; equal rows are neighbours in their order."""
    plain = np.ascontiguousarray(numbers) + 0.0  # -0 becomes 0, which is equal to it
    return np.argsort(plain.view(f"V{8 * plain.shape[1]}").reshape(-1), kind="stable")


def _digits(group: Rows, free: Rows, losses: Wide) -> Rows:
    """The lowest free digits, in row order, for those who lose least by staying, of equals the first; -1 for the rest.

    >>> _digits(np.array([7, 8, 2]), np.array([1, 4]), np.array([-9.0, -1.0, -7.0])).tolist()
    [4, -1, 1]
    """
    digits = np.full(len(losses), -1)
    stays = np.argsort(losses, kind="stable")[: len(free)]
    digits[stays[np.argsort(group[stays])]] = free[: len(stays)]
    return digits


def _shortlist(costs: Wide, norms: Wide, free: Rows) -> Rows:
    """The free codes that are among the n cheapest of any of the n items, as far as rough costs (n, K) tell.

    No others are needed, see `reassign`: whoever has another one finds one of its n cheapest left over by the rest.
    """
    items = len(costs)
    if items >= len(free):
        return free
    costs = costs[:, free]
    limit = np.partition(costs, items - 1, axis=1)[:, items - 1]
    limit += 2 * ROUGH * (norms + np.maximum(limit, 0))
    return np.asarray(free[(costs <= limit[:, None]).any(axis=0)])


def _cheapest(vectors: Wide, points: npt.NDArray[np.floating], free: Rows, prices: Wide | None, wanted: Codes) -> Rows:
    """Which of the free codes, at points (m, D), each of (n, D) gets at the least sum, in which -1 costs the price."""
    costs = cdist(vectors, points, "sqeuclidean")
    items, chosen = linear_sum_assignment(costs if prices is None else costs - prices[:, None])
    codes, found = np.full(len(vectors), -1), np.full(len(vectors), np.inf)
    codes[items], found[items] = free[chosen], costs[items, chosen]
    # Equal items, which are neighbours in row order, exchange codes at no loss: the first gets the nearest.
    equal = (vectors[1:] == vectors[:-1]).all(axis=1) & (wanted[1:] == wanted[:-1]).all(axis=1)
    kinds = np.concatenate([[0], np.cumsum(~equal)])
    return np.asarray(codes[np.lexsort((codes, found, kinds))])


def _level_costs(vectors: Wide, codes: Codes, level: int, quantizer: Quantizer) -> Wide:
    """(n, D), (n, L) -> (n, K_l): squared distances to the points of the codes with another one at this level."""
    points_of = getattr(quantizer, "level_points", None)
    if points_of is not None:
        left = vectors.copy()
        for other in range(codes.shape[1]):
            left -= points_of(other)[codes[:, other]] if other != level else 0
        return np.asarray(cdist(left, points_of(level), "sqeuclidean"))
    size = quantizer.codebook_sizes[level]
    candidates = np.repeat(codes, size, axis=0)
    candidates[:, level] = np.tile(np.arange(size), len(codes))
    points = quantizer.decode(candidates).reshape(len(codes), size, -1)
    return squared_distances(vectors[:, None], points)


def _distortions(matrix: npt.NDArray[np.floating], codes: Codes, quantizer: Quantizer) -> Wide:
    """(M,) squared distances of the vectors to their codes' points."""
    found = np.empty(len(codes))
    for rows in chunks(len(codes)):
        found[rows] = squared_distances(matrix[rows], quantizer.decode(codes[rows]))
    return found
