"""Rewards by likeness: to the target (semantic IDs, embeddings), and unlikeness within a group."""

import numpy as np
import numpy.typing as npt

from llmrec.catalog import Catalog
from llmrec.reinforcement.cases import RolloutCases, Rows


def prefix(
    items: Rows,
    cases: RolloutCases,
    chosen: Rows,
    *,
    codes: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """The share of leading code levels that an item has in common with the target; 1 for the target alone.

    The levels before the first that differs are counted, and divided by the longer one's number of levels.

    Args:
        items, cases, chosen: see `llmrec.reinforcement.rewards`.
        codes: (N, L) of the catalog.
        lengths: (N,) the levels of every item, see `code_lengths`.
    """
    targets = cases.targets[chosen][:, None]
    same = codes[items] == codes[targets]  # (B, G, L)
    common = np.logical_and.accumulate(same, axis=2).sum(axis=2)
    longer = np.maximum(lengths[items], lengths[targets])
    # Of a short title the levels of nothing behind its end are common with itself, too.
    return np.asarray(np.minimum(common, longer) / longer, dtype=np.float64)


def code_lengths(catalog: Catalog) -> npt.NDArray[np.int64]:
    """(N,) how many levels every item has: L, and in text mode as many as its title has tokens."""
    if catalog.is_text:
        return np.asarray((catalog.codes > 0).sum(axis=1), dtype=np.int64)
    return np.full(len(catalog), catalog.num_levels, dtype=np.int64)


def semantic(
    items: Rows, cases: RolloutCases, chosen: Rows, *, vectors: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """The cosine of an item's embedding with the target's, in [-1, 1]; with a vector of zeros it is 0.

    Args:
        items, cases, chosen: see `llmrec.reinforcement.rewards`.
        vectors: (N, E) by catalog row; may be a memory map.
    """
    own = _normalised(vectors[items])  # (B, G, E)
    wanted = _normalised(vectors[cases.targets[chosen]])  # (B, E)
    return np.asarray(np.clip(np.einsum("bge,be->bg", own, wanted), -1.0, 1.0))


def diversity(
    items: Rows, cases: RolloutCases, chosen: Rows, *, codes: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """The share of the other items of its group whose semantic ID begins with another code, in [0, 1].

    A group of one has no others: 0. It asks for no target, so alone it teaches to be different, not to be right.

    Args:
        items, cases, chosen: see `llmrec.reinforcement.rewards`.
        codes: (N, L) of the catalog.
    """
    first = codes[items, 0]  # (B, G)
    others = first.shape[1] - 1
    different = (first[:, :, None] != first[:, None, :]).sum(axis=2)
    return np.asarray(different / max(1, others), dtype=np.float64)


def _normalised(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    exact = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(exact, axis=-1, keepdims=True)
    return np.asarray(np.divide(exact, norms, out=np.zeros_like(exact), where=norms > 0))
