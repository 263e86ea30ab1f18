"""What the order of a log is worth: ties, how targets hang on them, and orders that no user made.

Interactions that share a user and a time form a *tie group*; their order is the file's. Two detectors ask whether that
order is a store's: whether item ids ascend in it, and, for ids that were shuffled, whether the same two items always
stand in the same order.
"""

import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.data.split import Places, Split

Mask = npt.NDArray[np.bool_]
Where = Literal["ties", "day", "untimed"]

DAY = 86_400
SHUFFLES = 5
_RENUMBERINGS = 40
_DIGITS = re.compile("[0-9]+")


def tie_groups(split: Split) -> Places:
    """(M,) the number of every interaction's tie group, growing with the rows; an unknown time is alone."""
    return np.cumsum(~_tied(split)) - 1


def same_day(split: Split) -> Mask | None:
    """(M,) whether the user's interaction before lies on the same UTC day; None if times are no unix times."""
    if split.timestamps is None or not split.clock:
        return None
    days = np.floor_divide(split.timestamps, float(DAY))
    same: Mask = np.append(False, days[1:] == days[:-1])
    return same & _not_first(split)


def ties(split: Split) -> dict[str, Any] | None:
    """How much of the order is arbitrary; None without timestamps.

    Returns:
        JSON-ready: tied_share (of the interactions after a user's first, those whose time equals the one before),
        tied_test_share, tied_valid_share, same_day_share, same_day_test_share (UTC days; None if times are no unix
        times), largest_group, resolution ("day", "hour", "minute", "second", "finer" or "unknown": the coarsest of
        which all times are multiples, up to one shift), unknown_times.
    """
    if split.timestamps is None:
        return None
    tied, day = _tied(split), same_day(split)
    later = _not_first(split)
    groups = np.bincount(tie_groups(split)) if len(tied) else np.zeros(1)
    return {
        "tied_share": _share(tied[later]),
        "tied_test_share": _share(tied[split.positions["test"]]),
        "tied_valid_share": _share(tied[split.positions["valid"]]),
        "same_day_share": None if day is None else _share(day[later]),
        "same_day_test_share": None if day is None else _share(day[split.positions["test"]]),
        "largest_group": int(groups.max()),
        "resolution": _resolution(split.timestamps) if day is not None else "unknown",
        "unknown_times": int(np.isnan(split.timestamps).sum()),
    }


def order_sensitivity(split: Split, seed: int = 0) -> dict[str, Any] | None:
    """How many test targets are other items once ties are in another order; None without timestamps or test cases.

    In a group of g tied interactions, c of them with the target's item, a uniform shuffle puts another item in its
    place with probability 1 - c / g; the mean over the cases is the expectation, and seeded shuffles measure it.

    Returns:
        JSON-ready: expected_changed_share, measured_changed_shares (one per shuffle), measured_changed_share (their
        mean), shuffles, cases, tied_cases (those whose group has another item, so that they can change).
    """
    positions = split.positions["test"]
    if split.timestamps is None or not len(positions):
        return None
    groups = tie_groups(split)
    sizes = np.bincount(groups)
    keys = groups * split.num_items + split.rows
    of_target = groups[positions] * split.num_items + split.rows[positions]
    ordered = np.sort(keys)
    equal = np.searchsorted(ordered, of_target, side="right") - np.searchsorted(ordered, of_target, side="left")
    changed = 1 - equal / sizes[groups[positions]]
    measured = []
    for shuffle in range(SHUFFLES):
        draws = np.random.default_rng([seed, shuffle]).random(len(groups))
        shuffled = split.rows[np.lexsort((draws, groups))]
        measured.append(_share(shuffled[positions] != split.rows[positions]))
    return {
        "expected_changed_share": float(changed.mean()),
        "measured_changed_share": float(np.mean(measured)),
        "measured_changed_shares": measured,
        "shuffles": SHUFFLES,
        "cases": len(positions),
        "tied_cases": int((changed > 0).sum()),
    }


