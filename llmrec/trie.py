"""CatalogTrie: the allowed continuations of a code prefix, as flat arrays.

The trie knows codes, not tokens and not items' names. Its rows are the catalog's codes in lexicographic order, so a
node of level `l` is a run of rows, its children are a run of the next level's nodes, and a node of the last level *is*
a row: no pointers, no hashing, and the item behind a leaf costs one lookup (STATIC, arXiv 2602.22647, uses a padded
form of the same idea).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import CatalogError

IntArray = npt.NDArray[np.int64]


class CatalogTrie:
    """Level-wise CSR trie over unique codes.

    Attributes, per level `l` of `L`, with `n_l` nodes (n_{L-1} = N):
        code[l]: (n_l,) the code on the edge into each node.
        start[l]: (n_{l-1} + 1,) the children of node `p` of the level above are nodes start[l][p] : start[l][p + 1];
            level 0 hangs from one root, so start[0] = [0, n_0].
        first_leaf[l]: (n_l + 1,) the rows below node `i` are first_leaf[l][i] : first_leaf[l][i + 1].
        item_of_leaf: (N,) the catalog row of each leaf.
        leaf_of_item: (N,) its inverse.

    >>> trie = CatalogTrie(np.array([[1, 0], [0, 2], [1, 3]]))
    >>> trie.num_levels, [level.tolist() for level in trie.code], trie.item_of_leaf.tolist()
    (2, [[0, 1], [2, 0, 3]], [1, 0, 2])
    >>> trie.children([1])
    [0, 3]
    """

    def __init__(self, codes: npt.NDArray[np.integer]) -> None:
        """Builds the trie of `codes` (N, L); raises CatalogError if a code is negative or two rows are equal."""
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim != 2 or codes.shape[0] == 0 or codes.shape[1] == 0:
            raise CatalogError(
                f"A trie needs codes of shape (items, levels), not {codes.shape}. Give at least one item."
            )
        if codes.min() < 0:
            raise CatalogError(f"A code is negative ({codes.min()}). Codes count from 0.")
        num_items, num_levels = codes.shape
        order = np.lexsort(codes.T[::-1])  # stable, and by the first level first
        ordered = codes[order]
        new = np.zeros(num_items, dtype=bool)  # whether a row begins a new node at the current level
        new[0] = True
        self.code: list[IntArray] = []
        self.start: list[IntArray] = []
        self.first_leaf: list[IntArray] = []
        parents = np.array([0, num_items], dtype=np.int64)
        for level in range(num_levels):
            new[1:] |= ordered[1:, level] != ordered[:-1, level]
            leaves = np.flatnonzero(new)
            self.code.append(ordered[leaves, level])
            self.start.append(np.searchsorted(leaves, parents).astype(np.int64))
            parents = np.append(leaves, num_items).astype(np.int64)
            self.first_leaf.append(parents)
        if len(self.code[-1]) != num_items:
            twin = int(np.flatnonzero(~new)[0])
            raise CatalogError(
                f"Items of rows {order[twin - 1]} and {order[twin]} share the code {ordered[twin].tolist()}. "
                "Resolve collisions first: a leaf of the trie is one item."
            )
        self.item_of_leaf: IntArray = order.astype(np.int64)
        self.leaf_of_item: IntArray = np.empty(num_items, dtype=np.int64)
        self.leaf_of_item[order] = np.arange(num_items)

    @property
    def num_levels(self) -> int:
        return len(self.code)

    @property
    def num_items(self) -> int:
        return len(self.item_of_leaf)

    def children(self, prefix: Sequence[int]) -> list[int]:
        """The codes that may follow `prefix`, ascending; empty if no item begins so (or `prefix` is a whole code)."""
        node = 0
        for level, code in enumerate(prefix):
            begin, end = self.start[level][node], self.start[level][node + 1]
            child = begin + np.searchsorted(self.code[level][begin:end], code)
            if child == end or self.code[level][child] != code:
                return []
            node = int(child)
        level = len(prefix)
        if level == self.num_levels:
            return []
        return [int(code) for code in self.code[level][self.start[level][node] : self.start[level][node + 1]]]

    def dead_nodes(self, excluded: Sequence[npt.NDArray[np.integer]]) -> list[IntArray]:
        """The nodes below which every item is excluded, so that a search never walks into an empty subtree.

        Args:
            excluded: for each of B requests, the catalog rows it may not return (any order, repeats allowed).

        Returns:
            Per level, the ascending keys `request · n_l + node` of the dead nodes. The last level's keys are the
            excluded items themselves.
        """
        counts = [len(rows) for rows in excluded]
        request = np.repeat(np.arange(len(excluded), dtype=np.int64), counts)
        rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in excluded]) if request.size else request
        leaf = np.unique(request * self.num_items + self.leaf_of_item[rows]) if request.size else request
        request, leaf = leaf // self.num_items, leaf % self.num_items
        dead: list[IntArray] = []
        for level in range(self.num_levels):
            node = np.searchsorted(self.first_leaf[level], leaf, side="right") - 1
            keys, gone = np.unique(request * len(self.code[level]) + node, return_counts=True)
            node = keys % len(self.code[level])
            size = self.first_leaf[level][node + 1] - self.first_leaf[level][node]
            dead.append(keys[gone == size])
        return dead
