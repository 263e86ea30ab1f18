"""Groups: the items that share one semantic ID."""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.diagnostics.branching import prefix_groups
from llmrec.exceptions import TokenizerError


def collision_groups(codes: npt.NDArray[np.integer], limit: int = 20) -> dict[str, Any]:
    """How many items share their ID with others, and which.

    Args:
        codes: (N, L).
        limit: at most how many groups are listed; each is listed with all of its items.

    Returns:
        "items": N; "unique": distinct IDs; "collision_rate": 1 - unique / N, the items beyond distinct IDs;
        "sharing_items" and "sharing_rate": items whose ID another item has too, and their share of N; "largest_group":
        the most items on one ID; "histogram": [group size, number of groups] for sizes of 2 and more, ascending;
        "groups": the item rows of each of the largest groups, ascending, largest group first and of equally large ones
        the one with the lowest row.

    Raises:
        TokenizerError: if the codes are no (N, L) whole numbers of 0 and more, or the limit is negative.

    >>> found = collision_groups(np.array([[1, 1], [0, 2], [1, 1], [0, 3], [0, 2], [1, 1]]))
    >>> found["collision_rate"], found["sharing_items"], found["histogram"], found["groups"]
    (0.5, 5, [[2, 1], [3, 1]], [[0, 2, 5], [1, 4]])
    """
    if limit < 0:
        raise TokenizerError(f"A limit of {limit} groups cannot be listed. Give 0 or more.")
    group = prefix_groups(codes)[-1]
    sizes = np.bincount(group)
    items = len(group)
    order = np.argsort(group, kind="stable")
    begins = np.cumsum(sizes) - sizes
    shared = np.flatnonzero(sizes > 1)
    listed = shared[np.lexsort((order[begins[shared]], -sizes[shared]))[:limit]]
    of_size = np.bincount(sizes[shared])
    sharing = int(sizes[shared].sum())
    return {
        "items": items,
        "unique": len(sizes),
        "collision_rate": 1 - len(sizes) / items,
        "sharing_items": sharing,
        "sharing_rate": sharing / items,
        "largest_group": int(sizes.max()),
        "histogram": [[size, int(of_size[size])] for size in np.flatnonzero(of_size).tolist()],
        "groups": [order[begins[one] : begins[one] + sizes[one]].tolist() for one in listed],
    }
