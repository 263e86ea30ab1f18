"""TextVectors: what a language model makes of an item's text, through a trained adapter."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.exceptions import BackboneError, DataError
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.representation import ItemRepresentation, check_old_rows


class TextVectors(ItemRepresentation):
    """adapter((vector - centre) / scale), of vectors that an encoder of texts made (`semantic_ids/embed.py`).

    Centre and scale are those of the first catalogue, whatever items come later. The centre is the mean vector:
    language models' vectors share a large one that says nothing, beside which the items would hardly differ at first.
    The scale makes the root of the mean squared length 1 before a linear adapter, and √E before an MLP, whose two
    small matrices would make too little of it.

    Args:
        num_items: N.
        hidden_size: D.
        width: E of the vectors.
        adapter: "linear", E → D with a bias; or "mlp", E → adapter_size → D with a GELU between.
        adapter_size: of the "mlp"; None: E.
        tuned: whether the vectors are trained as well, from where they are. They are frozen by default.
        initializer_range: standard deviation of a new adapter's weights.

    Raises:
        BackboneError: if the adapter is unknown, or a size is not positive.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        num_items: int,
        hidden_size: int,
        width: int,
        adapter: Literal["linear", "mlp"] = "linear",
        adapter_size: int | None = None,
        tuned: bool = False,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        inner = width if adapter_size is None else adapter_size
        if adapter not in ("linear", "mlp") or width < 1 or inner < 1:
            raise BackboneError(
                f"An adapter {adapter!r} of width {width} and adapter_size {inner} cannot be built. "
                "Use linear or mlp, and positive sizes."
            )
        self.num_items, self.hidden_size, self.width = num_items, hidden_size, width
        self.adapter_kind, self.adapter_size, self.tuned = adapter, adapter_size, tuned
        self.initializer_range = initializer_range
        if tuned:
            self.vectors = nn.Parameter(torch.zeros(num_items, width))
        else:
            self.register_buffer("vectors", torch.zeros(num_items, width))
        self.register_buffer("centre", torch.zeros(width))
        # Vectors that nobody gave are NaN, not alike.
        self.register_buffer("scale", torch.full((), math.nan))
        self.adapter: nn.Module = (
            nn.Linear(width, hidden_size)
            if adapter == "linear"
            else nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, hidden_size))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the adapter's weights from N(0, initializer_range²), its biases 0. Vectors stay as they are."""
        for module in self.adapter.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Item rows (…) int64 -> (…, D). Many rows are looked up in the table, so that no item is adapted twice."""
        if rows.numel() >= self.num_items:
            return F.embedding(rows, self.table())
        return self._adapted(F.embedding(rows, self.vectors))

    def table(self) -> Tensor:
        """(N, D)."""
        return self._adapted(self.vectors)

    def set_items(self, items: ItemFeatures) -> None:
        """Takes the vectors, and their centre and scale; raises DataError if there are none, or of another width."""
        items.check_number(self.num_items)
        vectors = self._checked(items)
        centre = vectors.mean(axis=0, dtype=np.float64)
        squares = np.square(vectors - centre).sum(axis=1).mean()
        with torch.no_grad():
            self.vectors.copy_(torch.from_numpy(vectors))
            self.centre.copy_(torch.from_numpy(centre))
            # Equal vectors have no scale, and need none.
            self.scale.fill_((math.sqrt(squares) or 1.0) / (1 if self.adapter_kind == "linear" else self.width**0.5))

    def with_items(self, items: ItemFeatures, old_rows: npt.NDArray[np.integer]) -> "TextVectors":
        """The same adapter over other vectors; old items keep tuned ones."""
        check_old_rows(old_rows, self.num_items, len(items))
        other = self._empty(len(items)).to(self.vectors)
        with torch.no_grad():
            other.vectors.copy_(torch.from_numpy(self._checked(items)))
            if self.tuned:
                old = torch.as_tensor(old_rows, dtype=torch.int64, device=self.vectors.device)
                other.vectors[old >= 0] = self.vectors[old[old >= 0]]
            other.centre.copy_(self.centre)
            other.scale.copy_(self.scale)
        other.adapter = self.adapter
        return other.train(self.training)

    def _empty(self, num_items: int) -> "TextVectors":
        return TextVectors(
            num_items,
            self.hidden_size,
            self.width,
            "linear" if self.adapter_kind == "linear" else "mlp",
            self.adapter_size,
            self.tuned,
            self.initializer_range,
        )

    def _adapted(self, vectors: Tensor) -> Tensor:
        adapted: Tensor = self.adapter((vectors - self.centre) / self.scale)
        return adapted

    def _checked(self, items: ItemFeatures) -> npt.NDArray[np.float32]:
        if items.vectors is None or items.vectors.shape[1] != self.width:
            has = "no vectors" if items.vectors is None else f"vectors of width {items.vectors.shape[1]}"
            raise DataError(
                f"The items have {has}, and their representation is made of ones of width {self.width}. "
                "Embed them with semantic_ids/embed.py and the same model."
            )
        # A copy: a memory map of a file is read-only.
        return np.array(items.vectors, dtype=np.float32)
