"""How long sequences are, how unequal items are, and when things happened."""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.data.split import Places, Split

Numbers = npt.NDArray[Any]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_GAPS = {
    "none": 0.0,
    "up to a minute": 60.0,
    "up to an hour": 3600.0,
    "up to a day": 86_400.0,
    "up to a week": 604_800.0,
    "up to 30 days": 2_592_000.0,
    "longer": np.inf,
}
_CURVE = 60  # points of a plotted curve


def lengths(split: Split) -> dict[str, Any]:
    """Interactions per user: mean, quantiles and a histogram in bins that grow by a constant factor."""
    found = np.diff(split.offsets)
    return {"mean": float(found.mean()) if len(found) else 0.0, "quantiles": quantiles(found), **histogram(found)}


def popularity(split: Split) -> dict[str, Any]:
    """How training interactions spread over the N items of the table.

    Returns:
        JSON-ready: mean, quantiles (of interactions per item), gini (over all items, unseen ones too), top_1_share and
        top_10_share (of the interactions, of the most popular 1 % and 10 % of the items, rounded up), head, torso and
        tail (the most popular items with a third of the interactions, the next third, the rest: items and share of
        the items each; ties by row), unseen_items, curve (rank and interactions of some items, most popular first).
    """
    counts = split.train_counts
    ordered = np.sort(counts)[::-1]
    total, number = int(counts.sum()), len(counts)
    groups = thirds(counts)
    ranks = np.unique(np.geomspace(1, max(1, int((counts > 0).sum())), _CURVE).astype(np.int64))
    return {
        "mean": float(counts.mean()),
        "quantiles": quantiles(counts),
        "gini": gini(counts),
        "top_1_share": float(ordered[: -(-number // 100)].sum()) / max(1, total),
        "top_10_share": float(ordered[: -(-number // 10)].sum()) / max(1, total),
        "groups": {
            name: {"items": int((groups == place).sum()), "item_share": float((groups == place).mean())}
            for place, name in enumerate(("head", "torso", "tail"))
        },
        "unseen_items": int((counts == 0).sum()),
        "curve": {"rank": ranks.tolist(), "interactions": ordered[ranks - 1].tolist()} if total else None,
    }


def times(split: Split) -> dict[str, Any] | None:
    """When interactions happened; None without known times.

    Returns:
        JSON-ready: first, last, median (in the log's unit), unix (whether they are unix seconds), span_days (None if
        not unix), edges and interactions (a histogram of equal bins), gaps: between a user's neighbours quantiles (of
        those known and not below 0), and share by size (None if not unix); backward_gaps: how many are below 0, which
        only users have who are in an order of their own, because times are missing.
    """
    if split.timestamps is None or not np.isfinite(split.timestamps).any():
        return None
    known = split.timestamps[np.isfinite(split.timestamps)]
    unix = bool(split.clock)
    bins, edges = np.histogram(known, bins=min(_CURVE, max(1, len(np.unique(known)))))
    gaps = np.diff(split.timestamps)[np.diff(split.owner) == 0]
    backward = int((gaps < 0).sum())
    gaps = gaps[gaps >= 0]
    shares = np.bincount(np.searchsorted(list(_GAPS.values()), gaps), minlength=len(_GAPS)) / max(1, len(gaps))
    return {
        "first": float(known.min()),
        "last": float(known.max()),
        "median": float(np.median(known)),
        "unix": unix,
        "span_days": float(np.ptp(known)) / 86_400 if unix else None,
        "edges": edges.tolist(),
        "interactions": bins.tolist(),
        "backward_gaps": backward,
        "gap_quantiles": quantiles(gaps),
        "gap_shares": dict(zip(_GAPS, shares.tolist(), strict=True)) if unix else None,
    }


def quantiles(values: Numbers) -> dict[str, float]:
    """The values' quantiles, interpolated, by name; empty without values.

    >>> quantiles(np.array([1, 2, 3]))["0.5"]
    2.0
    """
    if not len(values):
        return {}
    return {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def histogram(values: Places, bins: int = 24) -> dict[str, list[int]]:
    """Counts of positive integers in bins that grow by a factor: edges (B + 1,), the last exclusive, counts (B,)."""
    values = values[values > 0]
    if not len(values):
        return {"edges": [], "counts": []}
    edges = np.unique(np.ceil(np.geomspace(values.min(), values.max() + 1, bins + 1) - 1e-9).astype(np.int64))
    return {
        "edges": edges.tolist(),
        "counts": np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1).tolist(),
    }


def gini(counts: Numbers) -> float:
    """The Gini coefficient of the counts (N,): 0 if all are equal, (N - 1) / N if one has all; 0 if there are none.

    >>> round(gini(np.array([1, 3])), 4)
    0.25
    """
    number, total = len(counts), float(np.sum(counts))
    if not total:
        return 0.0
    places = np.arange(1, number + 1)
    return float((2 * places - number - 1) @ np.sort(counts)) / (number * total)


def thirds(counts: Places) -> Places:
    """(N,) 0 for head, 1 for torso, 2 for tail, 3 for items without an interaction; ties by row.

    The most popular items that hold a third of the interactions are the head, those with the next third the torso.

    >>> thirds(np.array([1, 4, 2, 0, 2])).tolist()
    [2, 0, 1, 3, 2]
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    groups = np.empty(len(counts), dtype=np.int64)
    groups[order] = np.minimum(3 * before // max(1, int(counts.sum())), 2)
    groups[counts == 0] = 3
    return groups
