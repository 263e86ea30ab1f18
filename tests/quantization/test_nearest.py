"""The nearest centroid against its definition, where float32 and float64 round differently."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import TokenizerError
from llmrec.quantization import nearest as module
from llmrec.quantization.nearest import check_matrix, nearest, squared_distances


def brute_force(vectors: np.ndarray, centroids: np.ndarray, prices: np.ndarray | float = 0.0) -> np.ndarray:
    differences = vectors[:, None, :].astype(np.float64) - centroids[None].astype(np.float64)
    return ((differences**2).sum(axis=2) + prices).argmin(axis=1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ties_go_to_the_lowest_index(data: st.DataObject) -> None:
    # Points on a coarse grid, far from the origin: many exact ties, and large norms whose rounding could turn them.
    dimension = data.draw(st.integers(1, 4))
    point = st.lists(st.integers(-2, 2), min_size=dimension, max_size=dimension)
    vectors = np.array(data.draw(st.lists(point, min_size=1, max_size=8)), dtype=np.float64)
    centroids = np.array(data.draw(st.lists(point, min_size=1, max_size=12)), dtype=np.float64)
    offset = data.draw(st.sampled_from([0.0, 0.1, 1000.3]))
    scale = data.draw(st.sampled_from([1.0, 1e-30, 1e12]))
    vectors, centroids = scale * (vectors + offset), scale * (centroids + offset)
    np.testing.assert_array_equal(nearest(vectors, centroids), brute_force(vectors, centroids))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_prices_are_added_to_the_squared_distance(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    scale = data.draw(st.sampled_from([1e-4, 1.0, 1e6]))
    # On a grid, halves and integers tie exactly.
    vectors, centroids = generator.integers(-2, 3, size=(20, 2)) * scale, generator.integers(-2, 3, (size, 2)) * scale
    prices = generator.integers(-3, 4, size) * data.draw(st.sampled_from([0.5, 1.0])) * scale**2
    np.testing.assert_array_equal(nearest(vectors, centroids, prices), brute_force(vectors, centroids, prices))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("gap", [1e-1, 1e-5, 1e-7, 1e-9, 1e-13])
def test_centroids_that_differ_by_less_than_float32_can_tell(dtype: type, gap: float) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(300, 40)).astype(dtype)
    centroids = np.repeat(generator.normal(size=(10, 40)), 4, axis=0)
    centroids += gap * generator.normal(size=centroids.shape)
    found = nearest(vectors, centroids)
    np.testing.assert_array_equal(found, brute_force(vectors, centroids))
    assert len(np.unique(found)) > 10  # it is not always the first of four


def test_one_far_vector_does_not_coarsen_the_others() -> None:
    generator = np.random.default_rng(1)
    vectors = np.concatenate([generator.normal(size=(200, 8)), np.full((1, 8), 1e14)])
    centroids = generator.normal(size=(20, 8))
    np.testing.assert_array_equal(nearest(vectors, centroids), brute_force(vectors, centroids))


def test_a_price_beyond_float32() -> None:
    prices = np.array([1e300, 0.0, 1e-300])
    assert nearest(np.array([[0.1], [2.1]]), np.array([[0.0], [2.0], [0.2]]), prices).tolist() == [2, 1]


def test_equal_centroids_cost_nothing_and_the_first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    distinct = generator.normal(size=(3, 4))
    order = np.array([2, 2, 0, 1, 0, 1, 2])
    monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("equal centroids were measured one by one"))
    vectors = generator.normal(size=(50, 4))
    np.testing.assert_array_equal(nearest(vectors, distinct[order]), brute_force(vectors, distinct[order]))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    generator = np.random.default_rng(0)
    vectors, centroids = generator.integers(-1, 2, size=(50, 3)), generator.integers(-1, 2, size=(9, 3))
    monkeypatch.setattr(module, "CHUNK", chunk)
    np.testing.assert_array_equal(nearest(vectors, centroids), brute_force(vectors, centroids))


def test_squared_distances() -> None:
    vectors = np.array([[1, 2], [3, 4]], dtype=np.float32)
    assert squared_distances(vectors, np.array([[0.5, 2.0], [3.0, 1.0]])).tolist() == [0.25, 9.0]
    assert squared_distances(vectors[:, None], vectors[None]).tolist() == [[0, 8], [8, 0]]


def test_a_matrix_is_checked_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    for dtype in (np.float16, np.float32, np.float64):
        matrix = np.ones((10, 3), dtype=dtype)
        assert check_matrix(matrix, 3) is matrix
    assert check_matrix([[1, 2]]).dtype == np.float64
    bad = np.ones((10, 3))
    bad[6, 1], bad[9, 0] = np.nan, -np.inf
    with pytest.raises(TokenizerError, match=r"2 embedding\(s\) hold NaN or infinity, row 6 first"):
        check_matrix(bad)
    with pytest.raises(TokenizerError, match="reach 2e\\+15"):
        check_matrix(np.array([[1.0, -2e15]]))
    with pytest.raises(TokenizerError, match="3 wide, the codebooks 4"):
        check_matrix(np.ones((1, 3)), 4)
    for shape in ((0, 3), (3, 0), (3,), (1, 1, 1)):
        with pytest.raises(TokenizerError, match="cannot be quantised"):
            check_matrix(np.ones(shape))
