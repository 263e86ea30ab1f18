"""Truncated SVD with fixed signs, and unit rows: what the static and the collaborative embedding share."""

from typing import Any

import numpy as np
import numpy.typing as npt

# Up to this many rows the Gram matrix is decomposed exactly; the randomised SVD wants matrices larger than its rank.
EXACT_ROWS = 512


def principal_coordinates(matrix: Any, rank: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """U·S of the truncated singular value decomposition of a sparse (N, F) matrix.

    Each column's entry of largest magnitude is positive, so that signs do not depend on the solver's path. Small
    matrices are decomposed exactly, larger ones by Halko, Martinsson and Tropp (2011) with 4 power iterations.

    Returns:
        (N, min(rank, N, F)) float64; the distances between rows approximate those of the matrix's rows, and rows of
        zeros stay so.
    """
    rank = min(rank, *matrix.shape)
    if matrix.shape[0] <= max(EXACT_ROWS, 2 * rank):
        values, vectors = np.linalg.eigh((matrix @ matrix.T).toarray().astype(np.float64))
        left, singular = vectors[:, ::-1][:, :rank], np.sqrt(np.maximum(values[::-1][:rank], 0))
    else:
        from sklearn.utils.extmath import randomized_svd

        left, singular, _ = randomized_svd(matrix, rank, n_iter=4, random_state=seed)
    coordinates = np.asarray(fix_signs(left) * singular, dtype=np.float64)
    # The solvers leave rounding noise in rows that are 0; scaled to norm 1 it would pass for a signal.
    coordinates[np.asarray(abs(matrix).sum(axis=1)).ravel() == 0] = 0
    return coordinates


def fix_signs(columns: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Flips columns (N, D) so that each one's entry of largest magnitude, the first among equals, is positive."""
    extremes = columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])]
    return np.asarray(columns * np.where(extremes < 0, -1, 1))


def unit_rows(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Rows (N, D) scaled to norm 1; rows that are 0 stay 0.

    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).round(1).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), dtype=np.float32)
