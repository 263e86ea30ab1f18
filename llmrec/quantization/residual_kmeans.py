"""Residual k-means: level by level, k-means on what the levels before left over."""

import json
import logging
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from llmrec import __version__
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import check_codes
from llmrec.quantization.kmeans import Init, balanced_kmeans, kmeans, label_sums
from llmrec.quantization.nearest import check_matrix, chunks, nearest
from llmrec.storage import atomic_path, write_json

__all__ = ["ResidualKMeans", "nearest"]

logger = logging.getLogger(__name__)

CODEBOOKS_FILE, MANIFEST_FILE = "codebooks.safetensors", "quantizer.json"
NAME = "residual_kmeans"
# Rows encoded or decoded at once: 8,192 x 384 float64 are 25 MB.
BLOCK = 8192
# Layer normalisation's, beside the variance.
EPSILON = 1e-5
# Points nearer than this, in units of the embeddings' mean norm, are equal but for float32.
EQUAL = 2.0**-20


class ResidualKMeans:
    """Residual vector quantisation with faiss's k-means, greedy from level to level.

    Attributes:
        num_levels: L.
        codebook_size: K, the codes asked for per level.
        niter: Lloyd iterations per level.
        seed: of the first centroids; level l uses seed + l.
        init: the first centroids: "random" items (faiss), or "k-means++".
        normalise_residuals: whether what enters a level is layer-normalised first (mean 0, variance 1 per item), so
            that all items weigh the same in every level. `decode` then sums, per level, the mean of what the levels
            before left of the embeddings with that code.
        balanced: whether every code of a level stands for floor(n / K) or ceil(n / K) of the n different embeddings
            that are learnt from. See below.
        points_per_code: a level learns from at most this many times K items, drawn with the seed.
        codebooks: L arrays (K_l, D) float32, empty before `fit`. K_l is min(K, N), if balanced min(K, n).
        prices: L arrays (K_l,) float64 if balanced, else empty.
        tables: L arrays (K_l, D) float32 that `decode` sums; the codebooks, unless residuals are normalised.

    The same embeddings, settings and machine give the same codebooks. Codes that no item is nearest to are moved onto
    the items that are farthest from their centroids, so that a level leaves codes unused only where fewer than K
    different residuals are left.

    A balanced level adds a price to the squared distance, and `encode` takes the code of least sum. Prices are those
    of the optimal balanced assignment (a linear program, whose dual they solve), so that codes depend on the embedding
    alone, for new items too. Equal embeddings have equal codes and count as one. With more items than are learnt from,
    all items' codes are balanced as far as the sample is like the whole.

    `encode(decode(codes))` need not give back the codes: a sum of centroids may lie nearer to another first centroid.

    Sources: residual vector quantisation, Chen, Guan and Wang, "Approximate Nearest Neighbor Search by Residual Vector
    Quantization" (Sensors, 2010); as semantic IDs, Rajput et al., "Recommender Systems with Generative Retrieval"
    (TIGER, 2023), which learns an autoencoder around it; normalised residuals: GRID, arXiv 2507.22224; balance:
    OneRec, arXiv 2502.18965, and MiniOneRec, arXiv 2510.24431.
    """

    def __init__(
        self,
        num_levels: int = 3,
        codebook_size: int = 256,
        niter: int = 25,
        seed: int = 0,
        *,
        init: Init = "random",
        normalise_residuals: bool = False,
        balanced: bool = False,
        points_per_code: int = 256,
    ) -> None:
        counts = {"num_levels": num_levels, "codebook_size": codebook_size, "niter": niter}
        for name, value in {**counts, "points_per_code": points_per_code}.items():
            if value < 1:
                raise TokenizerError(f"{name} is {value}. Use at least 1.")
        if init not in get_args(Init):
            raise TokenizerError(f"There is no init {init!r}. Use one of {', '.join(get_args(Init))}.")
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.niter = niter
        self.seed = seed
        self.init: Init = init
        self.normalise_residuals = normalise_residuals
        self.balanced = balanced
        self.points_per_code = points_per_code
        self.codebooks: tuple[npt.NDArray[np.float32], ...] = ()
        self.prices: tuple[npt.NDArray[np.float64], ...] = ()
        self._tables: tuple[npt.NDArray[np.float32], ...] = ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l of every level; raises TokenizerError before `fit`."""
        return tuple(len(codebook) for codebook in self._fitted())

    @property
    def tables(self) -> tuple[npt.NDArray[np.float32], ...]:
        """What `decode` sums; raises TokenizerError before `fit`."""
        return self._tables or self._fitted()

    def level_points(self, level: int) -> npt.NDArray[np.float32]:
        """(K_l, D): `decode` is the sum of these over the levels; raises TokenizerError before `fit`."""
        return self.tables[level]

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Fits all levels on (N, D); raises TokenizerError if it is empty or holds NaN or infinity.

        Memory beyond the embeddings is a few times that of K points_per_code rows in float64; if balanced, that of as
        many rows of K float64 numbers as well.
        """
        matrix = check_matrix(embeddings)
        sample = self._sample(matrix)
        if self.balanced:
            sample = np.unique(sample, axis=0)
        size = min(self.codebook_size, len(sample) if self.balanced else len(matrix))
        if size < self.codebook_size:
            what = "different embeddings" if self.balanced else "items"
            logger.warning("%d %s: codebooks have %d codes, not %d.", size, what, size, self.codebook_size)
        negligible = float(np.einsum("nd,nd->", sample, sample)) / len(sample) * EQUAL**2
        codebooks, prices, codes = [], [], []
        residuals = sample
        for level in range(self.num_levels):
            points = _normalised(residuals) if self.normalise_residuals else residuals
            cost: npt.NDArray[np.float64] | None = None
            if self.balanced:
                codebook, cost = balanced_kmeans(points, size, self.niter, self.seed + level, self.init)
                prices.append(cost)
            else:
                codebook = kmeans(points, size, self.niter, self.seed + level, self.init, negligible)
            labels = nearest(points, codebook, cost)
            used = int(np.count_nonzero(np.bincount(labels, minlength=size)))
            if used < size:
                logger.warning("Level %d uses %d of %d codes: fewer residuals differ.", level, used, size)
            residuals = points - codebook[labels]
            codebooks.append(codebook)
            codes.append(labels)
        self.codebooks, self.prices = tuple(codebooks), tuple(prices)
        self._tables = self._learn_tables(sample, codes) if self.normalise_residuals else ()
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L): at each level the nearest centroid, of equally near ones the lowest code.

        Exact in float64 (see `nearest`), block by block: a memory map is never held as a whole.

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        codebooks = self._fitted()
        matrix = check_matrix(embeddings, codebooks[0].shape[1])
        codes = np.empty((len(matrix), len(codebooks)), dtype=np.int32)
        for rows in chunks(len(matrix), BLOCK):
            residuals = matrix[rows].astype(np.float64)
            for level, codebook in enumerate(codebooks):
                points = _normalised(residuals) if self.normalise_residuals else residuals
                codes[rows, level] = nearest(points, codebook, self.prices[level] if self.balanced else None)
                residuals = points - codebook[codes[rows, level]]
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), the sum of the levels' points; raises TokenizerError for codes outside codebooks."""
        tables = self.tables
        codes = check_codes(codes, self.codebook_sizes)
        points = np.empty((len(codes), tables[0].shape[1]), dtype=np.float32)
        for rows in chunks(len(codes), BLOCK):
            points[rows] = sum(table[codes[rows, level]].astype(np.float64) for level, table in enumerate(tables))
        return points

    def save(self, folder: str | Path) -> None:
        """Writes codebooks.safetensors and quantizer.json into `folder`; raises TokenizerError before `fit`."""
        folder = Path(folder)
        tensors: dict[str, npt.NDArray[Any]] = {f"level_{level}": array for level, array in enumerate(self._fitted())}
        tensors |= {f"prices_{level}": array for level, array in enumerate(self.prices)}
        tensors |= {f"table_{level}": array for level, array in enumerate(self._tables)}
        with atomic_path(folder / CODEBOOKS_FILE) as path:
            save_file(tensors, path)
        settings = {name: getattr(self, name) for name in ("num_levels", "codebook_size", "niter", "seed", *OPTIONS)}
        write_json(folder / MANIFEST_FILE, {"quantizer": NAME, **settings, "llmrec_version": __version__})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, unreadable or of another quantizer."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            if manifest["quantizer"] != NAME:
                raise ValueError(f"it is of {manifest['quantizer']!r}")
            tensors = load_file(folder / CODEBOOKS_FILE)
            settings = {name: manifest[name] for name in ("num_levels", "codebook_size", "niter", "seed")}
            # Older folders name none of the options, which were off.
            options = {name: manifest[name] for name in OPTIONS if name in manifest}
            quantizer = cls(**settings, **options)
            levels = range(quantizer.num_levels)
            quantizer.codebooks = tuple(tensors[f"level_{level}"] for level in levels)
            width = quantizer.codebooks[0].shape[1]
            expected: list[tuple[npt.NDArray[Any], tuple[int, ...], type]] = [
                (array, (len(array), width), np.float32) for array in quantizer.codebooks
            ]
            sizes = quantizer.codebook_sizes
            if quantizer.balanced:
                quantizer.prices = tuple(tensors[f"prices_{level}"] for level in levels)
                expected += [(array, (sizes[level],), np.float64) for level, array in enumerate(quantizer.prices)]
            if quantizer.normalise_residuals:
                quantizer._tables = tuple(tensors[f"table_{level}"] for level in levels)
                expected += [
                    (array, (sizes[level], width), np.float32) for level, array in enumerate(quantizer.tables)
                ]
            for array, shape, dtype in expected:
                if array.shape != shape or array.dtype != dtype or not np.isfinite(array).all():
                    raise ValueError(f"{array.dtype} of shape {array.shape} where finite {shape} are due")
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no residual k-means ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _sample(self, matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(n, D) float64, the rows that are learnt from, in their order; all of them if they are few enough."""
        most = self.points_per_code * self.codebook_size
        if len(matrix) <= most:
            return matrix.astype(np.float64)
        rows = np.random.default_rng(self.seed).choice(len(matrix), most, replace=False)
        return matrix[np.sort(rows)].astype(np.float64)

    def _learn_tables(
        self, sample: npt.NDArray[np.float64], codes: list[npt.NDArray[np.int64]]
    ) -> tuple[npt.NDArray[np.float32], ...]:
        """Per level, the mean of what is left of the embeddings with each code; 0 for codes that none has."""
        left, tables = sample.copy(), []
        for labels, codebook in zip(codes, self.codebooks, strict=True):
            sums, counts = label_sums(left, labels, len(codebook))
            table = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
            left -= table[labels]
            tables.append(table)
        return tuple(tables)

    def _fitted(self) -> tuple[npt.NDArray[np.float32], ...]:
        if not self.codebooks:
            raise TokenizerError("The quantizer has no codebooks yet. Call fit, or load one with from_pretrained.")
        return self.codebooks


OPTIONS = ("init", "normalise_residuals", "balanced", "points_per_code")


def _normalised(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Layer normalisation without weights: each row's mean becomes 0 and its variance, if it is not tiny, 1."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    centred /= np.sqrt(np.einsum("nd,nd->n", centred, centred) / vectors.shape[1] + EPSILON)[:, None]
    return np.asarray(centred)
