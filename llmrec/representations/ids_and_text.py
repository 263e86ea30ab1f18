"""IdsAndText: an item's own vector and its text's, added."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from llmrec.representations.id_table import IdTable
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.representation import ItemRepresentation, check_old_rows
from llmrec.representations.text import TextVectors


class IdsAndText(ItemRepresentation):
    """`TextVectors` plus, for items that training has seen, `IdTable`.

    An item that it has not seen is its text alone: its row of the table would be noise.

    Args:
        num_items: N.
        hidden_size: D.
        width: E of the texts' vectors.
        initializer_range: standard deviation of a new table and adapter.
        text: the other arguments of `TextVectors`.
    """

    trained: Tensor

    def __init__(
        self, num_items: int, hidden_size: int, width: int, initializer_range: float = 0.02, **text: Any
    ) -> None:
        super().__init__()
        self.num_items, self.hidden_size = num_items, hidden_size
        self.ids = IdTable(num_items, hidden_size, initializer_range=initializer_range)
        self.text = TextVectors(num_items, hidden_size, width, initializer_range=initializer_range, **text)
        self.register_buffer("trained", torch.ones(num_items, dtype=torch.bool))

    def reset_parameters(self) -> None:
        """Draws both parts."""
        self.ids.reset_parameters()
        self.text.reset_parameters()

    def forward(self, rows: Tensor) -> Tensor:
        """Item rows (…) int64 -> (…, D)."""
        if rows.numel() >= self.num_items:
            return F.embedding(rows, self.table())
        vectors: Tensor = self.text(rows) + self.ids(rows).masked_fill(~self.trained[rows][..., None], 0)
        return vectors

    def table(self) -> Tensor:
        """(N, D)."""
        return self.text.table() + self.ids.table().masked_fill(~self.trained[:, None], 0)

    def set_items(self, items: ItemFeatures) -> None:
        """Takes the vectors, and which items are trained; raises DataError as `TextVectors.set_items`."""
        self.text.set_items(items)
        if items.trained is not None:
            self.trained.copy_(torch.from_numpy(np.array(items.trained, dtype=bool)))

    def with_items(self, items: ItemFeatures, old_rows: npt.NDArray[np.integer]) -> "IdsAndText":
        """The same adapter over other vectors; old items keep their own vectors, and new ones have none."""
        check_old_rows(old_rows, self.num_items, len(items))
        weight = self.ids.table()
        other = IdsAndText(len(items), self.hidden_size, self.text.width)
        other.ids.to(weight)
        other.text = self.text.with_items(items, old_rows)
        old = torch.as_tensor(old_rows, dtype=torch.int64, device=weight.device)
        kept = old.clamp_min(0)
        with torch.no_grad():
            other.ids.items.weight.copy_(weight[kept])
        other.trained = self.trained[kept] & (old >= 0)
        return other.train(self.training)
