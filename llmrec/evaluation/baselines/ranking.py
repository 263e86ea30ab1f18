"""What the baselines share: counting training items, and lists from scores under one tie rule."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Rows = npt.NDArray[np.integer[Any]]
Places = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating[Any]]

_CELLS = 1 << 24  # of a batch's dense scores: 128 MiB in float64
_USERS = 1024  # scored at once, at most


def counted(train: Sequence[Rows], num_items: int) -> tuple[Places, Places]:
    """Occurrences (N,) and item rows (N,) by falling occurrences, ties by row.

    Raises:
        DataError: if a sequence holds a row outside 0..N-1.
    """
    flat, _ = flattened(train)
    if len(flat) and (flat.min() < 0 or flat.max() >= num_items):
        wrong = flat.min() if flat.min() < 0 else flat.max()
        raise DataError(f"Training has the item row {wrong}, the catalog {num_items} items. Use rows of one catalog.")
    counts = np.bincount(flat, minlength=num_items).astype(np.int64)
    return counts, np.argsort(-counts, kind="stable").astype(np.int64)


def flattened(sequences: Sequence[Rows]) -> tuple[Places, Places]:
    """All rows one after another, and the place of the sequence that each comes from."""
    lengths = [len(sequence) for sequence in sequences]
    flat = np.concatenate(sequences).astype(np.int64) if sequences else np.empty(0, dtype=np.int64)
    return flat, np.repeat(np.arange(len(lengths)), lengths)


def recent(histories: Sequence[Rows], most: int | None) -> tuple[Places, Places, Places]:
    """The last `most` items of each history (None: all), newest first: item rows, the history's place, the age.

    >>> [values.tolist() for values in recent([np.array([7, 8, 9]), np.array([5])], 2)]
    [[9, 8, 5], [0, 0, 1], [0, 1, 0]]
    """
    items, user = flattened([history[::-1][:most] for history in histories])
    starts = np.searchsorted(user, np.arange(len(histories)))
    return items, user, np.arange(len(items)) - starts[user]


def filled(rows: Rows, order: Places, excluded: Rows, k: int) -> Places:
    """`rows` and, up to k, the first items of `order` that are neither among them nor excluded."""
    if len(rows) >= k:
        return np.asarray(rows, dtype=np.int64)
    taken = np.concatenate([rows, excluded])
    popular = order[: k + len(taken)]
    complete: Places = np.append(rows, popular[~np.isin(popular, taken)][: k - len(rows)])
    return complete.astype(np.int64)


def batch_size(num_items: int) -> int:
    """Histories scored at once: their scores take 128 MiB at most, if they are dense."""
    return max(1, min(_USERS, _CELLS // max(1, num_items)))


def best(
    score: Callable[[Sequence[Rows]], Scores],
    histories: Sequence[Rows],
    k: int,
    order: Places,
    exclude_seen: bool = True,
) -> list[Places]:
    """The k best item rows per history by dense scores, batch by batch; fewer where fewer are left.

    Equal scores go by `order`, which makes the lists a function of the scores alone.

    Args:
        score: B histories -> (B, N).
        histories: item rows, oldest first.
        k: how many to recommend.
        order: (N,) item rows, the winner of a tie first.
        exclude_seen: whether items of the history are no candidates.
    """
    recommended: list[Places] = []
    seen = np.zeros(len(order), dtype=bool)
    size = batch_size(len(order))
    for start in range(0, len(histories), size):
        chosen = histories[start : start + size]
        # Columns in the order that decides ties, so that a lower column wins one.
        for history, row in zip(chosen, score(chosen), strict=True):
            values = row[order]
            excluded = history if exclude_seen else history[:0]
            seen[excluded] = True
            candidates = np.flatnonzero(~seen[order])
            seen[excluded] = False
            left = values[candidates]
            if 0 < k < len(left):
                # All that tie with the k-th are kept until the order has decided among them.
                candidates = candidates[left >= np.partition(left, len(left) - k)[len(left) - k]]
            ranked = candidates[np.argsort(-values[candidates], kind="stable")]
            recommended.append(order[ranked[:k]])
    return recommended