def id_order(split: Split, seed: int = 0) -> dict[str, Any]:
    """Whether item ids ascend where time gives no order, or only a day; and whether ids are numbered by use.

    Ids are compared as their numbers go (`id_places`) and as strings of bytes; of the two the one that is farther from
    1/2, or from no correlation, is told. Neighbours in a user's sequence with different items are counted: tied ones,
    others on the same UTC day, and, in a log without a clock, all others (whose order may be that of a table sorted by
    id). Of these last, neighbours of which one is its item's first appearance in the log are left out: where ids are
    numbered as items appear, it has the highest id so far, whatever users do.
    Pairs of items that many tie together make the binomial test too sure; therefore the share is also set against what
    it would be had the items been numbered at random.

    Returns:
        JSON-ready: ties, day and untimed (None if there is nothing to count, else pairs, compared ("numbers" or
        "strings"), ascending_share, p_value (binomial, two-sided, against 1/2), z (in standard deviations over random
        numberings)), and Spearman's rank correlations of id order: with_popularity, with_first_time (None without
        timestamps or with fewer than 3 items).
    """
    places_by = id_places(split.item_ids)
    counts = np.bincount(split.rows, minlength=split.num_items)
    used = np.flatnonzero(counts)
    first = None
    if split.timestamps is not None:
        earliest = np.full(split.num_items, np.inf)
        np.fmin.at(earliest, split.rows, split.timestamps)
        dated = used[np.isfinite(earliest[used])]
        first = _farthest([_rank_correlation(places[dated], earliest[dated]) for places in places_by.values()])
    found: dict[str, Any] = {}
    parts: tuple[Where, ...] = ("ties", "day", "untimed")
    for where in parts:
        second = neighbours(split, where)
        if second is not None and where == "untimed":
            first_seen = _first_appearances(split)
            second &= ~first_seen & ~np.append(False, first_seen[:-1])
        found[where] = None if second is None else _ascending(split, places_by, second, seed)
    return {
        **found,
        "with_popularity": _farthest([_rank_correlation(places[used], counts[used]) for places in places_by.values()]),
        "with_first_time": first,
    }


def neighbours(split: Split, where: Where) -> Mask | None:
    """(M,) whether an interaction has its user's one before as a neighbour of this kind; None if none can be.

    "ties": at the same time; "day": on the same UTC day at another time; "untimed": in a log whose times are no clock
    or that has none, and not tied.
    """
    if where == "ties":
        return None if split.timestamps is None else _tied(split)
    if where == "untimed":
        return None if split.clock else _not_first(split) & ~_tied(split)
    day = same_day(split)
    return None if day is None else day & ~_tied(split)


def fixed_order(split: Split, where: Where = "ties") -> dict[str, Any] | None:
    """Whether the same two items always stand in the same order: a store's or a file's, even if ids are hidden.

    Neighbours (`neighbours`) that are tied have no order of their own. Those on one day, and more so those of a log
    without a clock, may have the users' own: one does not watch the second part before the first.

    Every user counts once per pair of items that are such neighbours. Of a pair with n users, at least max(x, n - x)
    agree, x of them having one order. If each user's order was a coin toss, x is binomial, and mean and variance of
    that maximum are known exactly.

    Returns:
        JSON-ready: pairs (of items, neighbours for two users or more), votes (the sum of n), agreeing_share (of the
        votes), chance_share, agreement ((agreeing - chance) / (1 - chance): 0 is chance, 1 is always the same order),
        z. None without a pair.
    """
    mask = neighbours(split, where)
    if mask is None:
        return None
    second = np.flatnonzero(mask)
    first_items, second_items = split.rows[second - 1], split.rows[second]
    other = first_items != second_items
    second, first_items, second_items = second[other], first_items[other], second_items[other]
    low, high = np.minimum(first_items, second_items), np.maximum(first_items, second_items)
    votes = (
        pl.DataFrame({"user": split.owner[second], "low": low, "high": high, "forward": first_items < second_items})
        .unique(["user", "low", "high"], keep="first", maintain_order=True)
        .group_by("low", "high")
        .agg(pl.len().alias("votes"), pl.col("forward").sum().alias("forward"))
        .filter(pl.col("votes") >= 2)
    )
    if not votes.height:
        return None
    total, forward = votes["votes"].to_numpy().astype(np.int64), votes["forward"].to_numpy().astype(np.int64)
    agreeing = int(np.maximum(forward, total - forward).sum())
    sizes, pairs = np.unique(total, return_counts=True)
    mean, variance = np.array([_moments(int(size)) for size in sizes]).T
    chance, number = float(pairs @ mean), int(total.sum())
    return {
        "pairs": votes.height,
        "votes": number,
        "agreeing_share": agreeing / number,
        "chance_share": chance / number,
        "agreement": (agreeing - chance) / (number - chance),
        "z": (agreeing - chance) / float(np.sqrt(pairs @ variance)) if (variance > 0).any() else 0.0,
    }


