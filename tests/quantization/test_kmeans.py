"""The parts of one codebook: first centroids, revival, and means of balanced clusters."""

import numpy as np
import pytest

from llmrec.quantization.kmeans import balanced_kmeans, kmeans, label_sums, plus_plus, revive
from llmrec.quantization.nearest import nearest


def error(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((points[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2).min(axis=1)


def test_plus_plus_draws_in_proportion_to_the_squared_distance() -> None:
    # From the origin (half of the points) the others are at squared distances 1 and 9.
    points = np.array([[0.0], [0.0], [1.0], [-3.0]], dtype=np.float32)
    drawn = [plus_plus(points, 2, seed).ravel().tolist() for seed in range(3000)]
    assert {first for first, _ in drawn} == {0.0, 1.0, -3.0}
    seconds = [second for first, second in drawn if first == 0]
    assert 0 not in seconds
    assert seconds.count(-3.0) / len(seconds) == pytest.approx(0.9, abs=0.03)
    assert [first for first, _ in drawn].count(0.0) / 3000 == pytest.approx(0.5, abs=0.04)
    np.testing.assert_array_equal(plus_plus(points, 2, 7), plus_plus(points, 2, 7))


def test_plus_plus_takes_the_minimum_over_all_centroids() -> None:
    points = np.array([[0.0, 0], [10, 0], [10, 0], [0, 10]], dtype=np.float32)
    for seed in range(50):
        assert len(np.unique(plus_plus(points, 3, seed), axis=0)) == 3
    assert len(plus_plus(points, 6, 0)) == 6  # more than there are different points
    assert set(map(tuple, plus_plus(points, 6, 0).tolist())) == {(0, 0), (10, 0), (0, 10)}


@pytest.mark.parametrize("seed", range(10))
def test_revived_codes_are_used_and_no_point_is_farther(seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(60, 3)).astype(np.float32)
    centroids = points[generator.choice(60, 20, replace=False)]
    centroids[generator.choice(20, 12, replace=False)] = 1000.0 + generator.normal(size=(12, 3))
    revived = revive(points, centroids)
    assert len(np.unique(nearest(points, revived))) == 20
    assert (error(points, revived) <= error(points, centroids) + 1e-12).all()
    used = np.unique(nearest(points, centroids))
    np.testing.assert_array_equal(revived[used], centroids[used])


def test_codes_are_not_revived_for_differences_that_do_not_count() -> None:
    points = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    centroids = np.concatenate([np.eye(2), np.full((2, 2), 9.0)]).astype(np.float32)
    np.testing.assert_array_equal(revive(points, centroids), centroids)
    points[0, 0] += 1e-4
    np.testing.assert_array_equal(revive(points, centroids, negligible=1e-6), centroids)
    assert len(np.unique(nearest(points, revive(points, centroids)))) == 3


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_kmeans_uses_all_codes_where_points_repeat(init: str) -> None:
    points = np.repeat(np.random.default_rng(0).normal(size=(30, 4)), [200] + [1] * 29, axis=0)
    centroids = kmeans(points, 30, 5, 0, init)
    assert centroids.dtype == np.float32
    assert len(np.unique(nearest(points, centroids))) == 30
    assert error(points, centroids).max() < 1e-10


def test_label_sums() -> None:
    points = np.array([[1.0, 2], [10, 20], [100, 200]])
    sums, counts = label_sums(points, np.array([2, 0, 2]), 4)
    assert sums.tolist() == [[10, 20], [0, 0], [101, 202], [0, 0]]
    assert counts.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("items", [7, 50, 333])
def test_balanced_clusters_are_balanced_and_their_centroids_nearly_means(init: str, items: int) -> None:
    points = np.random.default_rng(items).normal(size=(items, 3)) ** 3
    centroids, prices = balanced_kmeans(points, 7, 20, 0, init)
    labels = nearest(points, centroids, prices)
    sizes = np.bincount(labels, minlength=7)
    assert (sizes.min(), sizes.max()) == (items // 7, -(-items // 7))
    spread = ((points - points.mean(axis=0)) ** 2).sum()
    within = ((points - centroids[labels]) ** 2).sum()
    assert within < 0.7 * spread
    means = label_sums(points, labels, 7)[0] / sizes[:, None]
    assert ((centroids - means)[labels] ** 2).sum() < 0.05 * within + 1e-9
