"""What a test gives away: targets that training holds, others' future, and what only the test knows."""

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.columns import ITEM, USER
from llmrec.data.copies import doubled, exact_copies, first_places
from llmrec.data.interactions import Interactions
from llmrec.data.split import Part, Places, Split

_EXAMPLES = 5


def repeats(split: Split) -> dict[str, Any]:
    """How often users take what they took before.

    Returns:
        JSON-ready: repeated_pairs (distinct user-item pairs that occur more than once), repeated_pair_share (of the
        distinct pairs), repeated_share (of the interactions after a user's first, those of an item in the user's own
        past), immediate_share (of the same, those of the item just before), test_in_history_share, exact_copies
        (interactions that repeat an earlier one of the same user with the same item and known time), doubled_users
        (whose second half equals the first, or who have every interaction twice in a row, with 3 different items or
        more), doubled_share (of the users with 6 interactions or more).
    """
    first = first_places(split)
    again = first != np.arange(len(first))
    later = np.arange(len(first)) != split.offsets[split.owner]
    immediate = np.append(False, split.rows[1:] == split.rows[:-1]) & later if len(first) else later
    counts = np.bincount(first, minlength=1)
    distinct = int((counts > 0).sum())
    return {
        "repeated_pairs": int((counts > 1).sum()),
        "repeated_pair_share": int((counts > 1).sum()) / max(1, distinct),
        "repeated_share": _share(again[later]),
        "immediate_share": _share(immediate[later]),
        "test_in_history_share": _share(again[split.positions["test"]]),
        "exact_copies": exact_copies(split),
        **doubled(split),
    }


def overlap(split: Split, part: Part = "test") -> dict[str, Any]:
    """Targets that occur in the same user's training sequence, set against how usual repeats are in this log.

    Where users do take items again, such targets are natural. The rate to expect is the larger of two shares: of all
    interactions that are targets of neither part, and of those of them that are the last before each target (whose
    pasts are as long as training), each of those that repeat one in the user's past. No target of either part counts
    there, for a leak would set its own standard.

    Returns:
        JSON-ready: cases, in_training (targets), share, expected_share, p_value (binomial, one-sided: that many or
        more at the expected rate; None without cases), examples (at most 5: user, item, the time or None).
    """
    positions, owner = split.positions[part], split.case_users(part)
    first = first_places(split)
    again = first != np.arange(len(first))
    leaked = again[positions] & (first[positions] < split.train_ends[owner])
    expected = _usual(split, again, positions)
    count = int(leaked.sum())
    return {
        "cases": len(positions),
        "in_training": count,
        "share": count / max(1, len(positions)),
        "expected_share": expected,
        "p_value": _p_value(count, len(positions), expected),
        "examples": _examples(split, positions[leaked]),
    }


def history_overlap(split: Split, part: Part = "test") -> dict[str, Any]:
    """Targets that occur anywhere before in the same user's sequence, and those that repeat the item just before.

    A copy of the target may lie behind the end of training: at the place of validation, or in the history of a user
    who has no training. Only cases with at most one other target between the last interaction that is none and their
    own are looked at, since the pasts of later ones are longer than those that tell what is usual (`overlap`).

    Returns:
        JSON-ready: cases (those looked at), and for in_history and just_before each targets, share, expected_share,
        p_value (binomial, one-sided, None without cases); examples (at most 5, those of just_before first).
    """
    positions = split.positions[part]
    positions = positions[positions - _last_free(split)[positions] <= 2]
    first, places = first_places(split), np.arange(len(split.rows))
    just_before = np.append(False, split.rows[1:] == split.rows[:-1]) & (places != split.offsets[split.owner])
    found: dict[str, Any] = {"cases": len(positions)}
    for name, mask in (("in_history", first != places), ("just_before", just_before)):
        count, expected = int(mask[positions].sum()), _usual(split, mask, positions)
        found[name] = {
            "targets": count,
            "share": count / max(1, len(positions)),
            "expected_share": expected,
            "p_value": _p_value(count, len(positions), expected),
        }
    repeated = positions[(first != places)[positions]]
    shown = repeated[np.argsort(~just_before[repeated], kind="stable")]
    return {**found, "examples": _examples(split, shown)}


def seen_overlap(split: Split, seen: Interactions, part: Part = "test") -> dict[str, Any]:
    """Targets that occur, as pairs of user and item, in what a model was trained on.

    A pair that is in the user's own past, too, the model may know from there; `unexplained` leaves those out.

    Args:
        seen: what the model was trained on.

    Returns:
        JSON-ready: interactions (of seen), users_in_common, cases, in_seen, unexplained, share (unexplained per case),
        examples (at most 5, unexplained).
    """
    positions = split.positions[part]
    again = first_places(split)[positions] != positions
    users, items = pl.Series(split.all_users, dtype=pl.String), pl.Series(split.item_ids, dtype=pl.String)
    cases = pl.DataFrame(
        {USER: users.gather(split.case_users(part)), ITEM: items.gather(split.targets(part)), "place": positions}
    )
    pairs = seen.frame.select(pl.col(USER).cast(pl.String), pl.col(ITEM).cast(pl.String)).unique()
    hit = np.isin(positions, cases.join(pairs, on=[USER, ITEM], how="semi")["place"].to_numpy())
    unexplained = hit & ~again
    return {
        "interactions": len(seen),
        "users_in_common": int(users.is_in(pairs[USER].unique().implode()).sum()),
        "cases": len(positions),
        "in_seen": int(hit.sum()),
        "unexplained": int(unexplained.sum()),
        "share": _share(unexplained),
        "examples": _examples(split, positions[unexplained]),
    }


