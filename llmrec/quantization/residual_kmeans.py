"""Residual k-means: level by level, k-means on what the levels before left over."""

import json
import logging
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from llmrec import __version__
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.quantizer import as_vectors
from llmrec.storage import write_json

logger = logging.getLogger(__name__)

CODEBOOKS_FILE, MANIFEST_FILE = "codebooks.safetensors", "quantizer.json"
# Rows of the distance matrix held at once: 4,096 x 1,024 float64 are 32 MB.
CHUNK = 4096


class ResidualKMeans:
    """Residual vector quantisation with faiss's k-means, greedy from level to level.

    Attributes:
        num_levels: L.
        codebook_size: K, the codes asked for per level.
        niter: Lloyd iterations per level.
        seed: of the first centroids; level l uses seed + l.
        codebooks: L arrays (K_l, D) float32, empty before `fit`. K_l is min(K, N): a catalog of N items cannot place
            more than N centroids.

    The same embeddings, settings and machine give the same codebooks. A level learns from at most 256 K items, drawn
    with its seed; faiss's default, beyond which centroids hardly move.

    Sources: residual vector quantisation, Chen, Guan and Wang, "Approximate Nearest Neighbor Search by Residual Vector
    Quantization" (Sensors, 2010); as semantic IDs, Rajput et al., "Recommender Systems with Generative Retrieval"
    (TIGER, 2023), which learns an autoencoder around it.
    """

    def __init__(self, num_levels: int = 3, codebook_size: int = 256, niter: int = 25, seed: int = 0) -> None:
        for name, value in (("num_levels", num_levels), ("codebook_size", codebook_size), ("niter", niter)):
            if value < 1:
                raise TokenizerError(f"{name} is {value}. Use at least 1.")
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.niter = niter
        self.seed = seed
        self.codebooks: tuple[npt.NDArray[np.float32], ...] = ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l of every level; raises TokenizerError before `fit`."""
        return tuple(len(codebook) for codebook in self._fitted())

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Fits all levels on (N, D); raises TokenizerError if it is empty or holds NaN or infinity."""
        import faiss

        residuals = as_vectors(embeddings)
        size = min(self.codebook_size, len(residuals))
        if size < self.codebook_size:
            logger.warning("%d items: codebooks have %d codes, not %d.", len(residuals), size, self.codebook_size)
        codebooks = []
        for level in range(self.num_levels):
            kmeans = faiss.Kmeans(
                residuals.shape[1], size, niter=self.niter, seed=self.seed + level, min_points_per_centroid=1
            )
            kmeans.train(np.ascontiguousarray(residuals, dtype=np.float32))
            codebook = np.array(kmeans.centroids, dtype=np.float32).reshape(size, residuals.shape[1])
            residuals = residuals - codebook[nearest(residuals, codebook)]
            codebooks.append(codebook)
        self.codebooks = tuple(codebooks)
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L): at each level the nearest centroid, of equally near ones the lowest code.

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        codebooks = self._fitted()
        residuals = as_vectors(embeddings, codebooks[0].shape[1])
        codes = np.empty((len(residuals), len(codebooks)), dtype=np.int32)
        for level, codebook in enumerate(codebooks):
            codes[:, level] = nearest(residuals, codebook)
            residuals = residuals - codebook[codes[:, level]]
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), the sum of the levels' centroids; raises TokenizerError for codes outside codebooks."""
        codebooks = self._fitted()
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != len(codebooks):
            raise TokenizerError(f"Codes of shape {codes.shape} do not have {len(codebooks)} levels. Give (N, L).")
        if len(codes) and (codes.min() < 0 or (codes.max(axis=0) >= self.codebook_sizes).any()):
            raise TokenizerError(
                f"Codes reach {codes.max(axis=0).tolist()} and {codes.min()}, codebooks have {self.codebook_sizes} "
                "entries. Decode the codes of this quantizer."
            )
        points = sum(codebook[codes[:, level]].astype(np.float64) for level, codebook in enumerate(codebooks))
        return np.asarray(points, dtype=np.float32)

    def save(self, folder: str | Path) -> None:
        """Writes codebooks.safetensors and quantizer.json into `folder`; raises TokenizerError before `fit`."""
        folder = Path(folder)
        codebooks = self._fitted()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"level_{level}": codebook for level, codebook in enumerate(codebooks)}, folder / CODEBOOKS_FILE)
        write_json(
            folder / MANIFEST_FILE,
            {
                "quantizer": "residual_kmeans",
                "num_levels": self.num_levels,
                "codebook_size": self.codebook_size,
                "niter": self.niter,
                "seed": self.seed,
                "llmrec_version": __version__,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing or unreadable."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / CODEBOOKS_FILE)
            quantizer = cls(**{name: manifest[name] for name in ("num_levels", "codebook_size", "niter", "seed")})
            quantizer.codebooks = tuple(tensors[f"level_{level}"] for level in range(quantizer.num_levels))
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no residual k-means ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _fitted(self) -> tuple[npt.NDArray[np.float32], ...]:
        if not self.codebooks:
            raise TokenizerError("The quantizer has no codebooks yet. Call fit, or load one with from_pretrained.")
        return self.codebooks


def nearest(vectors: npt.NDArray[np.float64], centroids: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """For each of (N, D) the index of the nearest of (K, D) centroids, of equally near ones the lowest.

    Exactly the argmin of the float64 sums of squared differences. The matrix product finds the candidates, whose
    rounding could turn ties around; those within its error are measured again directly.
    """
    centroids = np.asarray(centroids, dtype=np.float64)
    norms = (centroids**2).sum(axis=1)
    result = np.empty(len(vectors), dtype=np.int64)
    for begin in range(0, len(vectors), CHUNK):
        chunk = vectors[begin : begin + CHUNK]
        distances = norms - 2 * (chunk @ centroids.T)  # (n, K), short of the rows' own norms
        best = distances.argmin(axis=1)
        scale = (chunk**2).sum(axis=1) + norms.max()
        close = distances <= (distances[np.arange(len(chunk)), best] + 1e-12 * chunk.shape[1] * scale)[:, None]
        for row in np.flatnonzero(close.sum(axis=1) > 1):
            candidates = np.flatnonzero(close[row])
            exact = ((chunk[row] - centroids[candidates]) ** 2).sum(axis=1)
            best[row] = candidates[exact.argmin()]
        result[begin : begin + CHUNK] = best
    return result
