"""Residual VQ: additive codebooks that are learnt together, and a beam search for the codes."""

from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import ArtefactError
from llmrec.quantization.codebooks import (
    ITEMS_PER_CENTROID,
    check_codes,
    check_positive,
    load_quantizer,
    means_of,
    require_fitted,
    sampled_rows,
    save_quantizer,
)
from llmrec.quantization.nearest import check_matrix, chunks, nearest, squared_distances
from llmrec.quantization.residual_kmeans import ResidualKMeans

# Distances of the beam search held at once: 2^21 float64 are 16 MB.
ENTRIES = 1 << 21


class ResidualVQ:
    """A code's point is the sum of one centroid per level, as in residual k-means, but no level is learnt alone.

    `fit` begins with greedy residual k-means and then, in rounds, (1) gives every item the code that a beam search
    finds, (2) moves the centroids of one level after another to the mean of what their items' other levels leave over,
    which is the best place for them while the codes stand, and (3) puts centroids that no item uses onto the items
    that are coded worst. The codebooks of the best round are kept, the beginning included. Alternating
    minimisation needs no learning rate, decay or batch size, which moving averages over mini-batches do, and it does
    not depend on the order of items; with a catalog in memory there is nothing that mini-batches would save.

    `encode` keeps the `beam` nearest partial sums from level to level and ends with the nearest whole sum. The greedy
    code takes part in that choice, so no item's error is above the greedy one with the same codebooks; on the items
    that `fit` learns from, the mean is not above that of greedy residual k-means of the same seed. Of equally near
    sums the one whose prefix was nearer wins, then the lower code, up to the rounding of float64.

    `encode(decode(codes))` need not be `codes`: a beam can lose the path to a sum of several levels. It is if K to
    the power of L - 1 is at most `beam`, when the search is exhaustive, and no two codes have one sum.

    Attributes:
        ordered: True, a level refines those before it.
        num_levels: L.
        codebook_size: K, the codes asked for per level.
        beam: partial sums kept, 1 for greedy encoding.
        rounds: of alternating minimisation.
        niter: Lloyd iterations per level at the beginning.
        seed: of the items learnt from and the first centroids; level l uses seed + l.
        codebooks: L arrays (K_l, D) float32, empty before `fit`; K_l is min(K, N).

    `fit` learns from at most 256 K items. The same embeddings, settings and machine give the same codebooks.

    Sources: Chen, Guan, Wang, "Approximate Nearest Neighbor Search by Residual Vector Quantization" (Sensors 2010),
    with its joint optimisation; the beam: Babenko, Lempitsky, "Additive Quantization for Extreme Vector
    Compression" (CVPR 2014), and faiss's ResidualQuantizer, whose codebooks are not learnt again after their level.
    """

    ordered: ClassVar[bool] = True

    def __init__(
        self,
        num_levels: int = 3,
        codebook_size: int = 256,
        beam: int = 5,
        rounds: int = 8,
        niter: int = 25,
        seed: int = 0,
    ) -> None:
        check_positive(num_levels=num_levels, codebook_size=codebook_size, beam=beam, rounds=rounds, niter=niter)
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.beam = beam
        self.rounds = rounds
        self.niter = niter
        self.seed = seed
        self.codebooks: tuple[npt.NDArray[np.float32], ...] = ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l of every level; raises TokenizerError before `fit`."""
        return tuple(len(codebook) for codebook in self._fitted())

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Fits all levels on (N, D); raises TokenizerError if it is empty or holds NaN or infinity."""
        matrix = check_matrix(embeddings)
        rows = sampled_rows(len(matrix), ITEMS_PER_CENTROID * self.codebook_size, self.seed)
        sample: npt.NDArray[np.float64] = matrix[rows].astype(np.float64)
        greedy = ResidualKMeans(self.num_levels, self.codebook_size, self.niter, self.seed).fit(sample)
        self.codebooks = greedy.codebooks
        codes = self.encode(sample)
        errors = squared_distances(sample, self.decode(codes))
        best, kept = float(errors.sum()), self.codebooks
        for _ in range(self.rounds):
            self.codebooks = self._moved(sample, codes, errors)
            codes = self.encode(sample)
            errors = squared_distances(sample, self.decode(codes))
            if errors.sum() < best:
                best, kept = float(errors.sum()), self.codebooks
        self.codebooks = kept
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L), the nearest sum that the beam search finds.

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        codebooks = tuple(codebook.astype(np.float64) for codebook in self._fitted())
        matrix = check_matrix(embeddings, codebooks[0].shape[1])
        codes = np.empty((len(matrix), len(codebooks)), dtype=np.int32)
        widest = max(1, ENTRIES // (self.beam * max(self.codebook_sizes)))
        # <centroid, centroid> of every pair of levels: a partial sum's products are looked up, not computed again.
        products = {
            (before, level): codebooks[before] @ codebook.T
            for level, codebook in enumerate(codebooks)
            for before in range(level)
        }
        for rows in chunks(len(matrix), widest):
            block = matrix[rows].astype(np.float64)
            codes[rows] = _searched(block, codebooks, products, self.beam)
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), the sum of the levels' centroids; raises TokenizerError for codes outside codebooks."""
        codebooks = self._fitted()
        codes = check_codes(codes, self.codebook_sizes)
        points = np.zeros((len(codes), codebooks[0].shape[1]))
        for level, codebook in enumerate(codebooks):
            points += codebook[codes[:, level]]
        return points.astype(np.float32)

    def level_points(self, level: int) -> npt.NDArray[np.float64]:
        """(K_l, D): `decode` is the sum of these over the levels; raises TokenizerError before `fit`."""
        return self._fitted()[level].astype(np.float64)

    def save(self, folder: str | Path) -> None:
        """Writes codebooks.safetensors and quantizer.json into `folder`; raises TokenizerError before `fit`."""
        settings = ("num_levels", "codebook_size", "beam", "rounds", "niter", "seed")
        save_quantizer(
            folder,
            {"quantizer": "residual_vq", **{name: getattr(self, name) for name in settings}},
            {f"level_{level}": codebook for level, codebook in enumerate(self._fitted())},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, unreadable or of another quantizer."""
        settings, tensors = load_quantizer(folder, "residual_vq")
        try:
            quantizer = cls(**settings)
            quantizer.codebooks = tuple(tensors[f"level_{level}"] for level in range(quantizer.num_levels))
            if len({(codebook.ndim, codebook.shape[1]) for codebook in quantizer.codebooks}) != 1:
                raise ValueError(f"codebooks of shapes {[codebook.shape for codebook in quantizer.codebooks]}")
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no whole residual VQ ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _fitted(self) -> tuple[npt.NDArray[np.float32], ...]:
        return require_fitted(self.codebooks)

    def _moved(
        self, sample: npt.NDArray[np.float64], codes: npt.NDArray[np.int32], errors: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float32], ...]:
        """The codebooks after one sweep over the levels, in which each lowers the error at the given codes."""
        codebooks = [codebook.astype(np.float64) for codebook in self.codebooks]
        residuals = sample - sum(codebook[codes[:, level]] for level, codebook in enumerate(codebooks))
        worst = np.argsort(-errors, kind="stable")
        for level, codebook in enumerate(codebooks):
            chosen = codes[:, level]
            targets = residuals + codebook[chosen]
            codebook[:] = means_of(targets, chosen, codebook)
            unused = np.flatnonzero(np.bincount(chosen, minlength=len(codebook)) == 0)
            # A dead centroid and its item fit exactly while the item's other codes stand. Levels take different items.
            seeds = worst[level :: self.num_levels][: len(unused)]
            codebook[unused[: len(seeds)]] = targets[seeds]
            residuals = targets - codebook[chosen]
        return tuple(codebook.astype(np.float32) for codebook in codebooks)


def _searched(
    block: npt.NDArray[np.float64],
    codebooks: tuple[npt.NDArray[np.float64], ...],
    products: dict[tuple[int, int], npt.NDArray[np.float64]],
    beam: int,
) -> npt.NDArray[np.int32]:
    """Beam search over the levels for (n, D); returns (n, L)."""
    rows = np.arange(len(block))[:, None]
    beams = np.zeros((len(block), 1, 0), dtype=np.int32)  # (n, b, levels so far), nearest first
    errors = np.zeros((len(block), 1))  # short of the rows' own squared norms
    for level, codebook in enumerate(codebooks):
        # |x - s - c|² - |x - s|² = |c|² - 2 <x, c> + 2 <s, c>, where s sums the centroids chosen so far.
        added = (codebook**2).sum(axis=1) - 2 * (block @ codebook.T)
        totals = errors[:, :, None] + added[:, None, :]
        for before in range(level):
            totals += 2 * products[before, level][beams[:, :, before]]
        totals = totals.reshape(len(block), -1)
        kept = min(beam, totals.shape[1])
        found = _lowest(totals, kept)
        errors = totals[rows, found]
        parents, chosen = np.divmod(found, len(codebook))
        beams = np.concatenate([beams[rows, parents], chosen[:, :, None].astype(np.int32)], axis=2)
    greedy, residuals = np.empty((len(block), len(codebooks)), dtype=np.int32), block
    for level, codebook in enumerate(codebooks):
        greedy[:, level] = nearest(residuals, codebook)
        residuals = residuals - codebook[greedy[:, level]]
    best, left = beams[:, 0], block
    for level, codebook in enumerate(codebooks):
        left = left - codebook[best[:, level]]
    closer = np.einsum("nd,nd->n", residuals, residuals) < np.einsum("nd,nd->n", left, left)
    return np.where(closer[:, None], greedy, best)


def _lowest(totals: npt.NDArray[np.float64], kept: int) -> npt.NDArray[np.int64]:
    """The places of the `kept` lowest entries of each row (n, m), ascending, of equal ones the first.

    >>> _lowest(np.array([[3.0, 1.0, 2.0, 1.0]]), 3).tolist()
    [[1, 3, 2]]
    """
    if kept == 1:
        return np.asarray(totals.argmin(axis=1)[:, None], dtype=np.int64)
    rows = np.arange(len(totals))[:, None]
    found = np.sort(np.argpartition(totals, kept - 1, axis=1)[:, :kept], axis=1)
    values = totals[rows, found]
    # The partition takes any of the entries that tie with the last one kept.
    tied = np.flatnonzero(np.count_nonzero(totals <= values.max(axis=1, keepdims=True), axis=1) > kept)
    found[tied] = np.sort(np.argsort(totals[tied], axis=1, kind="stable")[:, :kept], axis=1)
    # From ascending places, the stable sort by value lets the first of equals win.
    return np.asarray(found[rows, np.argsort(totals[rows, found], axis=1, kind="stable")], dtype=np.int64)
