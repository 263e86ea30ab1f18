"""The nearest of K centroids for each of many vectors: as exact as float64, nearly as fast as float32."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError

# Rows worked on at once: 2,048 x 384 float64 are 6 MB, and the distances to 256 centroids 2 MB.
CHUNK = 2048
# Unit roundoffs of float32 and float64.
ROUND32, ROUND64 = 2.0**-24, 2.0**-53
# Beyond it the squares of a few thousand coordinates may leave float32, in which k-means works.
LARGEST = 1e15


def check_matrix(embeddings: npt.ArrayLike, dimension: int | None = None) -> npt.NDArray[np.floating]:
    """The embeddings as they are, checked block by block: a memory map is neither copied nor held in memory.

    Args:
        embeddings: (N, D) numbers; float16, float32 and float64 keep their type, others become float64.
        dimension: the D that is asked for.

    Raises:
        TokenizerError: if they are no non-empty (N, D) matrix, not of width `dimension`, hold NaN or infinity, or
            numbers beyond 1e15.
    """
    matrix = np.asarray(embeddings)
    if not np.issubdtype(matrix.dtype, np.floating):
        matrix = matrix.astype(np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise TokenizerError(f"Embeddings of shape {matrix.shape} cannot be quantised. Give (N, D) with N, D >= 1.")
    if dimension is not None and matrix.shape[1] != dimension:
        raise TokenizerError(
            f"Embeddings are {matrix.shape[1]} wide, the codebooks {dimension}. "
            "Embed with the same model and settings."
        )
    bad, first, largest = 0, 0, 0.0
    for rows in chunks(len(matrix)):
        block = matrix[rows]
        low, high = float(block.min()), float(block.max())  # NaN if one is in it
        if np.isfinite(low) and np.isfinite(high):
            largest = max(largest, -low, high)
            continue
        finite = np.isfinite(block).all(axis=1)
        first = first if bad else rows.start + int(finite.argmin())
        bad += int((~finite).sum())
    if bad:
        raise TokenizerError(f"{bad} embedding(s) hold NaN or infinity, row {first} first. Embed those items again.")
    if largest > LARGEST:
        raise TokenizerError(f"Embeddings reach {largest:.3g}, whose squares are too large. Scale them to about 1.")
    return matrix


def chunks(rows: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `size` (default CHUNK) that cover `rows` rows."""
    size = size or CHUNK
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


def squared_distances(vectors: npt.NDArray[np.floating], points: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(..., D) and (..., D) -> (...), the sums of squared differences in float64."""
    differences = np.subtract(vectors, points, dtype=np.float64)
    return np.asarray(np.einsum("...d,...d->...", differences, differences))


def nearest(
    vectors: npt.NDArray[np.floating],
    centroids: npt.NDArray[np.floating],
    prices: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """For each of (N, D) the index of the nearest of (K, D) centroids, of equally near ones the lowest.

    Exactly the argmin of the float64 sums of squared differences, plus the centroids' prices (K,) if given. A matrix
    product in float32 finds the candidates. Where more than one lies within what its rounding can have moved (the
    bound of Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1, which no order of summation
    exceeds), a product in float64 does so for these rows, and what is left within its rounding is measured directly.
    """
    wide = np.asarray(centroids, dtype=np.float64)
    prices = np.zeros(len(wide)) if prices is None else prices
    # Equal centroids tie everywhere: the lowest of them stands for all.
    kept = np.sort(np.unique(np.column_stack([wide, prices]), axis=0, return_index=True)[1])
    wide, prices = wide[kept], prices[kept]
    offsets = (wide**2).sum(axis=1) + prices
    result = np.empty(len(vectors), dtype=np.int64)
    for rows in chunks(len(vectors)):
        block = np.asarray(vectors[rows], dtype=np.float64)
        result[rows] = kept[_nearest(block, wide, offsets, prices)]
    return result


def _nearest(
    block: npt.NDArray[np.float64],
    centroids: npt.NDArray[np.float64],
    offsets: npt.NDArray[np.float64],
    prices: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    best, unsure = _candidates(block, centroids, offsets, np.float32)
    rows = np.flatnonzero(unsure)
    if not len(rows):
        return best
    close: npt.NDArray[np.bool_]
    best[rows], close = _candidates(block[rows], centroids, offsets, np.float64)
    for part in chunks(int(close.sum()), max(1, CHUNK // 4)):
        again = rows[np.flatnonzero(close)[part]]
        best[again] = _measured(block[again], centroids, prices)
    return best


def _candidates(
    block: npt.NDArray[np.float64],
    centroids: npt.NDArray[np.float64],
    offsets: npt.NDArray[np.float64],
    precision: type[np.float32 | np.float64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The argmin of offsets - 2 <vector, centroid>, and where rounding leaves another centroid possible."""
    # Powers of two scale without rounding; they keep float32 clear of its largest and smallest numbers.
    scale = 2.0 ** -np.ceil(np.log2(max(np.abs(block).max(), np.abs(centroids).max(), 2.0**-60)))
    distances = (scale * block).astype(precision) @ (-2 * scale * centroids).astype(precision).T
    scaled = offsets * scale**2
    with np.errstate(over="ignore"):  # a price beyond float32 leaves the decision to float64
        distances += scaled.astype(precision)
    best = distances.argmin(axis=1)
    roundoff = ROUND32 if precision is np.float32 else ROUND64
    norms = scale * np.sqrt(np.einsum("nd,nd->n", block, block))
    longest = scale * np.sqrt((centroids**2).sum(axis=1).max())
    # Per distance: two casts and D products and sums of |<x, 2c>|, then the offset's cast and the last sum.
    error = (block.shape[1] + 4) * roundoff * 2 * norms * longest * 1.01
    error += 3 * roundoff * (2 * norms * longest + np.abs(scaled).max()) + block.shape[1] * 2.0**-120
    # The definition is computed in float64 too, and so are the offsets.
    error += (block.shape[1] + 4) * ROUND64 * ((norms + longest) ** 2 + np.abs(scaled).max())
    limit = distances[np.arange(len(block)), best].astype(np.float64) + 2 * error
    with np.errstate(over="ignore"):  # rounded up, the comparison in `precision` lets no candidate go
        limit = np.nextafter(limit.astype(precision), np.asarray(np.inf, dtype=precision))
    unsure = np.count_nonzero(distances <= limit[:, None], axis=1) > 1
    return best, unsure | ~np.isfinite(limit)


def _measured(
    block: npt.NDArray[np.float64], centroids: npt.NDArray[np.float64], prices: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The definition: all sums of squared differences, one centroid after another."""
    lowest, best = np.full(len(block), np.inf), np.zeros(len(block), dtype=np.int64)
    for code, centroid in enumerate(centroids):
        found = ((block - centroid) ** 2).sum(axis=1) + prices[code]
        better = found < lowest
        lowest[better], best[better] = found[better], code
    return best
