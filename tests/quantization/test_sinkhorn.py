"""Sinkhorn-Knopp in logarithms against the same scaling of plain numbers, and the mapping that it gives."""

import numpy as np
import pytest

from llmrec.quantization.sinkhorn import sinkhorn, uniform_mapping


def plain(costs: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    plan = np.exp(-costs / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(axis=1, keepdims=True)
        plan = plan / plan.sum(axis=0, keepdims=True) * len(costs) / costs.shape[1]
    return plan


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (20, 8)])
@pytest.mark.parametrize("iterations", [1, 2, 30])
def test_it_is_the_scaling_of_rows_and_columns(shape: tuple[int, int], iterations: int) -> None:
    costs = np.random.default_rng(sum(shape)).random(shape)
    np.testing.assert_allclose(np.exp(sinkhorn(costs, 0.1, iterations)), plain(costs, 0.1, iterations), rtol=1e-9)


def test_columns_are_used_equally_and_rows_once_it_has_converged() -> None:
    plan = np.exp(sinkhorn(np.random.default_rng(0).random((12, 4)), 0.5, 500))
    np.testing.assert_allclose(plan.sum(axis=0), 3)
    np.testing.assert_allclose(plan.sum(axis=1), 1, rtol=1e-6)


def test_nothing_underflows() -> None:
    plan = sinkhorn(np.array([[0.0, 1.0, 50.0], [0.0, 2.0, 50.0]]), 0.003, 50)
    assert np.isfinite(plan).all()
    assert np.exp(plan).sum() == pytest.approx(2)


def test_leading_axes_are_problems_of_their_own() -> None:
    costs = np.random.default_rng(1).random((4, 3, 6)) * np.array([1, 10, 0.1, 1])[:, None, None]
    together, mapped = sinkhorn(costs, 0.05, 20), uniform_mapping(costs)
    for problem in range(4):
        np.testing.assert_allclose(together[problem], sinkhorn(costs[problem], 0.05, 20))
        np.testing.assert_array_equal(mapped[problem], uniform_mapping(costs[problem]))


def test_the_mapping_does_not_depend_on_the_scale_of_costs() -> None:
    costs = np.random.default_rng(2).random((6, 9))
    np.testing.assert_array_equal(uniform_mapping(costs), uniform_mapping(1000 * costs + 7))


@pytest.mark.parametrize("seed", range(10))
def test_different_items_are_told_apart(seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes, items = generator.normal(size=(64, 4)), generator.normal(scale=0.1, size=(4, 4))
    costs = ((items[:, None] - codes) ** 2).sum(axis=2)
    assert len(np.unique(costs.argmin(axis=1))) < 4
    assert len(np.unique(uniform_mapping(costs))) == 4


def test_one_item_gets_its_cheapest_code_and_equal_items_one_code() -> None:
    costs = np.random.default_rng(3).random((1, 16))
    assert uniform_mapping(costs).tolist() == [costs.argmin()]
    assert len(set(uniform_mapping(np.repeat(costs, 3, axis=0)).tolist())) == 1
    assert uniform_mapping(np.ones((3, 4))).tolist() == [0, 0, 0]


def test_of_equal_entries_the_cheapest_code_is_taken() -> None:
    # Two items, six codes: each takes three of them wholly. Item 0 has the even ones, of which 4 is nearest to it.
    costs = np.array([[0.30, 2.0, 0.20, 2.0, 0.10, 2.0], [2.0, 0.2, 2.0, 0.1, 2.0, 0.3]])
    assert uniform_mapping(costs).tolist() == [4, 3]
