"""ItemFeatures: what representations are made of, for one catalogue, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError


@dataclass(frozen=True)
class ItemFeatures:
    """What is known of N items.

    Attributes:
        item_ids: N ids.
        vectors: (N, E) floats, such as an `EmbeddingStore`'s rows; for texts.
        codes: (N, L) integers from 0, such as a `Catalog`'s; for semantic IDs.
        trained: (N,) whether a training history holds the item; None: all of them. An id's own vector means nothing
            where this is false.

    Raises:
        DataError: if they differ in number, or a vector is not finite.
    """

    item_ids: Sequence[str]
    vectors: npt.NDArray[np.floating] | None = None
    codes: npt.NDArray[np.integer] | None = None
    trained: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        for name, values, dimensions in (
            ("vectors", self.vectors, 2),
            ("codes", self.codes, 2),
            ("trained", self.trained, 1),
        ):
            if values is not None and (values.ndim != dimensions or len(values) != len(self.item_ids)):
                raise DataError(
                    f"{name} of shape {values.shape} do not belong to {len(self.item_ids)} items. "
                    "Give one row per item."
                )
        if self.vectors is not None and not np.isfinite(self.vectors).all():
            raise DataError("A vector holds NaN or infinity. Embed the items again.")

    def __len__(self) -> int:
        return len(self.item_ids)

    def check_number(self, num_items: int) -> None:
        """Raises DataError unless there are `num_items`."""
        if len(self) != num_items:
            raise DataError(
                f"{len(self)} items do not fit a representation of {num_items}. Give the features of the same catalog."
            )
