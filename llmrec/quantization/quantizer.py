"""Quantizer: what every semantic ID tokenizer can do."""

from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt


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
