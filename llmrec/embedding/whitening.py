"""Whitening: embeddings turned to their principal components, which are then brought nearer to one variance."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from llmrec.embedding.reduction import fix_signs
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import atomic_path, write_json

TENSORS_FILE, MANIFEST_FILE = "whitening.safetensors", "whitening.json"
# Rows worked on at once: 2,048 x 1,024 float64 are 16 MB.
BLOCK = 2048
# Directions with less variance than this share of the largest are the rounding of the others.
NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class Whitening:
    """A fitted rotation and scaling: y = ((x - mean) @ directions) * variances ** (-power / 2).

    Principal component analysis (Hotelling 1933); whitening of sentence embeddings by Su et al. (2021, "Whitening
    Sentence Representations for Better Semantics and Faster Retrieval", equations 4-6).

    Attributes:
        power: 0 leaves the components' variances as they are, 1 makes all of them 1, 0.5 takes the square root of
            each, which is halfway.
        mean: (D,) float64, subtracted from vectors.
        directions: (D, D') float64 with orthonormal columns, the largest variance first; each one's entry of largest
            magnitude, the first among equals, is positive.
        variances: (D',) float64 of the components, by the population's formula (divided by N).
        total_variance: the sum over all D directions.
    """

    power: float
    mean: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    variances: npt.NDArray[np.float64]
    total_variance: float

    @property
    def dimension(self) -> int:
        """D', the width of what `transform` returns."""
        return int(self.directions.shape[1])

    @property
    def explained(self) -> float:
        """The share of the variance, 0..1, that the kept directions have; 1 if there is none at all."""
        return min(1.0, float(self.variances.sum()) / self.total_variance) if self.total_variance else 1.0

    @classmethod
    def fit(cls, vectors: npt.NDArray[np.floating], dim: int | None = None, power: float = 0.5) -> Self:
        """Fits on a catalog, in float64 and block by block: a memory map is neither copied nor held in memory.

        Directions without variance are left out, because whitening would blow up their rounding: those below 1e-10
        of the largest variance, and those that the rounding of the numbers themselves explains. Vectors that are all
        alike keep one component, which is 0 for every vector.

        Args:
            vectors: (N, D).
            dim: upper bound of D'; None keeps every direction that has variance.
            power: see above, 0..1.

        Raises:
            DataError: if the vectors are no non-empty matrix or hold NaN, infinity or numbers whose squares are
                infinite, dim is not positive, or the power lies outside 0..1.
        """
        if dim is not None and dim < 1:
            raise DataError(f"{dim} principal components hold nothing. Ask for at least 1, or leave it out for all.")
        if not 0 <= power <= 1:
            raise DataError(f"A whitening power of {power} is none. Use a number from 0 (not at all) to 1 (fully).")
        vectors = np.asanyarray(vectors)
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise DataError(f"Vectors of shape {vectors.shape} cannot be whitened. Give (N, D) with N, D >= 1.")
        # Sums of differences to the first row are 0 where all rows are alike, and lose little where they nearly are.
        first = np.asarray(vectors[0], dtype=np.float64)
        total, largest = np.zeros_like(first), 0.0
        for begin, block in _blocks(vectors):
            magnitudes = np.abs(block).max(axis=1)
            bad = ~(magnitudes < 1e150)
            if bad.any():
                raise DataError(
                    f"The vector in row {begin + int(bad.argmax())} holds NaN, infinity or a number that is too large "
                    "to be squared. Embed that item again."
                )
            largest = max(largest, float(magnitudes.max()))
            total += (block - first).sum(axis=0)
        shift = total / len(vectors)
        values, directions = _decomposed(vectors, first, shift)
        kind = vectors.dtype if np.issubdtype(vectors.dtype, np.floating) else np.dtype(np.float64)
        rounding = (float(np.finfo(kind).eps) * largest) ** 2
        kept = int((values > max(NEGLIGIBLE * values[0], rounding)).sum())
        kept = kept if dim is None else min(dim, kept)
        if kept == 0:
            empty = np.zeros((len(first), 1))
            return cls(float(power), first + shift, empty, np.zeros(1), 0.0)
        return cls(
            power=float(power),
            mean=first + shift,
            directions=np.ascontiguousarray(fix_signs(directions[:, :kept])),
            variances=values[:kept].copy(),
            total_variance=float(values.sum()),
        )

    def transform(self, vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """(N, D) -> (N, D') float32, for the items it was fitted on or for new ones; worked out block by block.

        Raises:
            DataError: if the vectors are not D wide.
        """
        vectors = np.asanyarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise DataError(
                f"Vectors of shape {vectors.shape} do not fit a whitening of vectors {len(self.mean)} wide. "
                "Embed with the same model and settings."
            )
        # Vectors that were all alike have a component without variance, which stays 0.
        scales = np.where(self.variances > 0, self.variances, 1) ** (-self.power / 2)
        projection = self.directions * scales
        result = np.empty((len(vectors), self.dimension), dtype=np.float32)
        for begin, block in _blocks(vectors):
            result[begin : begin + len(block)] = (block - self.mean) @ projection
        return result

    def save(self, folder: str | Path) -> None:
        """Writes whitening.safetensors and whitening.json into `folder`."""
        folder = Path(folder)
        tensors = {"mean": self.mean, "directions": self.directions, "variances": self.variances}
        with atomic_path(folder / TENSORS_FILE) as temporary:
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary)
        write_json(folder / MANIFEST_FILE, {"power": self.power, "total_variance": self.total_variance})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, unreadable or not its match."""
        folder = Path(folder)
        try:
            scalars = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS_FILE)
            loaded = cls(
                power=float(scalars["power"]),
                mean=tensors["mean"],
                directions=tensors["directions"],
                variances=tensors["variances"],
                total_variance=float(scalars["total_variance"]),
            )
            if loaded.directions.shape != (*loaded.mean.shape, *loaded.variances.shape):
                raise ValueError(f"directions of shape {loaded.directions.shape}")
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no fitted whitening ({error!r}). Build the semantic IDs again."
            ) from error
        return loaded


def _decomposed(
    vectors: npt.NDArray[np.floating], first: npt.NDArray[np.float64], shift: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """All variances, in falling order, and their directions as columns; min(N, D) of them."""
    count, width = vectors.shape
    if count <= width:
        centred = np.concatenate([(block - first) - shift for _, block in _blocks(vectors)])
        _, singular, rows = np.linalg.svd(centred, full_matrices=False)
        return singular**2 / count, rows.T
    scatter = np.zeros((width, width))
    for _, block in _blocks(vectors):
        centred = (block - first) - shift
        scatter += centred.T @ centred
    values, directions = np.linalg.eigh(scatter / count)
    return np.maximum(values[::-1], 0), directions[:, ::-1]


def _blocks(vectors: npt.NDArray[np.floating]) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Where each block of rows begins, and its rows as float64."""
    for begin in range(0, len(vectors), BLOCK):
        yield begin, np.asarray(vectors[begin : begin + BLOCK], dtype=np.float64)
