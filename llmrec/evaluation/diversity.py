"""Diversity: what a recommender shows of the catalog, beside how often it is right.

A recommender that shows everyone the same ten bestsellers can have a decent hit rate. Lists are (B, k) item rows with
negative values as padding, or ragged; a padded place is no recommendation.
"""

import numpy as np
import numpy.typing as npt

from llmrec.data import distribution
from llmrec.evaluation.ranks import Lists, Places, flattened
from llmrec.exceptions import DataError

_GATHER_BYTES = 64 * 2**20  # of the embeddings of one batch of lists


def coverage(lists: Lists, num_items: int) -> float:
    """Catalogue coverage: the share of the N items that stand in at least one list.

    Raises:
        DataError: if a row is not in the catalog, or the catalog is empty.

    >>> coverage([[0, 1], [1, -1]], num_items=4)
    0.5
    """
    return float((_exposure(lists, num_items) > 0).mean())


def gini(lists: Lists, num_items: int) -> float:
    """The Gini coefficient of exposure over all N items, those never shown included.

    0 if all items are shown equally often (or nothing is shown at all), 1 - 1 / N if all places hold one item. With
    exposures x ascending and i from 1, it is 2 Σ i·x_i / (N Σ x) - (N + 1) / N, that is the mean absolute difference
    of two items' exposures by twice the mean exposure.

    Raises:
        DataError: if a row is not in the catalog, or the catalog is empty.

    >>> gini([[0], [0], [0]], num_items=4)
    0.75
    """
    return distribution.gini(_exposure(lists, num_items))


def novelty(lists: Lists, counts: npt.ArrayLike) -> float:
    """The mean self-information -log2 p(item), in bits, over all recommended places; 0 if there are none.

    p is the item's share of the training interactions (Zhou et al. 2010, "Solving the apparent diversity-accuracy
    dilemma of recommender systems"). An item without a training interaction counts as if it had one: its
    self-information would be infinite.

    Args:
        lists: item rows.
        counts: (N,) occurrences in training.

    Raises:
        DataError: if a row is not in the catalog, a count is negative, or there are no training interactions.

    >>> novelty([[0, 1], [2, -1]], counts=[4, 2, 0, 2])  # (1 + 2 + 3) / 3
    2.0
    """
    given = np.asarray(counts, dtype=np.float64).reshape(-1)
    if not given.sum() > 0 or given.min() < 0:
        raise DataError(
            f"{len(given)} training counts sum to {given.sum()} with the least {given.min(initial=np.inf)}, which "
            "gives no shares. Give every item's occurrences in training, 0 or more each."
        )
    shown = _exposure(lists, len(given))
    bits = np.log2(given.sum()) - np.log2(np.maximum(given, 1))
    return float(shown @ bits / shown.sum()) if shown.any() else 0.0


def intra_list_diversity(lists: Lists, embeddings: npt.ArrayLike) -> float:
    """The mean over lists of the mean over pairs of 1 - cosine (Ziegler et al. 2005); 0 if no list holds two items.

    Lists of fewer than two items have no pairs and are left out. A repeated item makes a pair of distance 0, as any
    pair of equal vectors. The cosine with a vector of zeros is 0.

    Args:
        lists: item rows.
        embeddings: (N, D) a vector per item.

    Raises:
        DataError: if a row is not in the catalog, the table has no two axes, or a recommended item's vector is not
            finite.

    >>> intra_list_diversity([[0, 1], [0, 2], [1, -1]], [[1, 0], [0, 2], [3, 0]])
    0.5
    """
    table = np.asarray(embeddings)
    if table.ndim != 2:
        raise DataError(f"Embeddings have the shape {table.shape}. Give one vector per item, as (items, dimensions).")
    flat, owner, _ = flattened(lists)
    owner, flat = owner[flat >= 0], flat[flat >= 0]
    _check_rows(flat, len(table))
    _, start, length = np.unique(owner, return_index=True, return_counts=True)
    start, length = start[length > 1], length[length > 1]
    if not len(start):
        return 0.0
    batch = max(1, _GATHER_BYTES // (8 * max(1, table.shape[1]) * int(length.max())))
    distances = []
    for first in range(0, len(start), batch):
        sizes = length[first : first + batch]
        ends = np.cumsum(sizes)
        slot = np.arange(ends[-1]) + np.repeat(start[first : first + batch] - (ends - sizes), sizes)
        vectors = table[flat[slot]].astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise DataError(
                f"The embedding of item row {flat[slot][wrong[0]]} is not finite. Compute the embeddings again."
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1.0)
        # Of unit vectors, the squared length of their sum holds every pair's cosine twice, and each one's with itself.
        whole = np.square(np.add.reduceat(vectors, ends - sizes, axis=0)).sum(axis=1)
        own = np.add.reduceat((norms[:, 0] > 0).astype(np.float64), ends - sizes)
        distances.append(1 - (whole - own) / (sizes * (sizes - 1)))
    return float(np.concatenate(distances).mean())


def _exposure(lists: Lists, num_items: int) -> Places:
    """(N,) how many places hold each item."""
    if num_items < 1:
        raise DataError(f"The catalog has {num_items} items, so nothing can be shown. Give 1 or more.")
    flat, _, _ = flattened(lists)
    flat = flat[flat >= 0]
    _check_rows(flat, num_items)
    return np.bincount(flat, minlength=num_items).astype(np.int64)


def _check_rows(rows: Places, num_items: int) -> None:
    if len(rows) and rows.max() >= num_items:
        raise DataError(
            f"A list holds the item row {rows.max()}, the catalog {num_items} items. "
            "Replace what is no item by -1; `invalid_rate` counts it."
        )
