"""SemanticIdSums: an item as the sum of its codes' vectors, which similar items share.

Sources: Singh et al., "Better Generalization with Semantic IDs" (arXiv 2306.08121), for unigrams and bigrams; Zheng et
al., "Enhancing Embedding Representation Stability in Recommendation Systems with Semantic ID" (arXiv 2504.02137), for
prefixes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import BackboneError, DataError
from llmrec.representations.hashing import hash_codes
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.row_sums import RowSums


class SemanticIdSums(RowSums):
    """The sum of the vectors of an item's pieces of code.

    Each piece has a table of its own: a row for every value where there are no more than `table_size` of them, else
    `table_size` rows that a hash chooses from. Items of equal codes are equal.

    Args:
        num_items: N.
        hidden_size: D.
        codebook_sizes: K of each of the L levels.
        pieces: "unigram": the L codes c₁, c₂, …; "bigram": the L - 1 pairs of neighbours c₁c₂, c₂c₃, …; "prefix": the
            L beginnings c₁, c₁c₂, c₁c₂c₃, …, for codes of which each level refines the one before.
        table_size: the most rows of a piece's table.
        initializer_range: standard deviation of a new item's vector.

    Raises:
        BackboneError: if the pieces are unknown, or there are none, or a size is not positive.
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int,
        codebook_sizes: Sequence[int],
        pieces: Literal["unigram", "bigram", "prefix"] = "unigram",
        table_size: int = 1 << 17,
        initializer_range: float = 0.02,
    ) -> None:
        levels = range(len(codebook_sizes))
        if pieces not in ("unigram", "bigram", "prefix") or min(table_size, *codebook_sizes, 1) < 1:
            raise BackboneError(
                f"Pieces {pieces!r} of codebooks {list(codebook_sizes)} in tables of {table_size} rows cannot be "
                "built. Use unigram, bigram or prefix, and positive sizes."
            )
        spans = {
            "unigram": [slice(level, level + 1) for level in levels],
            "bigram": [slice(level, level + 2) for level in levels[:-1]],
            "prefix": [slice(0, level + 1) for level in levels],
        }[pieces]
        values = [math.prod(codebook_sizes[span]) for span in spans]
        super().__init__(num_items, hidden_size, [min(count, table_size) for count in values], initializer_range)
        self.codebook_sizes, self.pieces, self.table_size = tuple(codebook_sizes), pieces, table_size
        self.spans, self.values = spans, values

    def rows_of(self, items: ItemFeatures) -> npt.NDArray[np.int64]:
        """(N, P), see the class; raises DataError if there are no codes, or ones outside the codebooks."""
        codes = items.codes
        sizes = np.array(self.codebook_sizes)
        if codes is None or codes.shape[1] != len(sizes) or (codes < 0).any() or (codes >= sizes).any():
            has = "no codes" if codes is None else f"codes of shape {codes.shape} up to {codes.max(axis=0).tolist()}"
            raise DataError(
                f"The items have {has}, and the codebooks have {sizes.tolist()} entries. "
                "Build their semantic IDs with the same tokenizer."
            )
        columns = []
        for span, values, size in zip(self.spans, self.values, self.sizes, strict=True):
            piece = codes[:, span].astype(np.int64)
            if values <= size:
                columns.append(np.ravel_multi_index(tuple(piece.T), self.codebook_sizes[span]))
            else:
                columns.append((hash_codes(piece) % np.uint64(size)).astype(np.int64))
        return np.stack(columns, axis=1)

    def empty(self, num_items: int) -> "SemanticIdSums":
        """A new one of the same sizes."""
        return SemanticIdSums(
            num_items, self.hidden_size, self.codebook_sizes, self.pieces, self.table_size, self.initializer_range
        )
