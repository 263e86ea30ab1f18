"""One codebook: k-means on points, with every code in use, or with codes of equal size."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from llmrec.quantization.balanced import balanced_assignment, estimate_prices, interior_prices
from llmrec.quantization.nearest import chunks, nearest, squared_distances

Init = Literal["random", "k-means++"]

# Passes over the codes that nobody uses. Each gives every such code an item; one is nearly always enough.
REVIVALS = 10


def kmeans(
    points: npt.NDArray[np.floating], size: int, niter: int, seed: int, init: Init = "random", negligible: float = 0.0
) -> npt.NDArray[np.float32]:
    """(n, D) -> (K, D) centroids: faiss's Lloyd iterations, after which codes that nobody uses are revived.

    If there were any, the iterations go on from the revived centroids, as many again.

    Args:
        points: n >= K of them; the work is done in float32.
        size: K.
        niter: iterations.
        seed: of the first centroids, and of how faiss splits clusters that run empty on the way.
        init: K different rows at random (faiss), or k-means++.
        negligible: the squared distance up to which points count as equal.
    """
    import faiss

    narrow = np.ascontiguousarray(points, dtype=np.float32)
    trainer = faiss.Kmeans(
        narrow.shape[1], size, niter=niter, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(narrow)
    )
    trainer.train(narrow, init_centroids=plus_plus(narrow, size, seed) if init == "k-means++" else None)
    trained = np.array(trainer.centroids, dtype=np.float32).reshape(size, narrow.shape[1])
    revived = revive(narrow, trained, negligible)
    if np.array_equal(revived, trained):
        return trained
    trainer.train(narrow, init_centroids=revived)
    trained = np.array(trainer.centroids, dtype=np.float32).reshape(size, narrow.shape[1])
    return revive(narrow, trained, negligible)


def plus_plus(points: npt.NDArray[np.float32], size: int, seed: int) -> npt.NDArray[np.float32]:
    """(n, D) -> (K, D) of the points, each drawn in proportion to its squared distance from those before.

    Source: Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding" (SODA 2007). Where no point is at a
    distance any more, the rest are drawn evenly.
    """
    generator = np.random.default_rng(seed)
    norms = np.einsum("nd,nd->n", points, points, dtype=np.float64)
    chosen = [int(generator.integers(len(points)))]
    distances = np.full(len(points), np.inf)
    while len(chosen) < size:
        last = points[chosen[-1]]
        distances = np.minimum(distances, np.maximum(norms - 2.0 * (points @ last) + norms[chosen[-1]], 0))
        distances[chosen[-1]] = 0
        heights = distances.cumsum()
        if heights[-1] > 0:
            place = int(heights.searchsorted(generator.random() * heights[-1], side="right"))
            chosen.append(min(place, len(points) - 1))
        else:
            chosen.append(int(generator.integers(len(points))))
    return points[chosen]


def revive(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32], negligible: float = 0.0
) -> npt.NDArray[np.float32]:
    """The centroids, those that are nearest to no point moved onto the points that are farthest from any.

    No point's distance to its nearest centroid grows. Codes stay unused only if points differ in fewer than K places.
    """
    revived = centroids.copy()
    for _ in range(REVIVALS):
        labels = nearest(points, revived)
        unused = np.flatnonzero(np.bincount(labels, minlength=len(revived)) == 0)
        if not len(unused):
            break
        distances = _to_rows(points, revived, labels)
        for code in unused:
            farthest = int(distances.argmax())
            if distances[farthest] <= negligible:
                return revived
            revived[code] = points[farthest]
            distances = np.minimum(distances, _to_rows(points, points[farthest : farthest + 1], None))
    return revived


def balanced_kmeans(
    points: npt.NDArray[np.float64], size: int, niter: int, seed: int, init: Init = "random"
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """(n, D) different points -> (K, D) centroids and (K,) prices.

    With the squared distance plus the price as its cost, every code is the cheapest for floor(n / K) or ceil(n / K)
    points. While iterating, clusters are only nearly balanced (`estimate_prices`); at the end the assignment is the
    exact one, centroids become its means, and it is solved once more for them. Memory is that of some (n, K) matrices.

    Source: balanced k-means as in Bradley, Bennett, Demiriz, "Constrained K-Means Clustering" (Microsoft Research,
    2000); for semantic IDs OneRec, arXiv 2502.18965, which fills one cluster after another greedily.
    """
    narrow = np.ascontiguousarray(points, dtype=np.float32)
    if init == "k-means++":
        centroids = plus_plus(narrow, size, seed)
    else:
        centroids = narrow[np.random.default_rng(seed).choice(len(narrow), size, replace=False)]
    prices: npt.NDArray[np.float64] | None = None
    for _ in range(niter):
        costs = -2 * (narrow @ centroids.T)
        costs += (centroids**2).sum(axis=1)
        prices = estimate_prices(costs, prices)
        costs += prices.astype(np.float32)
        centroids = _means(points, costs.argmin(axis=1), centroids)
    balance = balanced_assignment(_costs(points, centroids), prices)
    centroids = _means(points, balance.labels, centroids)
    last = _costs(points, centroids)
    labels = balanced_assignment(last, balance.prices).labels
    return centroids, interior_prices(last, labels)


def _costs(points: npt.NDArray[np.float64], centroids: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(n, K) squared distances in float64, short of the points' own norms."""
    wide = centroids.astype(np.float64)
    costs = -2 * (points @ wide.T)
    costs += (wide**2).sum(axis=1)
    return np.asarray(costs)


def _means(
    points: npt.NDArray[np.float64], labels: npt.NDArray[np.integer], centroids: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """(K, D) means of the labels' points; a centroid without points stays where it is."""
    sums, counts = label_sums(points, labels, len(centroids))
    filled = counts > 0
    means = centroids.copy()
    means[filled] = sums[filled] / counts[filled, None]
    return means


def label_sums(
    points: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(K, D) float64 sums of the points with each label, and (K,) how many there are."""
    from scipy.sparse import csr_matrix

    counts = np.bincount(labels, minlength=size)
    order = np.argsort(labels, kind="stable")
    members = csr_matrix((np.ones(len(labels)), order, np.append(0, counts.cumsum())), shape=(size, len(labels)))
    return np.asarray(members @ points, dtype=np.float64), counts


def _to_rows(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32], labels: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.float64]:
    """(n,) squared distances of the points to their labels' centroids, or to the only one."""
    found = np.empty(len(points))
    for rows in chunks(len(points)):
        found[rows] = squared_distances(points[rows], centroids if labels is None else centroids[labels[rows]])
    return found
