"""RowSums: items as sums of rows of a few shared tables."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.exceptions import BackboneError
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.representation import ItemRepresentation, check_old_rows


class RowSums(ItemRepresentation):
    """An item is the sum of one row of each of P tables, which lie in one matrix, one after another.

    Args:
        num_items: N.
        hidden_size: D.
        sizes: how many rows each of the P tables has.
        initializer_range: standard deviation of an item's vector at first, as in a table of its own.

    Raises:
        BackboneError: if there is no table, or an empty one.
    """

    rows: Tensor

    def __init__(
        self, num_items: int, hidden_size: int, sizes: Sequence[int], initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise BackboneError(f"Tables of {list(sizes)} rows cannot represent items. Give each at least one row.")
        self.num_items, self.hidden_size, self.sizes = num_items, hidden_size, tuple(sizes)
        self.initializer_range = initializer_range
        self.tables = nn.Embedding(sum(sizes), hidden_size)
        self.reset_parameters()
        # (N, P) rows of the matrix. No row is -1: items that nobody gave are an error, not alike.
        self.register_buffer("rows", torch.full((num_items, len(sizes)), -1, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Draws the tables, so that a sum of their rows has the standard deviation initializer_range."""
        nn.init.normal_(self.tables.weight, std=self.initializer_range / len(self.sizes) ** 0.5)

    @abstractmethod
    def rows_of(self, items: ItemFeatures) -> npt.NDArray[np.int64]:
        """(N, P) the row of each table, from 0; raises DataError if the features do not fit."""

    @abstractmethod
    def empty(self, num_items: int) -> "RowSums":
        """A new one of the same sizes."""

    def forward(self, rows: Tensor) -> Tensor:
        """Item rows (…) int64 -> (…, D)."""
        sums = F.embedding_bag(self.rows[rows.flatten()], self.tables.weight, mode="sum")
        return sums.unflatten(0, rows.shape) if rows.dim() else sums[0]

    def table(self) -> Tensor:
        """(N, D)."""
        sums: Tensor = F.embedding_bag(self.rows, self.tables.weight, mode="sum")
        return sums

    def set_items(self, items: ItemFeatures) -> None:
        """Takes the items' rows; raises DataError if the features do not fit."""
        items.check_number(self.num_items)
        starts = np.cumsum((0, *self.sizes[:-1]))
        self.rows.copy_(torch.from_numpy(self.rows_of(items) + starts))

    def with_items(self, items: ItemFeatures, old_rows: npt.NDArray[np.integer]) -> "RowSums":
        """The same tables for other items, each made of its own features, also the old ones."""
        check_old_rows(old_rows, self.num_items, len(items))
        other = self.empty(len(items)).to(self.tables.weight.device)
        other.set_items(items)
        other.tables = self.tables
        return other.train(self.training)
