"""Balanced assignment: N items to K clusters of floor(N / K) or ceil(N / K) items each, at the least total cost."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import TokenizerError

# Temperatures of the search for prices, as shares of the mean cost above the cheapest, and steps at each.
TEMPERATURES = (0.1, 0.03, 0.01, 0.003)
STEPS = 8
BLOCK = 1024
# A cluster nobody asks for becomes cheaper by at most this factor's logarithm per step.
LEAST_DEMAND = 1e-3
# Halvings of the interval that holds the widest margin of prices.
BISECTIONS = 30


@dataclass(frozen=True)
class Balance:
    """A balanced assignment and what proves it.

    Attributes:
        labels: (N,) the cluster of every item; all sizes are floor(N / K) or ceil(N / K).
        prices: (K,) float64. Every item is in a cluster of least cost plus price (but for rounding).
        cost: the sum of the items' costs.
        bound: no balanced assignment costs less; cost - bound is the gap, zero but for rounding.
    """

    labels: npt.NDArray[np.int64]
    prices: npt.NDArray[np.float64]
    cost: float
    bound: float


def balanced_assignment(costs: npt.NDArray[np.floating], prices: npt.NDArray[np.floating] | None = None) -> Balance:
    """The least costly assignment with all clusters of floor(N / K) or ceil(N / K) items: exact, for every N.

    A transportation problem. Each item first goes where cost plus price is least, which is optimal for the sizes that
    result. Then items move along shortest paths from clusters that are too large to clusters that are too small. The
    graph has one node per cluster, and an edge's length is the least that any item of the one cluster pays for a
    place in the other. After each search prices follow the distances, so that optimality is kept (Ahuja, Magnanti,
    Orlin, "Network Flows", 1993, section 9.7). Prices only decide how many moves are needed. Memory is that of (N, K)
    float64 numbers a few times over, time grows with the items that have to move.

    Args:
        costs: (N, K) finite numbers with N >= K.
        prices: (K,) where to begin, such as `estimate_prices` finds; default 0.

    Raises:
        TokenizerError: if there are more clusters than items, or a cost is NaN or infinite.

    >>> balanced_assignment(np.array([[0.0, 9.0], [0.1, 5.0], [0.2, 7.0], [0.3, 8.0]])).labels.tolist()
    [0, 1, 1, 0]
    """
    wide: npt.NDArray[np.float64] = np.asarray(costs, dtype=np.float64)
    items, clusters = wide.shape
    if items < clusters:
        raise TokenizerError(f"{items} items cannot fill {clusters} clusters. Ask for at most {items} codes.")
    if not np.isfinite(wide).all():
        raise TokenizerError("Costs hold NaN or infinity. Give finite costs, a large one for what must not be.")
    floor, ceilings = divmod(items, clusters)
    found = np.zeros(clusters) if prices is None else np.array(prices, dtype=np.float64)
    labels: npt.NDArray[np.int64] = (wide + found).argmin(axis=1)
    # The dearest clusters are the ones that may have one item more.
    ranked = np.argsort(-found, kind="stable")
    targets = np.full(clusters, floor)
    targets[ranked[:ceilings]] += 1
    # One node more, through which the right to one item more passes from cluster to cluster.
    found = np.append(found, found[ranked[ceilings - 1]] if ceilings else found.max())
    lengths = np.full((clusters + 1, clusters + 1), np.inf)
    movers = np.zeros((clusters + 1, clusters + 1), dtype=np.int64)
    for cluster in range(clusters):
        _measure_edges(cluster, wide, labels, lengths, movers)
    while True:
        excess = np.append(np.bincount(labels, minlength=clusters) - targets, 0)
        if not excess.any():
            break
        lengths[-1, :-1] = np.where(targets > floor, 0, np.inf)
        lengths[:-1, -1] = np.where((targets == floor) & (ceilings > 0), 0, np.inf)
        reduced = np.maximum(lengths + found[None, :] - found[:, None], 0)
        distances, parents = _shortest(reduced, excess > 0)
        found -= distances
        changed = _move(excess, distances, parents, movers, labels, targets)
        for cluster in changed:
            _measure_edges(cluster, wide, labels, lengths, movers)
    found = found[:-1]
    rows = np.arange(items)
    bound = (wide + found).min(axis=1).sum() - floor * found.sum() - np.sort(found)[clusters - ceilings :].sum()
    return Balance(labels, found, float(wide[rows, labels].sum()), float(bound))


def estimate_prices(
    costs: npt.NDArray[np.floating], prices: npt.NDArray[np.floating] | None = None
) -> npt.NDArray[np.float64]:
    """(K,) prices under which (N, K) costs give clusters of nearly equal size: Sinkhorn's at falling temperatures.

    A step raises each price by the temperature times the logarithm of how many times its share a cluster is asked
    for, every item asking for all clusters in the proportions of a softmax. Blocks of items keep it in the cache.

    Args:
        costs: in float32 for speed.
        prices: from a similar problem; then only the lowest temperature is used.
    """
    spread = float((costs.mean(axis=1) - costs.min(axis=1)).mean()) or 1.0
    temperatures = TEMPERATURES if prices is None else TEMPERATURES[-1:]
    found = np.zeros(costs.shape[1]) if prices is None else np.array(prices, dtype=np.float64)
    for temperature in temperatures:
        heat = temperature * spread
        for _ in range(STEPS):
            demand = np.zeros(len(found))
            for begin in range(0, len(costs), BLOCK):
                shares = costs[begin : begin + BLOCK] + found.astype(costs.dtype)
                shares -= shares.min(axis=1, keepdims=True)
                shares *= -1 / heat
                np.exp(shares, out=shares)
                shares /= shares.sum(axis=1, keepdims=True)
                demand += shares.sum(axis=0, dtype=np.float64)
            found += heat * np.log(np.maximum(demand * len(found) / len(costs), LEAST_DEMAND))
        found -= found.mean()
    return found


def interior_prices(costs: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """(K,) prices under which every item's own cluster is the cheapest by the widest margin there is.

    With them argmin(costs + prices) gives back the labels, if they are optimal for their sizes and no other assignment
    is equally good. The margin t is the largest for which price[a] - price[b] <= length[a, b] - t has a solution, a
    system of difference constraints: shortest paths solve it for a given t, and t is found by bisection. All clusters
    must have items.
    """
    wide: npt.NDArray[np.float64] = np.asarray(costs, dtype=np.float64)
    clusters = wide.shape[1]
    if clusters == 1:
        return np.zeros(1)
    lengths, movers = np.full((clusters, clusters), np.inf), np.zeros((clusters, clusters), dtype=np.int64)
    for cluster in range(clusters):
        _measure_edges(cluster, wide, labels, lengths, movers)
    everywhere = np.ones(clusters, dtype=bool)
    prices = _shortest(lengths.T, everywhere)[0]
    # A cycle of two clusters bounds the margin from above.
    low, high = 0.0, max(0.0, float((lengths + lengths.T).min()) / 2)
    for _ in range(BISECTIONS):
        margin = (low + high) / 2
        trial = _shortest(lengths.T - margin, everywhere)[0]
        if (trial[:, None] - trial[None, :] <= lengths - margin / 2).all():
            low, prices = margin, trial
        else:
            high = margin
    return prices


def _measure_edges(
    cluster: int,
    costs: npt.NDArray[np.float64],
    labels: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.float64],
    movers: npt.NDArray[np.int64],
) -> None:
    """Writes the cluster's row: the least that any of its items pays to move to each other one, and which item."""
    clusters = costs.shape[1]
    members = np.flatnonzero(labels == cluster)
    lengths[cluster] = np.inf
    if not len(members):
        return
    own = costs[members]
    own -= own[:, cluster, None].copy()
    least = own.argmin(axis=0)
    lengths[cluster, :clusters] = own[least, np.arange(clusters)]
    lengths[cluster, cluster] = np.inf
    movers[cluster, :clusters] = members[least]


