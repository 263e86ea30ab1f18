"""Intervals: over many draws from a known law, nine in ten hold the truth."""

import numpy as np
import pytest
from law_worlds import PEAK, QUALITY, World, peaked, world
from published_laws import movielens

from llmrec.exceptions import DataError
from llmrec.scaling.additive import Grid
from llmrec.scaling.bootstrap import percentiles, resample
from llmrec.scaling.chinchilla import ChinchillaLaw
from llmrec.scaling.law import ScalingLaw
from llmrec.scaling.performance_law import PerformanceLaw
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.power_law import PowerLaw

DRAWS = 200


def covered(found: World, noise: float, seed: int) -> dict[str, float]:
    """The share of draws whose 90 % intervals hold the truth: of the optimum, a parameter, the law, a training."""
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(("depth", "width", "w4", "law", "training"), 0)
    place = (20.0, 100.0, 1e6 * QUALITY)  # none of the grid
    for draw in range(DRAWS):
        points = found.draw(noise, rng)
        law = PerformanceLaw.fit(points)
        resampled = resample(law.fitted, Grid.of(points), 120, seed=draw)
        drawn = law.peaks(resampled.parameters)
        drawn["w4"] = law.spelt(resampled.parameters)["w4"]
        drawn["law"] = law.predict_many(resampled.parameters, *place)
        drawn["training"] = drawn["law"] + resampled.noise
        truth = PEAK | {"w4": -np.log(2) / np.log(50), "law": float(peaked(*place))}
        truth["training"] = truth["law"] + noise * rng.normal()
        for name, values in drawn.items():
            low, high = percentiles(values)
            hits[name] += bool(low <= truth[name] <= high)
    return {name: hit / DRAWS for name, hit in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "noise"),
    [
        # 12 cells for 5 parameters, and 18 for 6.
        (world(peaked, widths=(16, 48, 128), tokens=(1e6,), seeds=2), 0.002),
        (world(peaked, depths=(2, 5, 16), widths=(16, 48, 128), tokens=(5e5, 1e6), seeds=1), 0.001),
    ],
    ids=["one-data-set", "two-data-sets"],
)
def test_nine_in_ten_intervals_hold_the_truth(found: World, noise: float) -> None:
    shares = covered(found, noise, seed=11)
    assert all(0.85 <= share <= 0.95 for share in shares.values()), shares


def test_intervals_are_those_of_students_t_where_the_law_is_linear() -> None:
    """Two depths and two widths leave slopes alone: linear regression, whose intervals are known exactly."""
    found = world(peaked, depths=(2, 8), widths=(16, 64), tokens=(1e6,), seeds=1)
    rng = np.random.default_rng(3)
    metric = 0.2 + 0.01 * np.log(found.depth) + 0.02 * np.log(found.width) + 0.004 * rng.normal(size=4)
    points = ScalingPoints(found.depth, found.width, found.tokens, [0.2] * 4, metric)
    law, grid = PerformanceLaw.fit(points), Grid.of(points)
    resampled = resample(law.fitted, grid, 20_000, seed=1)
    columns = np.stack([np.ones(4), np.log(grid.depth), np.log(grid.width)], axis=1)
    spread = np.sqrt(law.fitted.squares / (4 - 3) * np.linalg.inv(columns.T @ columns)[1, 1])
    # One degree of freedom: half of Student's t (Cauchy's distribution) lies within 1.
    low, high = percentiles(law.spelt(resampled.parameters)["depth_slope"], 0.5)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.45)  # residuals are two values of either sign
    low, high = percentiles(law.spelt(resampled.parameters)["depth_slope"], 0.9)
    assert (high - low) / 2 > 4 * spread  # 6.3 by Student, 1.6 without him


def test_a_seed_gives_the_same_intervals_and_another_seed_others() -> None:
    points = movielens("HR@10")
    law, grid = PerformanceLaw.fit(points), Grid.of(points)
    first = resample(law.fitted, grid, 40, seed=3).parameters
    assert np.array_equal(first, resample(law.fitted, grid, 40, seed=3).parameters)
    assert not np.array_equal(first, resample(law.fitted, grid, 40, seed=4).parameters)


def test_replicates_that_agree_on_what_the_law_misses_do_not_narrow_intervals() -> None:
    """A cell that the law misses is one deviation, be it measured once or eight times."""
    once = movielens("HR@10")
    columns = (once.depth, once.width, once.tokens, once.quality, once.metric)
    eight = ScalingPoints(*(np.repeat(values, 8) for values in columns), seed=np.tile(np.arange(8), 9))
    widths = []
    for points in (once, eight):
        law = PerformanceLaw.fit(points)
        resampled = resample(law.fitted, Grid.of(points), 400, seed=0)
        low, high = percentiles(law.peaks(resampled.parameters)["width"])
        widths.append(float(high - low))
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_what_is_not_a_number_may_be_anything() -> None:
    values = np.array([*range(1, 100), np.nan])
    low, high = percentiles(values)
    assert (low, high) == (pytest.approx(4, abs=1), pytest.approx(96, abs=1))
    values[:20] = np.nan
    assert [float(end) for end in percentiles(values)] == [-np.inf, np.inf]


def test_too_few_resamples_are_refused() -> None:
    points = movielens("HR@10")
    with pytest.raises(DataError, match="10 resamples have no 90 % interval"):
        resample(PerformanceLaw.fit(points).fitted, Grid.of(points), 10)


@pytest.mark.parametrize("law", [PowerLaw, ChinchillaLaw], ids=lambda law: law.name)
def test_the_fewest_cells_leave_one_over(law: type[ScalingLaw]) -> None:
    """A law that meets every cell whatever its noise would have intervals without width."""
    sizes = [(2, 16, 1e6), (2, 32, 5e5), (4, 16, 2.5e5), (4, 32, 1e6), (4, 16, 5e5)]
    depth, width, tokens = np.array(sizes, dtype=np.float64).T
    metric = 0.2 + 0.02 * np.log(depth) + 0.01 * np.log(width * tokens)
    metric += 0.003 * np.random.default_rng(1).normal(size=5)
    points = ScalingPoints(depth, width, tokens, [QUALITY] * 5, metric / 2)
    fitted, grid = law.fit(points).fitted, Grid.of(points)
    assert len(fitted.parameters) < len(grid)
    low, high = percentiles(resample(fitted, grid, 60).parameters[:, 0])
    assert high - low > 0.001
    assert "effective_slope" in law.fit(points).parameters
