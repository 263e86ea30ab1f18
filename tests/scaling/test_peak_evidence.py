"""Peaks are found where there are any, and not where a metric only rises ever more slowly."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from law_worlds import World, flat, peaked, power, world
from published_laws import movielens
from scipy.stats import t

from llmrec.scaling.additive import AdditiveForm, Grid
from llmrec.scaling.evidence import chance, chance_of_end, evidence
from llmrec.scaling.fitting import fit_form
from llmrec.scaling.performance_law import PerformanceLaw
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.verdict import form_of

SMALL = {"widths": (16, 32, 64), "tokens": (1e6,)}


def forms(found: World, noise: float, draws: int) -> Counter[str]:
    rng = np.random.default_rng(7)
    said: Counter[str] = Counter()
    for draw in range(draws):
        points = found.draw(noise, rng)
        said[form_of(evidence(PerformanceLaw.fit(points).fitted, Grid.of(points), draw, draws=79))] += 1
    return said


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.001, 0.006])
def test_a_power_law_world_is_not_mistaken_for_a_peaked_one(noise: float) -> None:
    said = forms(world(power, **SMALL), noise, 20)
    assert said["power law"] >= 18, said
    assert said["peaked"] <= 2, said


@pytest.mark.slow
def test_a_peaked_world_is_found_where_noise_allows() -> None:
    assert forms(world(peaked, tokens=(1e6,)), 0.001, 10)["peaked"] == 10
    assert forms(world(peaked, tokens=(1e6,)), 0.05, 10)["peaked"] <= 2  # nothing is to be seen


@pytest.mark.slow
def test_a_flat_world_is_flat() -> None:
    assert forms(world(flat, **SMALL), 0.003, 20)["flat"] >= 16


def test_a_falling_axis_is_no_peak() -> None:
    falling = world(lambda h, d, data: 0.3 - 0.02 * h**0.5 - 0.3 / d, **SMALL)
    points = falling.draw(0.001, np.random.default_rng(0))
    found = evidence(PerformanceLaw.fit(points).fitted, Grid.of(points))
    assert {axis: entry.kind for axis, entry in found.items()} == {"depth": "falling", "width": "rising"}
    assert form_of(found) == "power law"
    assert form_of({"depth": found["depth"]}) == "falling"


def test_the_published_points_have_a_peak_of_width_alone() -> None:
    points = movielens("NDCG@10")
    found = evidence(PerformanceLaw.fit(points).fitted, Grid.of(points))
    assert found["width"].kind == "peaked"
    assert found["depth"].kind == "flat"
    assert form_of(found) == "peaked"


def test_two_values_of_an_axis_tell_no_peak() -> None:
    points = world(peaked, depths=(2, 6), tokens=(1e6,)).draw(0.0005, np.random.default_rng(0))
    found = evidence(PerformanceLaw.fit(points).fitted, Grid.of(points))
    assert (found["depth"].kind, found["depth"].peak_p) == ("rising", None)
    assert found["width"].kind == "peaked"


def test_both_axes_are_corrected_for() -> None:
    """Holm: the smaller of two p-values counts twice."""
    points = world(peaked, tokens=(1e6,)).draw(0.001, np.random.default_rng(0))
    found = evidence(PerformanceLaw.fit(points).fitted, Grid.of(points))
    assert {entry.peak_p for entry in found.values()} == {2 / 200}  # two times the least share of 200


def plateau(depth: npt.ArrayLike, width: npt.ArrayLike, effective: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """It rises with ln width to 48, and then stays."""
    h, d = np.log(np.asarray(depth, dtype=np.float64)), np.log(np.asarray(width, dtype=np.float64))
    return np.asarray(0.1 + 0.05 * np.minimum(d - np.log(16), np.log(3)) + 0.02 * h)


@pytest.mark.slow
def test_what_rises_and_then_stays_has_no_peak() -> None:
    rng = np.random.default_rng(3)
    kinds: Counter[str] = Counter()
    for draw in range(12):
        points = world(plateau, tokens=(1e6,)).draw(0.001, rng)
        kinds[evidence(PerformanceLaw.fit(points).fitted, Grid.of(points), draw, draws=79)["width"].kind] += 1
    assert kinds["rising"] >= 10, kinds


def test_the_end_is_compared_with_the_best_by_student() -> None:
    """Against a two-sample t with the law's spread, on a full grid of equal counts."""
    points = world(peaked, tokens=(1e6,)).draw(0.004, np.random.default_rng(2))
    grid, fitted = Grid.of(points), PerformanceLaw.fit(points).fitted
    means = {width: grid.mean[grid.width == width].mean() for width in (16, 32, 64, 128)}
    fall = max(means[16], means[32], means[64]) - means[128]
    freedom = len(grid) - 5
    spread = np.sqrt(fitted.squares / freedom * 2 / 8)  # four cells of two seeds on either side
    assert chance_of_end("width", fitted, grid) == pytest.approx(t.sf(fall / spread, freedom), rel=1e-6)
    rising = world(power, tokens=(1e6,)).draw(0.001, np.random.default_rng(0))
    assert chance_of_end("width", PerformanceLaw.fit(rising).fitted, Grid.of(rising)) == 1


def test_sizes_that_no_cells_compare_are_left_to_the_other_test() -> None:
    depth, width = [2, 2, 4, 4, 8, 8, 16, 16, 6], [10, 20, 30, 40, 50, 60, 70, 80, 90]
    metric = 0.1 + np.linspace(0, 0.01, 9)[[0, 2, 4, 6, 8, 7, 5, 3, 1]]
    points = ScalingPoints(depth, width, [1e6] * 9, [0.2] * 9, metric)
    assert chance_of_end("width", PerformanceLaw.fit(points).fitted, Grid.of(points)) == 0


@pytest.mark.slow
def test_chances_are_uniform_where_the_null_holds() -> None:
    """A p-value below 0.1 comes up in one of ten draws of the null."""
    rng = np.random.default_rng(5)
    found = world(lambda h, d, data: 0.2 + 0.01 * np.log(d) + 0 * h, **SMALL)
    p_values = []
    for draw in range(60):
        points = found.draw(0.003, rng)
        grid, fitted = Grid.of(points), PerformanceLaw.fit(points).fitted
        without = fit_form(AdditiveForm(fitted.form.terms[1:]), grid)
        p_values.append(chance(without, fitted, grid, draw, draws=49))
    assert 1 <= np.count_nonzero(np.array(p_values) <= 0.1) <= 13
    assert 18 <= np.count_nonzero(np.array(p_values) <= 0.5) <= 42


def test_a_perfect_fit_is_no_accident() -> None:
    points = world(peaked, tokens=(1e6,), seeds=1).draw(0.0, np.random.default_rng(0))
    assert isinstance(points, ScalingPoints)
    found = evidence(PerformanceLaw.fit(points).fitted, Grid.of(points))
    assert {entry.kind for entry in found.values()} == {"peaked"}
