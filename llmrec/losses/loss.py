"""ItemLoss: what a sequence model is trained to do with its queries and the items' vectors.

All losses take logits that are plain inner products: temperature and L2 normalisation are in the queries and vectors
already (`llmrec.sequence.similarity`), so that what is trained is what ranks.
"""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn


class ItemVectors(Protocol):
    """The candidates of a loss, as they are scored.

    Attributes:
        num_items: N.
    """

    @property
    def num_items(self) -> int: ...

    def table(self) -> Tensor:
        """(N, D) all of them."""
        ...

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows (…) int64 -> (…, D)."""
        ...


class ItemLoss(nn.Module, ABC):
    """Queries and their targets -> a sum of losses.

    The sum is what a step over several batches and processes needs: whoever trains divides by the labels of the whole
    step.
    """

    @abstractmethod
    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """The weighted sum of the tokens' losses, a scalar in float32 at least.

        Args:
            queries: (T, D), of which the logit of an item is the inner product with its vector. T may be 0: the sum is
                then 0, and has gradients (zeros).
            targets: (T,) int64 item rows.
            items: the candidates.
            weights: (T,) what each token counts; None: 1 each.
        """