def _shortest(
    lengths: npt.NDArray[np.float64], sources: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Distances from the nearest source, and the node before, by Bellman and Ford; all nodes at once in each sweep.

    Nodes out of reach are as far as the farthest other. Around a negative cycle distances are only upper bounds.
    """
    distances = np.where(sources, 0.0, np.inf)
    parents = np.full(len(lengths), -1)
    active = np.flatnonzero(sources)
    for _ in range(len(lengths)):
        through = distances[active, None] + lengths[active]
        best = through.argmin(axis=0)
        found = through[best, np.arange(len(lengths))]
        better = found < distances
        if not better.any():
            break
        distances[better] = found[better]
        parents[better] = active[best[better]]
        active = np.flatnonzero(better)
    reached = np.isfinite(distances)
    distances[~reached] = distances[reached].max()
    return distances, parents


def _move(
    excess: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float64],
    parents: npt.NDArray[np.int64],
    movers: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
) -> set[int]:
    """Moves one item along each edge of paths to clusters that are too small; returns the clusters it changed.

    All edges of these paths have length 0 under the new prices, so paths do not disturb each other as long as no item
    moves twice and no right passes twice.
    """
    left, last = excess.copy(), len(parents) - 1
    taken: set[tuple[str, int]] = set()
    changed: set[int] = set()
    short = np.flatnonzero(excess < 0)
    for sink in short[np.argsort(distances[short], kind="stable")].tolist():
        path = [sink]
        while parents[path[-1]] >= 0:
            path.append(int(parents[path[-1]]))
        if left[path[-1]] <= 0:
            continue
        steps = list(zip(path[1:], path[:-1], strict=True))  # from, to
        marks = [
            ("gains", begin) if end == last else ("loses", end) if begin == last else ("item", int(movers[begin, end]))
            for begin, end in steps
        ]
        if not taken.isdisjoint(marks):
            continue
        taken.update(marks)
        left[path[-1]] -= 1
        for (_, end), (kind, which) in zip(steps, marks, strict=True):
            if kind == "item":
                changed.update((int(labels[which]), end))
                labels[which] = end
            else:
                targets[which] += 1 if kind == "gains" else -1
    return changed
