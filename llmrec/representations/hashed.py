"""HashedIds: an item's id hashed into tables that are smaller than the catalogue.

Source: Svenstrup, Hansen, Winther, "Hash Embeddings for Efficient Word Representations" (arXiv 1709.03933), without
its weights for each word.
"""

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import BackboneError
from llmrec.representations.hashing import hash_ids
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.row_sums import RowSums


class HashedIds(RowSums):
    """The sum of the rows that `num_hashes` hashes of an item's id choose, each from a table of its own.

    Two items are equal only if all their hashes fall together. A new item has a vector too, but one that says nothing:
    it is a sum of other items' rows.

    Args:
        num_items: N.
        hidden_size: D.
        table_size: rows of each table.
        num_hashes: 1..8.
        seed: of the hashes.
        initializer_range: standard deviation of a new item's vector.

    Raises:
        BackboneError: if a number makes no sense.
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int,
        table_size: int,
        num_hashes: int = 2,
        seed: int = 0,
        initializer_range: float = 0.02,
    ) -> None:
        if not 1 <= num_hashes <= 8 or table_size < 1 or not -(2**63) <= seed < 2**63:
            raise BackboneError(
                f"num_hashes {num_hashes}, table_size {table_size} and seed {seed} make no hashes. "
                "Use 1 to 8 of them, a positive size, and a seed of 64 bits."
            )
        super().__init__(num_items, hidden_size, [table_size] * num_hashes, initializer_range)
        self.seed = seed

    def rows_of(self, items: ItemFeatures) -> npt.NDArray[np.int64]:
        """(N, num_hashes), from the ids alone."""
        hashes = hash_ids(items.item_ids, len(self.sizes), self.seed)
        return (hashes % np.uint64(self.sizes[0])).astype(np.int64)

    def empty(self, num_items: int) -> "HashedIds":
        """A new one of the same sizes."""
        return HashedIds(
            num_items, self.hidden_size, self.sizes[0], len(self.sizes), self.seed, self.initializer_range
        )
