"""Reconstruction: how much of the item vectors is left in their codes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError
from llmrec.quantization.nearest import check_matrix, chunks, squared_distances
from llmrec.quantization.quantizer import Quantizer


def reconstruction(
    vectors: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], quantizer: Quantizer
) -> dict[str, Any]:
    """The error of the points that codes stand for, against the vectors that were quantised.

    Args:
        vectors: (N, D), in the space that the quantizer was fitted in; a memory map is read block by block.
        codes: (N, L) or more; levels beyond the quantizer's L, such as an appended digit, stand for no point.
        quantizer: its `decode` is used, and `level_points` (of which `decode` is the sum) if it has that.

    Returns:
        "mse": the mean over items of the squared distance between vector and point, in float64; "relative": mse by the
        mean squared distance of the vectors to their mean, so that 1 is no better than one point for all items, and
        None if all vectors are equal; "cosine": the mean cosine between vector and point, where a point of 0 counts as
        0 and vectors of 0 are left out, and None if all are; "per_level": for each l = 1..L the relative error of the
        sum of the first l levels' points, an empty list if the quantizer has no such points or all vectors are equal.

    Raises:
        TokenizerError: if shapes disagree, a vector is not finite, or a code is outside its codebook.
    """
    matrix = check_matrix(vectors)
    levels = len(quantizer.codebook_sizes)
    given = np.asarray(codes)
    if given.ndim != 2 or len(given) != len(matrix) or given.shape[1] < levels:
        raise TokenizerError(
            f"Codes of shape {given.shape} do not belong to {len(matrix)} vectors and {levels} levels. "
            "Give the codes that this quantizer made of these vectors."
        )
    points_of = getattr(quantizer, "level_points", None)
    tables = [] if points_of is None else [np.asarray(points_of(level), np.float64) for level in range(levels)]
    mean = sum(matrix[rows].sum(axis=0, dtype=np.float64) for rows in chunks(len(matrix))) / len(matrix)
    # Compared with the first row, because the mean of equal numbers is not always that number.
    constant = all((matrix[rows] == matrix[0]).all() for rows in chunks(len(matrix)))
    error = spread = cosines = 0.0
    counted = 0
    after = np.zeros(len(tables))
    for rows in chunks(len(matrix)):
        block = np.asarray(matrix[rows], dtype=np.float64)
        chosen = given[rows, :levels]
        points = np.asarray(quantizer.decode(chosen), dtype=np.float64)
        error += float(squared_distances(block, points).sum())
        spread += float(squared_distances(block, mean).sum())
        norms, lengths = np.linalg.norm(block, axis=1), np.linalg.norm(points, axis=1)
        some = (norms > 0) & (lengths > 0)
        products = np.einsum("nd,nd->n", block[some], points[some])
        cosines += float((products / (norms[some] * lengths[some])).sum())
        counted += int((norms > 0).sum())
        partial = np.zeros_like(block)
        for level, table in enumerate(tables):
            partial += table[chosen[:, level]]
            after[level] += squared_distances(block, partial).sum()
    return {
        "mse": error / len(matrix),
        "relative": None if constant else error / spread,
        "cosine": cosines / counted if counted else None,
        "per_level": [] if constant else (after / spread).tolist(),
    }
