"""Branching: the tree that semantic IDs span, and how much each of its levels still tells.

Prefixes of one code to L codes are the tree's nodes; a decoder walks from one to the next. A level at which nearly
every prefix has one child says nothing that the levels before did not say, and a prefix with a great part of the
catalog below it is one that a beam must not lose.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError

# Prefix numbers times codes below it stay within int64 for 2^31 items.
_LARGEST = 2**32


def prefix_branching(codes: npt.NDArray[np.integer]) -> list[dict[str, Any]]:
    """The code tree, level by level.

    Args:
        codes: (N, L); items may share all of their codes.

    Returns:
        Per level l = 1..L: "level"; "prefixes", distinct prefixes of l codes; "children_mean", "children_median" and
        "children_max", of these per prefix of l - 1 codes that some item has; "items_mean" and "items_max", items per
        prefix of l codes; "alone_share", the share of items whose prefix of l codes no other item has;
        "conditional_entropy_bits", H(code l | the codes before) with items as equally likely, which is 0 where the
        codes before decide it.

    Raises:
        TokenizerError: if the codes are no (N, L) whole numbers of 0 and more.

    >>> first, second = prefix_branching(np.array([[0, 0], [0, 1], [0, 1], [5, 2]]))
    >>> second["prefixes"], second["children_mean"], second["items_max"], second["alone_share"]
    (3, 1.5, 2, 0.5)
    >>> round(second["conditional_entropy_bits"], 4)  # three quarters of the items times H(1/3, 2/3)
    0.6887
    """
    rows: list[dict[str, Any]] = []
    numbered = prefix_groups(codes)
    items = len(numbered[0])
    before = np.zeros(items, dtype=np.int64)
    for level, group in enumerate(numbered, start=1):
        sizes, parent_sizes = np.bincount(group), np.bincount(before)
        parents = np.empty(len(sizes), dtype=np.int64)
        parents[group] = before
        children = np.bincount(parents)
        information = np.log2(parent_sizes[parents] / sizes)
        rows.append(
            {
                "level": level,
                "prefixes": len(sizes),
                "children_mean": len(sizes) / len(children),
                "children_median": float(np.median(children)),
                "children_max": int(children.max()),
                "items_mean": items / len(sizes),
                "items_max": int(sizes.max()),
                "alone_share": float((sizes == 1).sum() / items),
                "conditional_entropy_bits": float(sizes @ information / items),
            }
        )
        before = group
    return rows


def prefix_groups(codes: npt.NDArray[np.integer]) -> list[npt.NDArray[np.int64]]:
    """For every prefix length 1..L the number (N,) of each item's prefix, counted from 0 in lexicographic order.

    Items have one number at a length if and only if they share as many codes, so the last array numbers whole IDs.

    Raises:
        TokenizerError: if the codes are no (N, L) whole numbers of 0 and more with N, L >= 1.

    >>> [group.tolist() for group in prefix_groups(np.array([[7, 1], [2, 9], [7, 0]]))]
    [[1, 0, 1], [2, 0, 1]]
    """
    given = np.asarray(codes)
    if given.ndim != 2 or 0 in given.shape:
        raise TokenizerError(f"Codes of shape {given.shape} are no semantic IDs. Give (N, L) with N, L >= 1.")
    if given.dtype.kind not in "iu":
        raise TokenizerError(f"Codes are of type {given.dtype}, not whole numbers. Give the codes as integers.")
    if given.min() < 0:
        row = int((given < 0).any(axis=1).argmax())
        raise TokenizerError(
            f"The codes of row {row} are {given[row].tolist()}, of which one is negative. Give codes from 0."
        )
    group: npt.NDArray[np.int64] = np.zeros(len(given), dtype=np.int64)
    groups = []
    for level in given.T:
        if int(level.max()) >= _LARGEST:
            level = np.unique(level, return_inverse=True)[1].reshape(-1)
        digits = level.astype(np.int64)
        keys = group * (int(digits.max()) + 1) + digits
        group = np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int64)
        groups.append(group)
    return groups
