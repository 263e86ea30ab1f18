"""Quantizer: what every semantic ID tokenizer can do, and the checks on what they are given."""

from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError


class Quantizer(Protocol):
    """Embeddings (N, D) <-> codes (N, L) with code l below codebook_sizes[l]."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l of every level; raises TokenizerError before `fit`."""
        ...

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Fits the codebooks on (N, D) and returns itself."""
        ...

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L)."""
        ...

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), the point that a code stands for."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes safetensors and JSON into `folder`."""
        ...

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote."""
        ...


def as_vectors(embeddings: npt.NDArray[np.floating], dimension: int | None = None) -> npt.NDArray[np.float64]:
    """The embeddings in float64.

    Raises:
        TokenizerError: if they are no non-empty (N, D) matrix, not of width `dimension`, or hold NaN or infinity.
    """
    vectors: npt.NDArray[np.float64] = np.asarray(embeddings, dtype=np.float64)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise TokenizerError(f"Embeddings of shape {vectors.shape} cannot be quantised. Give (N, D) with N, D >= 1.")
    if dimension is not None and vectors.shape[1] != dimension:
        raise TokenizerError(
            f"Embeddings are {vectors.shape[1]} wide, the codebooks {dimension}. "
            "Embed with the same model and settings."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise TokenizerError(
            f"{int((~finite).sum())} embedding(s) hold NaN or infinity, row {int(finite.argmin())} first. "
            "Embed those items again."
        )
    return vectors
