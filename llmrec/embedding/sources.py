"""Sources of collaborative vectors: co-occurrence, a SASRec's item table, or the user's own, one row per item."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from llmrec.embedding.collaborative import cooccurrence_embeddings
from llmrec.embedding.sequential import sasrec_embeddings
from llmrec.embedding.store import EmbeddingStore
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

Source = Literal["cooccurrence", "sasrec", "own"]


def own_vectors(folder: str | Path, item_ids: Sequence[str]) -> npt.NDArray[np.float32]:
    """Rows (N, C) of the user's own vectors, zeros for items without one; vectors of other items are left out.

    Args:
        folder: as `EmbeddingStore.save` writes it.
        item_ids: N, unique.

    Raises:
        ArtefactError: if the folder holds no embeddings.
    """
    own = EmbeddingStore.load(folder)
    rows = {item: row for row, item in enumerate(item_ids)}
    there = [item for item in own.item_ids if item in rows]
    found = np.zeros((len(item_ids), own.dimension), dtype=np.float32)
    found[[rows[item] for item in there]] = own.rows(there)
    return found


def collaborative_vectors(
    source: Source,
    item_ids: Sequence[str],
    train: Sequence[npt.NDArray[np.integer]] | None = None,
    *,
    folder: str | Path | None = None,
    dim: int = 64,
    window: int = 5,
    epochs: int = 30,
    seed: int = 0,
    progress: bool = False,
) -> npt.NDArray[np.float32] | None:
    """What users say of the items, one row each, and zeros for items of which they say nothing; it is logged how many.

    Args:
        source: "cooccurrence" (`cooccurrence_embeddings`), "sasrec" (`sasrec_embeddings`) or "own" (`own_vectors`).
        item_ids: N, in the order of the rows.
        train: the users' training histories, item rows in order of time; not read for "own".
        folder: of the user's own vectors.
        dim: the width, not of one's own.
        window: of co-occurrence.
        epochs: of the SASRec.
        seed: of both.
        progress: shows the SASRec's bar.

    Returns:
        (N, C) float32, or None if no item has a signal.

    Raises:
        ArtefactError: if the folder of own vectors holds none.
        DataError: if there is no such source, it lacks its histories or its folder, or a number is out of range.
    """
    if source not in get_args(Source):
        raise DataError(f"There is no collaborative source {source!r}. Use one of {', '.join(get_args(Source))}.")
    if source == "own":
        if folder is None:
            raise DataError("The source 'own' came without a folder. Name the one that holds the vectors.")
        found = own_vectors(folder, item_ids)
    elif train is None:
        raise DataError(f"The source {source!r} came without training histories. Give them, or vectors of your own.")
    elif source == "sasrec":
        logger.info("SASRec on the training histories of %s users", f"{len(train):,}")
        found = sasrec_embeddings(train, len(item_ids), dim, epochs=epochs, seed=seed, progress=progress)
    else:
        logger.info("Co-occurrence in the training histories of %s users", f"{len(train):,}")
        found = cooccurrence_embeddings(train, len(item_ids), dim, window, seed)
    unseen = int((~found.any(axis=1)).sum())
    if unseen == len(item_ids):
        logger.info("No item has a collaborative signal: all are placed by their text alone")
        return None
    if unseen:
        logger.info("%s items have no collaborative signal and are placed by their text alone", f"{unseen:,}")
    return found
