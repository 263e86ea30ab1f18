"""How many rows of label 0 a training sees: fewer than there are, or drawn ones where a log holds none."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llmrec.ctr.histories import Histories
from llmrec.ctr.rows import MISSING, LabelledRows, Numbers
from llmrec.exceptions import DataError


def thin_negatives(
    rows: LabelledRows, chosen: Numbers, share: float, reweigh: bool = True, seed: int = 0
) -> npt.NDArray[np.float32]:
    """What each row counts (I,) when of the chosen ones without any label 1 only a share is kept.

    Exactly round(share · their number) of them are kept, drawn without replacement; at least one, if there is one.

    Args:
        rows: I of them.
        chosen: the rows that are trained on; others count 0.
        share: above 0, at most 1.
        reweigh: whether those that are kept count for those that are not, so that the expected loss, and with it the
            probabilities, are those of all rows. If not, a model predicts too much by a factor of the odds of 1/share.
        seed: of the draw.

    Raises:
        DataError: if `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise DataError(f"The share of negatives is {share}. Give more than 0 and at most 1.")
    weights = np.zeros(len(rows), dtype=np.float32)
    weights[chosen] = 1
    negative = chosen[~(rows.labels[chosen] == 1).any(axis=1)]
    if share < 1 and len(negative):
        kept = max(1, round(share * len(negative)))
        weights[negative] = 0
        drawn = np.random.default_rng(seed).permutation(negative)[:kept]
        weights[drawn] = len(negative) / kept if reweigh else 1
    return weights


def draw_negatives(
    rows: LabelledRows, histories: Histories, per_positive: int, seed: int = 0
) -> tuple[LabelledRows, Histories]:
    """Adds, behind each row with a label 1, rows about items that its user has none of, all their known labels 0.

    For logs that hold positives alone. The items are drawn uniformly from those of the part's and earlier parts' rows
    that the user has no row with, in any part; of a user who has rows with all of them, none. Added rows have their
    positive row's time, history and flags, and are in no history.

    Args:
        rows: I of them.
        histories: of these rows.
        per_positive: how many; 0 for none.
        seed: of the draw.

    Returns:
        The longer rows, added ones at the end, and their histories.

    Raises:
        DataError: if `per_positive` is negative.
    """
    if per_positive < 0:
        raise DataError(f"{per_positive} negatives per positive cannot be drawn. Give 0 or more.")
    generator = np.random.default_rng(seed)
    taken: dict[int, set[int]] = {}
    for user, item in zip(rows.users.tolist(), rows.items.tolist(), strict=True):
        taken.setdefault(user, set()).add(item)
    there = {part: np.unique(rows.items[rows.part <= part]) for part in np.unique(rows.part).tolist()}
    sources: list[int] = []
    drawn: list[int] = []
    positives = np.flatnonzero((rows.labels == 1).any(axis=1)) if per_positive else np.zeros(0, np.int64)
    for row in positives.tolist():
        pool, held = there[int(rows.part[row])], taken[int(rows.users[row])]
        free = len(held) < len(pool) or not held.issuperset(pool.tolist())
        for _ in range(per_positive if free else 0):
            item = int(generator.choice(pool))
            while item in held:
                item = int(generator.choice(pool))
            sources.append(row)
            drawn.append(item)
    source = np.array(sources, dtype=np.int64)
    longer = replace(
        rows,
        users=np.append(rows.users, rows.users[source]),
        items=np.append(rows.items, np.array(drawn, dtype=np.int64)),
        labels=np.concatenate([rows.labels, np.where(rows.labels[source] == MISSING, MISSING, 0)]),
        timestamps=np.append(rows.timestamps, rows.timestamps[source]),
        part=np.append(rows.part, rows.part[source]),
        given=None,
        flags={name: np.append(flag, flag[source]) for name, flag in rows.flags.items()},
    )
    again = Histories(
        histories.events,
        np.append(histories.begin, histories.begin[source]),
        np.append(histories.end, histories.end[source]),
    )
    return longer, again
