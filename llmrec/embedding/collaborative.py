"""Collaborative embedding: items that follow one another in training histories lie near one another."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from llmrec.embedding.reduction import principal_coordinates, unit_rows
from llmrec.exceptions import DataError


def cooccurrence(train: Sequence[npt.NDArray[np.integer]], num_items: int, window: int = 5) -> csr_matrix:
    """Symmetric co-occurrence: a pair of different items at distance k <= window in one history adds 1/k both ways.

    Args:
        train: the users' training histories, item rows in order of time.
        num_items: N.

    Returns:
        (N, N) float64 with an empty diagonal.

    Raises:
        DataError: if a history holds a row outside 0..N-1, or the window is not positive.
    """
    if window < 1:
        raise DataError(f"A co-occurrence window of {window} holds no pair. Use a window of at least 1.")
    items = np.concatenate([np.asarray(history, dtype=np.int64) for history in train] or [np.zeros(0, np.int64)])
    users = np.repeat(np.arange(len(train)), [len(history) for history in train])
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise DataError(
            f"Histories name item rows {items.min()}..{items.max()}, the catalog has {num_items} items. "
            "Split the interactions with the same items."
        )
    counts = csr_matrix((num_items, num_items), dtype=np.float64)
    for distance in range(1, min(window, len(items) - 1) + 1):
        earlier, later = items[:-distance], items[distance:]
        paired = (users[:-distance] == users[distance:]) & (earlier != later)
        weights = np.full(int(paired.sum()), 1 / distance)
        counts = counts + csr_matrix((weights, (earlier[paired], later[paired])), counts.shape)
    return (counts + counts.T).tocsr()


def positive_pmi(counts: csr_matrix) -> csr_matrix:
    """max(0, log(C_ij · ΣC / (C_i · C_j))), positive pointwise mutual information, of a co-occurrence matrix."""
    pairs = counts.tocoo()
    totals = np.asarray(counts.sum(axis=1)).ravel()
    information = np.log(pairs.data * totals.sum() / (totals[pairs.row] * totals[pairs.col]))
    positive = csr_matrix((np.maximum(information, 0), (pairs.row, pairs.col)), counts.shape)
    positive.eliminate_zeros()
    return positive


def cooccurrence_embeddings(
    train: Sequence[npt.NDArray[np.integer]], num_items: int, dim: int = 64, window: int = 5, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Truncated SVD of the positive PMI of co-occurrences (Levy and Goldberg 2014, "Neural Word Embedding as Implicit
    Matrix Factorization"), with U·S as the coordinates.

    Only training histories belong here: with validation or test items in them the codes would know the answers.

    Args:
        train: the users' training histories, item rows in order of time.
        num_items: N, the catalog's size.
        dim: upper bound of the width, at least 1.
        window: the largest distance between two items of a pair.
        seed: of the randomised SVD.

    Returns:
        (N, min(dim, N)) float32 with rows of norm 1; the rows of items without a positive co-occurrence are 0.

    Raises:
        DataError: if a history holds a row outside the catalog, or dim or the window is not positive.
    """
    if dim < 1:
        raise DataError(f"A collaborative embedding {dim} wide holds nothing. Use a width of at least 1.")
    information = positive_pmi(cooccurrence(train, num_items, window))
    return unit_rows(principal_coordinates(information, dim, seed))
