"""Sinkhorn-Knopp: an entropic transport plan from items to codes, each item and each code with an equal share."""

from typing import Final

import numpy as np
import numpy.typing as npt

EPSILON: Final = 0.003
ITERATIONS: Final = 50
# Entries of a plan this close to a row's largest, relatively, count as equal to it.
EQUAL: Final = 1e-9


def sinkhorn(
    costs: npt.NDArray[np.float64], epsilon: float = EPSILON, iterations: int = ITERATIONS
) -> npt.NDArray[np.float64]:
    """The plan after some iterations, in logarithms, so that no entry underflows.

    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (NeurIPS 2013). Each iteration scales
    every row to the sum 1, then every column to n / K: rows are items, columns codes, which shall be used equally.

    Args:
        costs: (..., n, K); leading axes are problems of their own.
        epsilon: the temperature, in units of the costs.
        iterations: of rows and columns, at least 1.

    Returns:
        (..., n, K) logarithms of the plan: its columns sum to n / K, its rows to 1 as far as it has converged.

    >>> np.exp(sinkhorn(np.array([[0.0, 0.5], [0.1, 0.5]]), epsilon=0.05)).round(2).tolist()
    [[0.73, 0.27], [0.27, 0.73]]
    """
    kernel = -costs / epsilon
    share = np.log(kernel.shape[-2] / kernel.shape[-1])
    columns = np.zeros_like(kernel[..., 0, :])
    for _ in range(iterations):
        rows = -_log_sums(kernel + columns[..., None, :], axis=-1)
        columns = share - _log_sums(kernel + rows[..., :, None], axis=-2)
    return np.asarray(kernel + rows[..., :, None] + columns[..., None, :])


def uniform_mapping(
    costs: npt.NDArray[np.floating], epsilon: float = EPSILON, iterations: int = ITERATIONS
) -> npt.NDArray[np.int64]:
    """LC-Rec's uniform semantic mapping: (..., n, K) costs -> (..., n) the code with the most of each item's plan.

    Costs are first mapped onto [-1, 1], problem by problem, which gives epsilon its meaning. With fewer items than
    codes a plan splits every item over many codes of which it takes all there is, so their entries are equal but for
    rounding; of those the cheapest code is taken, of equally cheap ones the lowest. LC-Rec leaves that to rounding.
    A code that is the cheapest for all items, as where they collide, is split between them and mostly goes to none.

    Source: Zheng et al., "Adapting Large Language Models by Integrating Collaborative Semantics for Recommendation"
    (LC-Rec, ICDE 2024), section III-B.

    >>> uniform_mapping(np.array([[0.0, 0.5, 2.0], [0.1, 0.5, 2.0], [0.2, 0.5, 1.8]])).tolist()
    [0, 1, 2]
    """
    wide: npt.NDArray[np.float64] = np.asarray(costs, dtype=np.float64)
    low, high = wide.min(axis=(-2, -1), keepdims=True), wide.max(axis=(-2, -1), keepdims=True)
    middle = (low + high) / 2
    spread = np.where(high > low, high - middle, 1)
    plan = sinkhorn((wide - middle) / spread, epsilon, iterations)
    leading = plan >= plan.max(axis=-1, keepdims=True) - EQUAL
    return np.asarray(np.where(leading, wide, np.inf).argmin(axis=-1), dtype=np.int64)


def _log_sums(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """log(sum(exp(values))) along an axis; `values` is spent."""
    largest = values.max(axis=axis, keepdims=True)
    values -= largest
    np.exp(values, out=values)
    return np.asarray(np.log(values.sum(axis=axis)) + largest.squeeze(axis))
