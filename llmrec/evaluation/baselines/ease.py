"""EASE: a linear autoencoder over items, solved in closed form."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from llmrec import machine
from llmrec.evaluation.baselines.ranking import Places, Rows, Scores, best, counted, recent
from llmrec.exceptions import DataError

_BLOCK = 512  # columns of the Gram matrix that are made at once
_RESERVE = 256 << 20  # bytes beside the one dense matrix: blocks, the sparse interactions, scores of a batch


class EASE:
    """Embarrassingly shallow autoencoders (Steck, WWW 2019, arXiv 1905.03375).

    With X the users' interactions (U, N), B minimises |X - X B|² + λ |B|² under diag(B) = 0. With P = (XᵀX + λI)⁻¹
    that is B[i, j] = -P[i, j] / P[j, j] off the diagonal (his equation 8). A history x scores x B.

    An entry of X is 1, or `train_decay`^age if that is below 1, and an entry of x is `decay`^age, where the sequence's
    last item has age 0 and a repeated item the age of its last occurrence. Both are 1 in the paper.

    Only items that occur in training take part, at most the `max_items` most popular: all others score 0, as they
    would with no interaction. B is one float32 matrix of the n items that take part, solved in place by LAPACK's
    Cholesky factorisation (spotrf, spotri), which takes 4 n² bytes and about n³ multiplications and additions. Ties
    go by training popularity, then by item row; scores are float32 and not rounded.

    Attributes:
        kept: (n,) the item rows that take part, ascending.
        weights: (n, n) float32, B.
        counts: (N,) occurrences in training.
        order: (N,) item rows, the most popular first.

    >>> train = [np.array([0, 1]), np.array([0, 1]), np.array([2, 1])]
    >>> model = EASE(regularisation=1.0).fit(train, num_items=4)
    >>> [rows.tolist() for rows in model.recommend([np.array([0])], k=3)]
    [[1, 3, 2]]
    """

    query_parameters = frozenset({"decay"})

    kept: Places
    weights: npt.NDArray[np.float32]
    counts: Places
    order: Places

    def __init__(
        self,
        regularisation: float = 100.0,
        decay: float = 1.0,
        train_decay: float = 1.0,
        max_items: int | None = None,
    ) -> None:
        """`regularisation` is λ; raises DataError if a value is out of range."""
        if not (regularisation > 0 and np.isfinite(regularisation)):
            raise DataError(f"regularisation is {regularisation}. Give a number above 0.")
        if not (0 < decay <= 1 and 0 < train_decay <= 1):
            raise DataError(f"decay is {decay}, train_decay {train_decay}. Give numbers above 0 and up to 1.")
        if max_items is not None and max_items < 1:
            raise DataError(f"max_items is {max_items}. Give at least 1, or leave it out.")
        self.regularisation = regularisation
        self.decay = decay
        self.train_decay = train_decay
        self.max_items = max_items

    def fit(self, train: Sequence[Rows], num_items: int) -> Self:
        """Solves for B.

        Raises:
            DataError: if a row lies outside the catalog, the matrix does not fit into the memory that is available, or
                λ is too small for float32 to solve the equations.
        """
        from scipy.linalg import lapack

        self.counts, self.order = counted(train, num_items)
        popular = self.order[: int(np.count_nonzero(self.counts))][: self.max_items]
        self.kept = np.sort(popular)
        size = len(self.kept)
        _check_memory(size)
        rows = self._interactions(train, self.train_decay)
        gram = np.empty((size, size), dtype=np.float32)
        columns = rows.tocsc()
        for start in range(0, size, _BLOCK):
            gram[start : start + _BLOCK] = (columns[:, start : start + _BLOCK].T @ rows).toarray()
        diagonal = np.einsum("ii->i", gram)
        diagonal += self.regularisation
        if size:
            # The transpose of a symmetric array in C order is itself in Fortran's, which LAPACK overwrites in place.
            factor, failed = lapack.spotrf(gram.T, lower=1, clean=0, overwrite_a=1)
            if not failed:
                inverse, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
            if failed:
                raise DataError(
                    f"XᵀX + {self.regularisation} I is not positive definite in float32 (LAPACK stops at {failed}). "
                    "Give a larger regularisation."
                )
            gram = inverse.T
            _mirror(gram)
            gram /= -np.diagonal(gram).copy()
            np.fill_diagonal(gram, 0.0)
        self.weights = gram
        return self

    def recommend(self, histories: Sequence[Rows], k: int, exclude_seen: bool = True) -> list[Places]:
        """The k best item rows per history, best first; fewer where fewer are left."""
        return best(self.scores, histories, k, self.order, exclude_seen)

    def scores(self, histories: Sequence[Rows]) -> Scores:
        """(B, N) float32; 0 for items that do not take part. An empty history scores 0 throughout."""
        scores = np.zeros((len(histories), len(self.counts)), dtype=np.float32)
        scores[:, self.kept] = self._interactions(histories, self.decay) @ self.weights
        return scores

    @property
    def parameters(self) -> int:
        """Stored numbers that are not 0."""
        return int(np.count_nonzero(self.weights))

    def _interactions(self, sequences: Sequence[Rows], decay: float) -> Any:
        """(B, n) float32 sparse rows over the items that take part, each entry by its item's last occurrence."""
        column = np.full(len(self.counts), -1, dtype=np.int64)
        column[self.kept] = np.arange(len(self.kept))
        items, user, age = recent(sequences, None)
        columns = column[items]
        inside = columns >= 0
        user, columns, age = user[inside], columns[inside], age[inside]
        # Newest first: the first of an item's entries is its last occurrence.
        _, first = np.unique(user * len(self.kept) + columns, return_index=True)
        values = (decay ** age[first]).astype(np.float32)
        shape = (len(sequences), len(self.kept))
        return sparse.csr_array((values, (user[first], columns[first])), shape=shape)


def _check_memory(size: int) -> None:
    available = machine.available_memory()
    needed = 4 * size * size + _RESERVE
    if needed > available:
        fitting = int(max(0, available - _RESERVE) / 4) ** 0.5
        raise DataError(
            f"EASE over {size:,} items needs {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are "
            f"available. Keep the most popular items with max_items={int(fitting) or 1} or fewer, or use item-cf."
        )


def _mirror(square: npt.NDArray[np.float32]) -> None:
    """Copies the upper triangle onto the lower one, block by block, without a second matrix."""
    for start in range(0, len(square), _BLOCK):
        stop = start + _BLOCK
        square[stop:, start:stop] = square[start:stop, stop:].T
        corner = square[start:stop, start:stop]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
