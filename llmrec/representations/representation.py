"""ItemRepresentation: what an item is to a sequence model: its vector as input, and as candidate."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from llmrec.exceptions import DataError
from llmrec.representations.item_features import ItemFeatures


class ItemRepresentation(nn.Module, ABC):
    """Item rows -> vectors.

    Everything that the vectors are made of lies in the state dict, also what is not trained (texts' vectors, codes),
    so that a saved model needs nothing else. A new one that is made of features is empty until `set_items`.

    Attributes:
        num_items: N.
        hidden_size: D.
    """

    num_items: int
    hidden_size: int

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws what is trained anew, as in a new one; for models that initialise all their modules alike."""

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """Item rows (…) int64 in 0..N-1 -> their vectors (…, D)."""

    @abstractmethod
    def table(self) -> Tensor:
        """(N, D) the vectors of all items, row by row equal to `forward(arange(N))`; differentiable."""

    @abstractmethod
    def set_items(self, items: ItemFeatures) -> None:
        """Takes the N items' features, in place, before training; what they do not concern stays as it is.

        Raises:
            DataError: if they are not N, lack what this representation is made of, or do not fit its sizes.
        """

    @abstractmethod
    def with_items(self, items: ItemFeatures, old_rows: npt.NDArray[np.integer]) -> "ItemRepresentation":
        """The same representation of another catalogue of M items; trained parts are shared with this one.

        An item keeps what was trained for it alone, and a new one is made of its features; so new items can be
        recommended without training, and a model can move to another catalogue as a whole.

        Args:
            items: M of them.
            old_rows: (M,) the row that each item has here, -1 for a new one.

        Raises:
            BackboneError: if there are new items and nothing is known of an item but its id.
            DataError: if the features do not fit.
        """


def check_old_rows(old_rows: npt.NDArray[np.integer], num_items: int, length: int) -> None:
    """Raises DataError unless `old_rows` are `length` rows of -1..num_items-1."""
    if old_rows.shape != (length,) or (length and not -1 <= old_rows.min() <= old_rows.max() < num_items):
        raise DataError(
            f"Old rows of shape {old_rows.shape} do not lead {length} items to {num_items} old ones. "
            "Give each item its old row, or -1."
        )