def id_places(item_ids: list[str]) -> dict[str, Places]:
    """(N,) the place of every id in the ids' order as "numbers" (if one has a digit) and as "strings" of bytes.

    As numbers, a run of digits in an id counts as the number that it spells, of any length, and all else as itself, so
    that ids of several forms are compared, each among its own.

    >>> {name: places.tolist() for name, places in id_places(["b10", "b9", "n/a", "b100"]).items()}
    {'numbers': [1, 0, 3, 2], 'strings': [0, 2, 3, 1]}
    """
    ids = pl.DataFrame({"id": pl.Series(item_ids, dtype=pl.String)}).with_row_index("row")
    found = {}
    if bool(ids["id"].str.contains("[0-9]").any()):
        # The length of a number, at one width, stands before it: longer ones are larger.
        natural = [_DIGITS.sub(_with_length, text) for text in item_ids]
        ids = ids.with_columns(pl.Series("natural", natural, dtype=pl.String))
        found["numbers"] = _inverse(ids.sort("natural", "id")["row"].to_numpy())
    return {**found, "strings": _inverse(ids.sort("id")["row"].to_numpy())}


def _with_length(digits: re.Match[str]) -> str:
    number = digits[0].lstrip("0")
    return f"{len(number):06d}{number}"


def _first_appearances(split: Split) -> Mask:
    """(M,) whether an item appears for the first time: in the order of the rows, or in that of the numbers of time."""
    places = np.arange(len(split.rows))
    orders = [places]
    if split.timestamps is not None:
        orders.append(np.argsort(split.timestamps, kind="stable"))
    found = np.zeros(len(places), dtype=bool)
    for order in orders:
        found[order[np.unique(split.rows[order], return_index=True)[1]]] = True
    return found


def _farthest(values: list[float | None]) -> float | None:
    """The value that is farthest from 0; of equals the first."""
    return max((value for value in values if value is not None), key=abs, default=None)


def _inverse(order: npt.NDArray[Any]) -> Places:
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return places


def _not_first(split: Split) -> Mask:
    later = np.ones(len(split.rows), dtype=bool)
    later[split.offsets[:-1][np.diff(split.offsets) > 0]] = False
    return later


def _tied(split: Split) -> Mask:
    """(M,) whether an interaction has the same known time as its user's one before."""
    if split.timestamps is None or not len(split.rows):
        return np.zeros(len(split.rows), dtype=bool)
    equal: Mask = np.append(False, split.timestamps[1:] == split.timestamps[:-1])
    return equal & _not_first(split)


def _resolution(times: npt.NDArray[np.float64]) -> str:
    known = times[np.isfinite(times)]
    shifted = known - known[0]
    for name, seconds in (("day", DAY), ("hour", 3600), ("minute", 60), ("second", 1)):
        if not np.any(np.mod(shifted, float(seconds))):
            return name
    return "finer"


def _ascending(split: Split, places_by: dict[str, Places], second: Mask, seed: int) -> dict[str, Any] | None:
    from scipy.stats import binomtest

    at = np.flatnonzero(second)
    pairs = split.rows[at - 1], split.rows[at]
    other = pairs[0] != pairs[1]
    before, after = pairs[0][other], pairs[1][other]
    if not len(before):
        return None
    counts = {name: int((places[before] < places[after]).sum()) for name, places in places_by.items()}
    compared = max(counts, key=lambda name: abs(2 * counts[name] - len(before)))
    ascending = counts[compared]
    generator = np.random.default_rng(seed)
    shares = []
    for _ in range(_RENUMBERINGS):
        numbers = generator.permutation(split.num_items).astype(np.int32)
        shares.append(_share(numbers[before] < numbers[after]))
    # By symmetry their mean is 1/2; one pair of items has a share of 0 or 1 whatever the numbering.
    deviation = float(np.sqrt(np.mean((np.array(shares) - 0.5) ** 2)))
    share = ascending / len(before)
    return {
        "pairs": len(before),
        "compared": compared,
        "ascending_share": share,
        "p_value": float(binomtest(ascending, len(before), 0.5).pvalue),
        "z": (share - 0.5) / deviation if deviation else 0.0,
    }


def _rank_correlation(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float | None:
    from scipy.stats import rankdata

    if len(first) < 3:
        return None
    ranks = np.stack([rankdata(first), rankdata(second)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _moments(votes: int) -> tuple[float, float]:
    """Mean and variance of max(X, n - X) for X binomial (n, 1/2)."""
    from scipy.stats import binom

    heads = np.arange(votes + 1)
    chances = binom.pmf(heads, votes, 0.5)
    most = np.maximum(heads, votes - heads)
    mean = float(chances @ most)
    return mean, float(chances @ (most - mean) ** 2)


def _share(mask: npt.NDArray[Any]) -> float:
    return float(np.mean(mask)) if len(mask) else 0.0
