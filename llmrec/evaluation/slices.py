"""Slices: the groups of cases for which a figure is shown apart, because the headline hides them."""

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.split import Part, Split

Mask = npt.NDArray[np.bool_]

_LENGTHS = (0, 1, 5, 10, 20, 50)  # the least history of each slice
_MOST_VALUES = 20  # domains or actions that get a slice of their own, the most frequent first


def slices_of(split: Split, part: Part) -> dict[str, Mask]:
    """The named slices of a part's cases, each a mask (C,); only those that hold a case.

    * `head`, `torso`, `tail`: the target by its training popularity (ties by row). The most popular items that hold a
      third of the training interactions are the head, those that hold the next third the torso, the rest the tail.
    * `cold`: the target does not occur in training; `cold_user`: the user has no training history.
    * `later_day`, `not_later_day`: whether the target lies on a later day (UTC) than the interaction before it. Inside
      a day the order of a log with day resolution is arbitrary. Neither holds a case of unknown time.
    * `history_1_4`, …, `history_50_`: by the length of the history.
    * `domain=…`, `action=…`: by the target interaction's own; the 20 most frequent.

    All but `cold` and `cold_user` hold headline cases alone (`Split.headline`).
    """
    counted = split.headline(part)
    targets = split.targets(part)
    groups = popularity_groups(split.train_counts)[targets]
    found = {name: counted & (groups == place) for place, name in enumerate(("head", "torso", "tail"))}
    found["cold"] = split.unseen_items(part)
    found["cold_user"] = split.unseen_users(part)
    later, gaps = split.later_days(part), split.gaps(part)
    if later is not None and gaps is not None:
        found["later_day"] = counted & later
        found["not_later_day"] = counted & ~later & ~np.isnan(gaps)
    lengths = split.positions[part] - split.offsets[split.case_users(part)]
    for low, next_low in zip(_LENGTHS, (*_LENGTHS[1:], None), strict=True):
        name = f"history_{low}_{'' if next_low is None else next_low - 1}" if low else "history_0"
        found[name] = counted & (lengths >= low) & (True if next_low is None else lengths < next_low)
    for kind, column in (("domain", split.domains), ("action", split.actions)):
        if column is not None:
            values = column.gather(pl.Series(split.positions[part]))
            frequent = values.drop_nulls().value_counts(sort=True)[values.name].head(_MOST_VALUES).to_list()
            for value in sorted(frequent):
                found[f"{kind}={value}"] = counted & (values == value).fill_null(False).to_numpy()
    return {name: mask for name, mask in found.items() if mask.any()}


def popularity_groups(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N,) 0 for head, 1 for torso, 2 for tail, 3 for items without a training interaction; see `slices_of`.

    >>> popularity_groups(np.array([1, 4, 2, 0, 2])).tolist()
    [2, 0, 1, 3, 1]
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # interactions of more popular items
    groups = np.empty(len(counts), dtype=np.int64)
    groups[order] = np.minimum(3 * before // max(1, int(counts.sum())), 2)
    groups[counts == 0] = 3
    return groups
