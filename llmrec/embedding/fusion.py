"""Fusion: text and collaborative embeddings as two blocks of one vector."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from llmrec.embedding.reduction import fix_signs
from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import write_json

TENSORS_FILE, MANIFEST_FILE = "fusion.safetensors", "fusion.json"


@dataclass(frozen=True)
class Fusion:
    """The fitted blocks: squared distances are (1 - weight) text and weight collaborative, at equal mean norms.

    The text is reduced to its first principal components and half whitened (divided by the fourth root of their
    variances): wide text vectors otherwise spend the codebooks on directions that no user's choice follows. Text that
    was whitened already is cut to its first columns.

    Attributes:
        weight: the collaborative block's share, 0..1.
        text_mean: (D,) subtracted from texts.
        text_projection: (D, D') principal directions with whitening, scale and weight in them; of whitened text the
            first D' unit vectors, with scale and weight.
        collaborative_mean: (C,) the mean of the items with a signal.
        collaborative_scale: the factor of the centred collaborative block.
    """

    weight: float
    text_mean: npt.NDArray[np.float64]
    text_projection: npt.NDArray[np.float64]
    collaborative_mean: npt.NDArray[np.float64]
    collaborative_scale: float

    @classmethod
    def fit(
        cls,
        text: npt.NDArray[np.floating],
        collaborative: npt.NDArray[np.floating],
        weight: float = 0.5,
        text_dim: int | None = None,
        *,
        whitened: bool = False,
    ) -> Self:
        """Fits both blocks on a catalog.

        Args:
            text: (N, D).
            collaborative: (N, C); a row of zeros says that the item has no collaborative signal.
            weight: the collaborative block's share of the squared distances, 0..1.
            text_dim: D', the principal components of the text that are kept; by default C.
            whitened: the text comes from `Whitening.transform`: its columns are principal components already, the
                largest variance first, evened out as far as was asked. The first D' are taken as they are. Components
                of equal variance have no principal directions but rounding's, which would keep any D' of them.

        Raises:
            DataError: if the weight is outside 0..1, the two differ in N, or no item has a collaborative signal.
        """
        if not 0 <= weight <= 1:
            raise DataError(f"A collaborative weight of {weight} is no share. Use a number from 0 to 1.")
        if text.ndim != 2 or collaborative.ndim != 2 or len(text) != len(collaborative):
            raise DataError(
                f"Text embeddings of shape {text.shape} and collaborative ones of {collaborative.shape} do not belong "
                "to the same items. Give one row per item to both."
            )
        signal = collaborative.any(axis=1)
        if not signal.any():
            raise DataError(
                "No two items occur together in the training histories, so there is no collaborative signal. "
                "Use a collaborative weight of 0, or longer histories."
            )
        text = np.asarray(text, dtype=np.float64)
        mean = text.mean(axis=0)
        kept = min(text_dim or collaborative.shape[1], text.shape[1])
        projection = np.eye(text.shape[1], kept) if whitened else _half_whitening(text - mean, kept)
        present = np.asarray(collaborative[signal], dtype=np.float64)
        collaborative_mean = present.mean(axis=0)
        return cls(
            weight=float(weight),
            text_mean=mean,
            text_projection=projection * (np.sqrt(1 - weight) / _mean_norm((text - mean) @ projection)),
            collaborative_mean=collaborative_mean,
            collaborative_scale=float(np.sqrt(weight) / _mean_norm(present - collaborative_mean)),
        )

    def transform(
        self, text: npt.NDArray[np.floating], collaborative: npt.NDArray[np.floating] | None = None
    ) -> npt.NDArray[np.float32]:
        """Both blocks beside each other, (N, D' + C).

        Items without a collaborative signal (rows of zeros, or all if `collaborative` is None) get the mean of that
        block: they are told apart by text alone.
        """
        if collaborative is None:
            collaborative = np.zeros((len(text), len(self.collaborative_mean)))
        signal = collaborative.any(axis=1, keepdims=True)
        centred = np.where(signal, collaborative - self.collaborative_mean, 0)
        blocks = [(text - self.text_mean) @ self.text_projection, centred * self.collaborative_scale]
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def save(self, folder: str | Path) -> None:
        """Writes fusion.safetensors and fusion.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "text_mean": self.text_mean,
            "text_projection": np.ascontiguousarray(self.text_projection),
            "collaborative_mean": self.collaborative_mean,
        }
        save_file(tensors, folder / TENSORS_FILE)
        write_json(folder / MANIFEST_FILE, {"weight": self.weight, "collaborative_scale": self.collaborative_scale})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing or unreadable."""
        folder = Path(folder)
        try:
            scalars = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS_FILE)
            return cls(
                weight=scalars["weight"],
                text_mean=tensors["text_mean"],
                text_projection=tensors["text_projection"],
                collaborative_mean=tensors["collaborative_mean"],
                collaborative_scale=scalars["collaborative_scale"],
            )
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no fitted fusion ({error!r}). Build the semantic IDs again with interactions."
            ) from error


def _half_whitening(centred: npt.NDArray[np.float64], kept: int) -> npt.NDArray[np.float64]:
    """(D, up to `kept`) principal directions, divided by the fourth roots of their variances."""
    values, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    values, directions = values[::-1][:kept], fix_signs(directions[:, ::-1][:, :kept])
    # Components without variance are left out: whitening would blow up their rounding noise.
    real = values > 1e-10 * max(values[0], 1e-300)
    return np.asarray(directions[:, real] * values[real] ** -0.25)


def _mean_norm(block: npt.NDArray[np.float64]) -> float:
    # A block whose items are all alike has norm 0 and nothing to scale.
    return float(np.linalg.norm(block, axis=1).mean()) or 1.0
