"""The part of a trie that some leaves need, in tensor operations on the trie's own device.

A node's children are a run of the next level's nodes, so ascending nodes have ascending parents, level by level up to
the root: nothing is sorted but the leaves to begin with, and the work grows with their number, not with the catalog's.
"""

from collections.abc import Sequence

import torch

# From this share of a trie's leaves on, marking them takes less time than sorting them.
_DENSE = 1 / 16


def ascending(leaves: torch.Tensor, num_leaves: int) -> torch.Tensor:
    """The different ones among `leaves` (n,), integers below `num_leaves`, in order, as int32."""
    if len(leaves) < _DENSE * num_leaves:
        leaves = torch.unique(leaves)
        return leaves.int()
    marked = torch.zeros(num_leaves, dtype=torch.bool, device=leaves.device)
    marked[leaves] = True
    (found,) = marked.nonzero(as_tuple=True)
    return found.int()


def kept_nodes(start: Sequence[torch.Tensor], leaves: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The nodes with a leaf among `leaves`, and how they hang together once the others are gone.

    Args:
        start: per level (n_{l-1} + 1,) int32, as in `CatalogTrie`.
        leaves: (n,) int32 ascending, none twice; may be empty.

    Returns:
        Per level (m_l,) int32 the nodes kept, ascending, and per level (m_{l-1} + 1,) int32 the `start` of their
        trie, whose nodes are their places.
    """
    kept, begins = [leaves], []
    for level in range(len(start) - 1, 0, -1):
        parents, counts = parents_of(start[level], kept[-1]).unique_consecutive(return_counts=True)
        begins.append(_starts(counts))
        kept.append(parents)
    begins.append(torch.tensor([0, len(kept[-1])], dtype=torch.int32, device=leaves.device))  # of the root, always
    return kept[::-1], begins[::-1]


def ancestors(start: Sequence[torch.Tensor], leaves: torch.Tensor) -> list[torch.Tensor]:
    """Per level the nodes (n,) int32 that lead to each of `leaves` (n,), which are those of the last level."""
    found = [leaves.int()]
    for level in range(len(start) - 1, 0, -1):
        found.append(parents_of(start[level], found[-1]))
    return found[::-1]


def parents_of(begins: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """The parents, int32, of nodes (n,) int32 of a level whose `start` is `begins`."""
    # Of one type, because searchsorted would copy all of `begins` into the other's.
    return torch.searchsorted(begins, nodes, right=True, out_int32=True) - 1


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
