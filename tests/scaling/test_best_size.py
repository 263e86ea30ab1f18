"""Optima under constraints are those of a search through all whole sizes; nothing is told from too far away."""

import numpy as np
import pytest
from law_worlds import PEAK, QUALITY, peaked, power, world

from llmrec.exceptions import DataError
from llmrec.scaling.additive import Grid
from llmrec.scaling.bootstrap import resample
from llmrec.scaling.law import ScalingLaw
from llmrec.scaling.optimum import Budget, Optimum, best_size
from llmrec.scaling.performance_law import PerformanceLaw
from llmrec.scaling.power_law import PowerLaw
from llmrec.scaling.reach import Reach

DATA = 1e6 * QUALITY


def found(law: type[ScalingLaw] = PerformanceLaw, truth=peaked, **constraint: object) -> tuple[ScalingLaw, Optimum]:  # type: ignore[no-untyped-def]
    points = world(truth).draw(0.001, np.random.default_rng(3))
    fitted, grid = law.fit(points), Grid.of(points)
    resampled = resample(fitted.fitted, grid, 60)
    return fitted, best_size(fitted, resampled, Reach.of(grid), DATA, **constraint)  # type: ignore[arg-type]


def weights(depths: np.ndarray, widths: np.ndarray) -> np.ndarray:
    return 12 * depths * widths**2 + 1000 * widths


def test_without_a_constraint_it_is_the_closed_form() -> None:
    law, best = found()
    assert isinstance(law, PerformanceLaw)
    assert best.depth == round(law.peak["depth"])
    assert best.width == pytest.approx(law.peak["width"], rel=0.02)
    assert best.metric == pytest.approx(float(law.predict(best.depth, best.width, DATA)))
    assert best.at_end == {}
    for (low, high), axis in ((best.depth_interval, "depth"), (best.width_interval, "width")):
        assert low - 1 <= PEAK[axis] <= high + 1
    assert best.metric_interval[0] < best.metric < best.metric_interval[1]
    assert best.document()["interval"]["depth"] == list(best.depth_interval)


@pytest.mark.parametrize("most", [40_000, 150_000, 10_000_000])
@pytest.mark.parametrize("multiple", [1, 8])
def test_under_a_budget_it_is_the_best_of_all_sizes(most: int, multiple: int) -> None:
    law, best = found(budget=Budget(weights, most, multiple_of=multiple))
    depths, widths = np.meshgrid(np.arange(1, 49), np.arange(6, 385), indexing="ij")
    allowed = (weights(depths, widths) <= most) & (widths % multiple == 0)
    metric = np.where(allowed, law.predict(depths, widths, DATA), -1)
    assert best.width % multiple == 0
    assert best.cost == weights(np.array(best.depth), np.array(best.width))
    assert best.cost <= most
    assert best.metric == pytest.approx(metric.max(), abs=2e-6)  # widths are thinned to 160
    if most == 10_000_000:
        assert best.depth == round(PEAK["depth"])
    else:
        assert best.width < 45


@pytest.mark.parametrize("size", [100, 300, 1500])
def test_with_a_fixed_product_it_is_the_best_of_all_depths(size: int) -> None:
    law, best = found(size=size)
    depths = np.arange(1, 49)
    widths = np.rint(size / depths)
    metric = np.where((widths >= 16 / 3) & (widths <= 384), law.predict(depths, widths, DATA), -1)
    assert best.depth == depths[metric.argmax()]
    assert best.width == widths[metric.argmax()]
    assert best.depth * best.width == pytest.approx(size, rel=0.1)


def test_with_a_fixed_depth_the_width_is_that_of_the_closed_form() -> None:
    law, best = found(depth=12)
    assert isinstance(law, PerformanceLaw)
    assert (best.depth, best.depth_interval) == (12, (12, 12))
    assert best.width == pytest.approx(law.peak["width"], rel=0.02)
    assert best.metric < found()[1].metric


def test_a_law_that_only_rises_is_best_at_the_end_of_its_reach_and_says_so() -> None:
    _, best = found(PowerLaw, power)
    assert (best.depth, best.width) == (48, 384)
    assert best.at_end == {"depth": "high", "width": "high"}
    _, bound = found(PowerLaw, power, budget=Budget(weights, 100_000))
    assert bound.at_end == {}
    assert found(PowerLaw, power, force=True)[1].width == 128 * 9
    _, heads = found(PowerLaw, power, budget=Budget(weights, 1e9, multiple_of=5))
    assert (heads.width, heads.at_end) == (380, {"depth": "high", "width": "high"})


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(DataError, match=r"costs 6,432 parameters, above the budget of 100. Raise the budget"):
        found(budget=Budget(weights, 100))
    with pytest.raises(DataError, match="No width from 6 to 384 is a multiple of 500"):
        found(budget=Budget(weights, 1e9, multiple_of=500))
    with pytest.raises(DataError, match=r"No depth .* for depth \* width = 100000"):
        found(size=100_000)
    with pytest.raises(DataError, match="given together"):
        found(size=100, depth=4)
    with pytest.raises(DataError, match=r"The depth 60 is more than 3 times beyond the points.*2 to 16"):
        found(depth=60)
    with pytest.raises(DataError, match="not finite"):
        found(budget=Budget(lambda depths, widths: depths * np.nan, 100))
    assert found(depth=60, force=True)[1].depth == 60


def test_reach_is_three_times_the_grid_on_every_axis() -> None:
    reach = Reach.of(Grid.of(world(peaked).draw(0.0, np.random.default_rng(0))))
    assert reach.bounds("depth") == (pytest.approx(2 / 3), 48)
    low, high = 2.5e5 * QUALITY / 3, 3e6 * QUALITY
    assert reach.bounds("effective") == (pytest.approx(low), pytest.approx(high))
    reach.require(depth=48, width=16 / 3, effective=high, negatives=99)
    for axis, value in (("depth", 48.1), ("width", 5.3), ("effective", high * 1.01), ("effective", low * 0.99)):
        with pytest.raises(DataError, match="more than 3 times beyond the points"):
            reach.require(**{axis: value})
        reach.require(force=True, **{axis: value})
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="Give a number above 0"):
            reach.require(force=True, width=value)
    assert reach.whole("depth", 100).tolist() == list(range(1, 49))
    thinned = reach.whole("width", 10)
    assert (thinned[0], thinned[-1], len(thinned)) == (6, 384, 10)
