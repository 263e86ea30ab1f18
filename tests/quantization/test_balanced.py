"""Balanced assignment against the assignment problem with one column per place, and its prices against their use."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from llmrec.exceptions import TokenizerError
from llmrec.quantization.balanced import balanced_assignment, estimate_prices, interior_prices


def least_cost(costs: np.ndarray) -> float:
    """floor(N / K) places per cluster that must be filled, and one more that a dummy item may take for nothing."""
    items, clusters = costs.shape
    floor, ceilings = divmod(items, clusters)
    forbidden = 1e6
    real = np.concatenate([np.repeat(costs, floor, axis=1), costs], axis=1)
    dummies = np.concatenate(
        [np.full((clusters - ceilings, clusters * floor), forbidden), np.zeros((clusters - ceilings, clusters))],
        axis=1,
    )
    matrix = np.concatenate([real, dummies])
    rows, columns = linear_sum_assignment(matrix)
    return float(matrix[rows, columns].sum())


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_it_is_the_least_costly_of_all_and_the_bound_proves_it(data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, 8))
    items = clusters + data.draw(st.integers(0, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 9999)))
    if data.draw(st.booleans()):
        costs = generator.normal(size=(items, clusters))
    else:  # ties everywhere
        costs = generator.integers(0, data.draw(st.integers(1, 5)), size=(items, clusters)).astype(float)
    start = data.draw(st.sampled_from(["zero", "estimated", "wild"]))
    prices = {"zero": None, "estimated": estimate_prices(costs), "wild": 10 * generator.normal(size=clusters)}[start]
    balance = balanced_assignment(costs, prices)
    sizes = np.bincount(balance.labels, minlength=clusters)
    assert sizes.min() == items // clusters
    assert sizes.max() == -(-items // clusters)
    assert balance.cost == pytest.approx(costs[np.arange(items), balance.labels].sum(), abs=1e-9)
    assert balance.cost == pytest.approx(least_cost(costs), abs=1e-8)
    assert balance.bound == pytest.approx(balance.cost, abs=1e-8)
    total = costs + balance.prices
    assert (total[np.arange(items), balance.labels] <= total.min(axis=1) + 1e-9).all()


def test_equal_items_fill_all_clusters() -> None:
    balance = balanced_assignment(np.zeros((50, 7)))
    assert sorted(np.bincount(balance.labels).tolist()) == [7] * 6 + [8]
    assert balance.cost == 0


def test_what_cannot_be_assigned_is_refused() -> None:
    with pytest.raises(TokenizerError, match="2 items cannot fill 3 clusters"):
        balanced_assignment(np.zeros((2, 3)))
    for value in (np.nan, np.inf):
        with pytest.raises(TokenizerError, match="Costs hold NaN or infinity"):
            balanced_assignment(np.array([[0.0, value], [1.0, 0.0]]))


def test_estimated_prices_nearly_balance() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(4000, 8)) * np.where(np.arange(4000) < 2000, 0.2, 1)[:, None]
    costs = ((points[:, None] - points[generator.choice(4000, 32, replace=False)]) ** 2).sum(axis=2)
    costs = costs.astype(np.float32)
    before = np.bincount(costs.argmin(axis=1), minlength=32)
    prices = estimate_prices(costs)
    after = np.bincount((costs + prices).argmin(axis=1), minlength=32)
    # Items in excess of their clusters' share: most of them before, hardly any after.
    assert np.maximum(before - 125, 0).sum() > 1200
    assert np.maximum(after - 125, 0).sum() < 120
    warm = np.bincount((costs + estimate_prices(costs, prices)).argmin(axis=1), minlength=32)
    assert np.abs(warm - 125).sum() <= np.abs(after - 125).sum()


def widest_margin(costs: np.ndarray, labels: np.ndarray) -> float:
    """Largest t with cost + price of the own cluster + t <= that of every other one, by linear programming."""
    items, clusters = costs.shape
    rows, limits = [], []
    for item in range(items):
        for other in range(clusters):
            if other != labels[item]:
                row = np.zeros(clusters + 1)
                row[labels[item]], row[other], row[-1] = 1, -1, 1
                rows.append(row)
                limits.append(costs[item, other] - costs[item, labels[item]])
    goal = np.append(np.zeros(clusters), -1)
    bounds = [(0, 0), *[(None, None)] * clusters]
    return float(-linprog(goal, np.array(rows), np.array(limits), bounds=bounds).fun)


@pytest.mark.parametrize("seed", range(25))
def test_interior_prices_give_the_labels_back_by_the_widest_margin(seed: int) -> None:
    generator = np.random.default_rng(seed)
    clusters = int(generator.integers(2, 7))
    costs = generator.normal(size=(int(generator.integers(clusters, 40)), clusters))
    labels = balanced_assignment(costs).labels
    total = costs + interior_prices(costs, labels)
    np.testing.assert_array_equal(total.argmin(axis=1), labels)
    two = np.partition(total, 1, axis=1)
    margin = (two[:, 1] - two[:, 0]).min()
    best = widest_margin(costs, labels)
    assert 0.49 * best <= margin <= best + 1e-9


def test_interior_prices_of_one_cluster() -> None:
    assert interior_prices(np.ones((3, 1)), np.zeros(3, dtype=int)).tolist() == [0]
