"""IdTable: one trained vector per item, and nothing else."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmrec.exceptions import BackboneError
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.representation import ItemRepresentation, check_old_rows


class IdTable(ItemRepresentation):
    """An (N, D) table.

    Args:
        num_items: N.
        hidden_size: D.
        sparse: gradients of `forward` name the rows they concern (a sparse tensor) instead of being an N × D matrix
            that is 0 nearly everywhere. For losses that never ask for the whole `table()`, whose gradient is dense,
            and for optimizers that know them, such as `RowAdam`.
        initializer_range: standard deviation of a new table.
    """

    def __init__(
        self, num_items: int, hidden_size: int, sparse: bool = False, initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        self.num_items, self.hidden_size = num_items, hidden_size
        self.initializer_range = initializer_range
        self.items = nn.Embedding(num_items, hidden_size, sparse=sparse)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table from N(0, initializer_range²)."""
        nn.init.normal_(self.items.weight, std=self.initializer_range)

    def forward(self, rows: Tensor) -> Tensor:
        """Item rows (…) int64 -> (…, D)."""
        vectors: Tensor = self.items(rows)
        return vectors

    def table(self) -> Tensor:
        """(N, D), the parameter itself."""
        return self.items.weight

    def set_items(self, items: ItemFeatures) -> None:
        """Only checks that they are N."""
        items.check_number(self.num_items)

    def with_items(self, items: ItemFeatures, old_rows: npt.NDArray[np.integer]) -> "IdTable":
        """The table of a subset of the items, or of all in another order; a copy.

        Raises:
            BackboneError: if there is a new item.
        """
        check_old_rows(old_rows, self.num_items, len(items))
        new = np.flatnonzero(old_rows < 0)
        if len(new):
            raise BackboneError(
                f"{len(new)} item(s) were not trained, such as {items.item_ids[new[0]]!r}, and this model knows items "
                "by their id alone. Train it again with them, or use texts or semantic IDs as representation."
            )
        weight = self.items.weight
        other = IdTable(len(items), self.hidden_size, self.items.sparse, self.initializer_range).to(weight)
        with torch.no_grad():
            other.items.weight.copy_(weight[torch.as_tensor(old_rows, dtype=torch.int64, device=weight.device)])
        return other.train(self.training)
