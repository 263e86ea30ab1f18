"""The k-core of a log: what is left when rare users and rare items have gone, again and again."""

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.columns import ITEM, USER
from llmrec.exceptions import DataError


def item_codes(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
    """(M,) a number for every row's item, 0 … N - 1 in order of first appearance."""
    known = frame.select(ITEM).unique(maintain_order=True).with_row_index("code")
    return (
        frame.select(ITEM).join(known, on=ITEM, how="left", maintain_order="left")["code"].to_numpy().astype(np.int64)
    )


def user_codes(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
    """(M,) a number for every row's user, 0 … U - 1; in a canonical frame a user is a run of rows."""
    return frame[USER].rle_id().to_numpy().astype(np.int64)


def k_core(
    users: npt.NDArray[np.int64], items: npt.NDArray[np.int64], user_core: int, item_core: int
) -> tuple[npt.NDArray[np.bool_], int]:
    """The largest set of rows in which every user has `user_core` rows and every item `item_core`.

    A user's rows are counted, not their different items: an item taken twice counts twice. The set is unique, so the
    order of removal does not matter (Seidman 1983, here for the two sides of a bipartite multigraph): all rare users
    go at once, then all items that are rare by then, until nothing is rare.

    Args:
        users: (M,) codes 0 … U - 1.
        items: (M,) codes 0 … N - 1.
        user_core: the fewest rows of a user; 0 and 1 ask for nothing.
        item_core: the fewest rows of an item; 0 and 1 ask for nothing.

    Returns:
        (M,) True for rows that stay, and how many rounds removed something.

    Raises:
        DataError: if a core is negative.

    >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1]), 2, 2)[0].tolist()
    [True, True, True, True, False]
    """
    if min(user_core, item_core) < 0:
        raise DataError(f"The core is {min(user_core, item_core)}, but a count cannot be negative. Give 0 or more.")
    rows = np.arange(len(users))
    passes = 0
    while True:
        before = len(rows)
        for codes, fewest in ((users, user_core), (items, item_core)):
            own = codes[rows]
            rows = rows[np.bincount(own)[own] >= fewest] if len(rows) else rows
        if len(rows) == before:
            break
        passes += 1
    kept = np.zeros(len(users), dtype=np.bool_)
    kept[rows] = True
    return kept, passes