def look_ahead(split: Split) -> dict[str, Any] | None:
    """How much of other users' future training holds, seen from each test case; None without timestamps or cases.

    None, too, if the times are no clock, but numbers that begin anew with every user: most users begin at the smallest
    one, and no user has one twice in a row.

    Returns:
        JSON-ready: cases (those whose time is known), later_share_mean and later_share_median (over the cases, of the
        training interactions of other users with known times those that are later than the target), later_item_share
        (of the cases whose item is in training with a known time, those whose item's first such interaction, by
        anyone, is later than the target).
    """
    if split.timestamps is None or _counted_per_user(split):
        return None
    times, positions = split.timestamps, split.positions["test"]
    positions = positions[np.isfinite(times[positions])]
    training = np.flatnonzero(split.in_training & np.isfinite(times))
    if not len(positions) or not len(training):
        return None
    moments = np.unique(times[training])
    moment = np.searchsorted(moments, times[training])
    # Training interactions up to a moment, of everyone and of the user alone, by binary search in sorted numbers.
    here = np.searchsorted(moments, times[positions], side="right")
    owner = split.owner[positions]
    own = np.sort(split.owner[training] * (len(moments) + 1) + moment)
    starts = np.searchsorted(own, owner * (len(moments) + 1))
    ends = np.searchsorted(own, (owner + 1) * (len(moments) + 1))
    own_later = ends - np.searchsorted(own, owner * (len(moments) + 1) + here)
    later = len(training) - np.searchsorted(np.sort(moment), here) - own_later
    others = len(training) - (ends - starts)
    shares = later[others > 0] / others[others > 0]
    first = np.full(split.num_items, np.inf)
    np.minimum.at(first, split.rows[training], times[training])
    known = np.isfinite(first[split.rows[positions]])
    return {
        "cases": len(positions),
        "later_share_mean": float(shares.mean()) if len(shares) else 0.0,
        "later_share_median": float(np.median(shares)) if len(shares) else 0.0,
        "later_item_share": _share((first[split.rows[positions]] > times[positions])[known]),
    }


def unseen(split: Split) -> dict[str, Any]:
    """Users and items that training lacks.

    Returns:
        JSON-ready: items_only_in_test, items_only_in_valid_or_test (those that occur, but not in training),
        test_cases_of_unseen_items, cold_users (with a test or validation case and no training),
        test_cases_of_cold_users.
    """
    elsewhere = np.zeros(split.num_items, dtype=bool)
    elsewhere[split.rows] = True
    outside = elsewhere & (split.train_counts == 0)
    not_test = np.ones(len(split.rows), dtype=bool)
    not_test[split.positions["test"]] = False
    before = np.zeros(split.num_items, dtype=bool)
    before[split.rows[not_test]] = True
    asked = np.unique(np.concatenate([split.case_users("valid"), split.case_users("test")]))
    cold = split.train_ends == split.offsets[:-1]
    return {
        "items_only_in_test": int((outside & ~before).sum()),
        "items_only_in_valid_or_test": int(outside.sum()),
        "test_cases_of_unseen_items": int(split.unseen_items("test").sum()),
        "cold_users": int(cold[asked].sum()),
        "test_cases_of_cold_users": int(split.unseen_users("test").sum()),
    }


def _examples(split: Split, positions: Places) -> list[dict[str, Any]]:
    times = split.timestamps
    return [
        {
            "user": split.all_users[split.owner[place]],
            "item": split.item_ids[split.rows[place]],
            "time": None if times is None or np.isnan(times[place]) else float(times[place]),
        }
        for place in positions[:_EXAMPLES].tolist()
    ]


def _last_free(split: Split) -> Places:
    """(M,) the last place before each one that is a target of neither part, -1 if there is none in the whole log."""
    free = np.arange(len(split.rows))
    for positions in split.positions.values():
        free[positions] = -1
    return np.append(-1, np.maximum.accumulate(free)[:-1]) if len(free) else free


def _usual(split: Split, mask: npt.NDArray[np.bool_], positions: Places) -> float:
    """The share of the mask to expect at these targets, from what no part asks for (see `overlap`)."""
    elsewhere = np.arange(len(split.rows)) != split.offsets[split.owner]
    for targets in split.positions.values():
        elsewhere[targets] = False
    before = _last_free(split)[positions]
    before = before[before > split.offsets[split.owner[positions]]]
    return max(_share(mask[elsewhere]), _share(mask[before]))


def _p_value(count: int, cases: int, expected: float) -> float | None:
    from scipy.stats import binomtest

    return float(binomtest(count, cases, expected, "greater").pvalue) if cases else None


def _counted_per_user(split: Split) -> bool:
    """Whether times are no clock and begin anew with every user, so that two users' cannot be compared."""
    times = split.timestamps
    if split.clock or times is None or not np.isfinite(times).any():
        return False
    begins = times[split.offsets[:-1][np.diff(split.offsets) > 0]]
    tied = np.append(False, times[1:] == times[:-1]) & (np.arange(len(times)) != split.offsets[split.owner])
    return len(begins) > 1 and not tied.any() and bool(np.mean(begins == np.nanmin(times)) > 0.5)


def _share(mask: npt.NDArray[Any]) -> float:
    return float(np.mean(mask)) if len(mask) else 0.0
