"""Slices: the groups of cases for which a figure is shown apart, because the headline hides them."""

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.distribution import thirds
from llmrec.data.split import Part, Split

Mask = npt.NDArray[np.bool_]

ALWAYS = ("head", "torso", "tail", "cold", "later_day")  # shown where they can be told, even if no case is in them
_LENGTHS = (0, 1, 5, 10, 20, 50)  # the least history of each slice
_MOST_VALUES = 20  # domains or actions that get a slice of their own, the most frequent first


def slices_of(split: Split, part: Part) -> dict[str, Mask]:
    """The named slices of a part's cases, each a mask (C,); those that hold a case, and `ALWAYS`.

    * `head`, `torso`, `tail`: the target by its training popularity (ties by row). The most popular items that hold a
      third of the training interactions are the head, those that hold the next third the torso, the rest the tail.
    * `cold`: the target does not occur in training; `cold_user`: the user has no training history.
    * `later_day`, `not_later_day`: whether the target lies on a later day (UTC) than the interaction before it. Inside
      a day the order of a log with day resolution is arbitrary. Neither holds a case of unknown time.
    * `history_1_4`, …, `history_50_`: by the length of the history.
    * `domain=…`, `action=…`: by the target interaction's own; the 20 most frequent.
    * `other_domain`: the history holds an interaction of another domain than the target's.

    All but `cold` and `cold_user` hold headline cases alone (`Split.headline`).
    """
    counted = split.headline(part)
    targets = split.targets(part)
    groups = thirds(split.train_counts)[targets]
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
    if split.domains is not None:
        found["other_domain"] = counted & _knows_another(split, part)
    return {name: mask for name, mask in found.items() if mask.any() or name in ALWAYS}


def _knows_another(split: Split, part: Part) -> Mask:
    """(C,) whether a domain before the target, in the user's history, is not the target's; unknown ones are none."""
    assert split.domains is not None
    numbers = split.domains.rank("dense").fill_null(0).to_numpy().astype(np.int64)  # 0: unknown
    places = split.positions[part]
    # How many known domains, and how many of the target's own, stand before each place.
    known = np.concatenate([[0], np.cumsum(numbers > 0)])
    begins = split.offsets[split.case_users(part)]
    inside = known[places] - known[begins]
    own = np.zeros(len(places), dtype=np.int64)
    for number in np.unique(numbers[numbers > 0]):
        same = numbers[places] == number
        upto = np.concatenate([[0], np.cumsum(numbers == number)])
        own[same] = (upto[places] - upto[begins])[same]
    another: Mask = (numbers[places] > 0) & (inside > own)
    return another
