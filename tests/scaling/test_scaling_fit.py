"""The whole of a fit: which law predicts, what is determined, what doubling adds, and the words for it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from law_worlds import PEAK, QUALITY, flat, peaked, power, world
from published_laws import movielens

from llmrec.exceptions import DataError
from llmrec.scaling.fit_document import fit_document, summary
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.scaling_fit import ScalingFit
from llmrec.scaling.verdict import Gain, advice_of
from llmrec.storage import write_json


@pytest.fixture(scope="module")
def found() -> ScalingFit:
    return ScalingFit.of(world(peaked).draw(0.001, np.random.default_rng(0)), resamples=200)


@pytest.fixture(scope="module")
def rising() -> ScalingFit:
    return ScalingFit.of(world(power).draw(0.001, np.random.default_rng(0)), resamples=100)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in numbers(entry)]
    return [value] if isinstance(value, float) else []


def test_a_peaked_world(found: ScalingFit) -> None:
    document = fit_document(found)
    assert (document["form"], document["chosen"], document["advice"]) == ("peaked", "performance_law", "more data")
    assert document["determined"] == {"depth": True, "width": True, "data": True, "negatives": False}
    assert document["reasons"] == []
    for axis, truth in PEAK.items():
        low, high = document["interval"][axis]
        assert low < document["optimum"][axis] < high
        assert 0.95 * low < truth < 1.05 * high
        assert document["interval"]["open"][axis] == [False, False]
    assert document["r2"] > document["power_law"]["r2"] > document["chinchilla"]["r2"]
    assert document["leave_one_out"]["mae"] < document["power_law"]["leave_one_out"]["mae"]
    assert document["verdict"].startswith("peaked: depth is best near 6; width is best near 5")
    assert "More data help most." in document["verdict"]
    assert document["interval"]["metric"][0] < document["optimum"]["metric"] < document["interval"]["metric"][1]
    low, high = document["interval"]["parameters"]["w5"]
    assert low < 0.02 < high
    assert "R² 0.99" in summary(document)
    assert (document["n"], len(document["cells"]), len(document["points"])) == (96, 48, 96)
    cell = document["cells"][0]
    assert cell["performance_law"] == pytest.approx(peaked(cell["depth"], cell["width"], cell["effective"]), abs=1e-3)


def test_gains_of_doubling_are_differences_of_predictions(found: ScalingFit) -> None:
    data = 1e6 * QUALITY
    depth, width = found.base
    assert depth in (4, 8)
    assert width == 64
    law, gains = found.performance_law, found.gains()
    here = law.predict(depth, width, data)
    wanted = {
        "data": law.predict(depth, width, 2 * data) - here,
        "depth": law.predict(2 * depth, width, data) - here,
        "width": law.predict(depth, 2 * width, data) - here,
    }
    assert {name: gain.value for name, gain in gains.items()} == pytest.approx(wanted)
    for gain in gains.values():
        assert gain.low < gain.value < gain.high
    truth = peaked(depth, width, 2 * data) - peaked(depth, width, data)
    assert gains["data"].low < truth < gains["data"].high
    # What leaves the reach is not told: 3 times the grid's width of 128 is 384.
    assert "width" not in found.gains(base=(4.0, 200.0))
    assert "width" in found.gains(base=(4.0, 200.0), force=True)
    assert "depth" in found.gains("power_law")


def test_a_power_law_world(rising: ScalingFit) -> None:
    document = fit_document(rising)
    assert (document["form"], document["chosen"]) == ("power law", "power_law")
    assert document["determined"]["depth"] is document["determined"]["width"] is False
    assert "peaked" not in document["verdict"]
    assert all("may be larger than" in reason and "Add" in reason for reason in document["reasons"])
    assert document["power_law"]["r2"] > document["r2"]


def test_predictions_hold_the_measured_value(found: ScalingFit, rising: ScalingFit) -> None:
    for fit, truth in ((found, peaked), (rising, power)):
        said = fit.predict(24, 160, 1.2e6 * QUALITY)
        chosen = said[said["chosen"]]
        low, high = chosen["interval"]
        assert low < chosen["metric"] < high
        assert low - 0.001 < truth(24, 160, 1.2e6 * QUALITY) < high + 0.001
        assert chosen["run_interval"][1] - chosen["run_interval"][0] > high - low
    with pytest.raises(DataError, match="depth 49 is more than 3 times beyond"):
        found.predict(49, 64, 1e5)
    assert math.isfinite(found.predict(49, 64, 1e5, force=True)["power_law"]["metric"])
    with pytest.raises(DataError, match="no finite value"):
        found.predict(10**300, 64, 1e5, force=True)
    assert found.best().depth == 6
    assert found.best(name="power_law").at_end


def test_a_flat_world() -> None:
    document = fit_document(ScalingFit.of(world(flat).draw(0.002, np.random.default_rng(1)), resamples=60))
    assert (document["form"], document["advice"]) == ("flat", "neither")
    assert "Neither more data nor a bigger model" in document["verdict"]
    assert sum("no difference that can be told from chance" in reason for reason in document["reasons"]) == 2
    assert all(math.isfinite(number) for number in numbers(document))


def test_the_published_points() -> None:
    document = fit_document(ScalingFit.of(movielens("HR@10"), resamples=300))
    assert document["r2"] == pytest.approx(0.888, abs=1e-3)
    assert document["power_law"]["r2"] == pytest.approx(0.415, abs=2e-3)
    assert document["optimum"]["width"] == pytest.approx(50, abs=1)
    assert document["interval"]["width"][0] < 50 < document["interval"]["width"][1]
    assert document["determined"] == {"depth": False, "width": True, "data": False, "negatives": False}
    assert document["interval"]["open"]["depth"] == [True, True]
    assert "data" not in document["gains"]
    assert "not known" in document["verdict"]
    assert any("same effective data" in reason for reason in document["reasons"])
    assert all(math.isfinite(number) for number in numbers(document))


def test_two_depths_determine_no_best_depth() -> None:
    points = world(peaked, depths=(2, 6), tokens=(1e6,)).draw(0.0005, np.random.default_rng(0))
    document = fit_document(ScalingFit.of(points, resamples=60))
    assert document["optimum"]["depth"] is None
    assert document["optimum"]["metric"] is None
    assert document["determined"]["depth"] is False
    assert any("have 2 values of it. Add a third" in reason for reason in document["reasons"])


def test_negatives_have_a_gain_where_they_differ() -> None:
    base = world(peaked, tokens=(1e6,)).draw(0.0005, np.random.default_rng(0))
    columns = [np.concatenate([values] * 2) for values in (base.depth, base.width, base.tokens, base.quality)]
    metric = np.concatenate([base.metric, base.metric + 0.02])
    fit = ScalingFit.of(ScalingPoints(*columns, metric, negatives=np.repeat([64.0, 512.0], len(base))), 60)
    document = fit_document(fit)
    assert document["determined"]["negatives"] is True
    assert document["gains"]["negatives"]["gain"] == pytest.approx(0.02 / 3, rel=0.1)
    assert document["advice"] == "more negatives"
    assert fit.predict(4, 32, 1e6 * QUALITY)["performance_law"]["metric"] == pytest.approx(
        fit.predict(4, 32, 1e6 * QUALITY, 512)["performance_law"]["metric"]
    )


def test_a_document_is_read_back_as_the_same_fit(tmp_path: Path) -> None:
    points = world(peaked, tokens=(1e6,)).draw(0.001, np.random.default_rng(0))
    document = fit_document(ScalingFit.of(points, resamples=40, seed=3))
    write_json(tmp_path / "fit.json", document | {"encoder": "hstu"})
    again = ScalingFit.load(tmp_path / "fit.json")
    assert again.points.encoder == "hstu"
    assert fit_document(again) == document | {"encoder": "hstu"}
    for text in ("{}", "[1]", "no json", json.dumps({"points": 3, "resamples": 20, "seed": 0})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match="is not what `llmrec scale fit` writes"):
            ScalingFit.load(tmp_path / "other.json")
    for wrong in ({"seed": -1}, {"encoder": ["hstu"]}, {"resamples": math.inf}):
        (tmp_path / "other.json").write_text(json.dumps(document | wrong))
        with pytest.raises(DataError, match="is not what `llmrec scale fit` writes"):
            ScalingFit.load(tmp_path / "other.json")
    with pytest.raises(DataError, match="There is no file"):
        ScalingFit.load(tmp_path / "none.json")


def test_losses_that_come_late_are_read_back(tmp_path: Path) -> None:
    points = world(peaked, seeds=3).draw(0.001, np.random.default_rng(0))
    loss = np.where(np.arange(len(points)) < 120, np.nan, 3.5)
    fit = ScalingFit.of(replace(points, loss=loss), resamples=20)
    document = {"points": fit.points.records(), "resamples": 20, "seed": 0}
    write_json(tmp_path / "fit.json", document)
    found = ScalingFit.load(tmp_path / "fit.json").points.loss
    assert found is not None
    assert np.array_equal(found, loss, equal_nan=True)


def test_advice_is_the_largest_gain_that_is_sure() -> None:
    sure, unsure, loss = Gain(0.01, 0.005, 0.02), Gain(0.05, -0.01, 0.1), Gain(-0.02, -0.03, -0.01)
    assert advice_of({"data": unsure, "depth": loss}) == "neither"
    assert advice_of({"data": sure, "depth": unsure}) == "more data"
    assert advice_of({"data": sure, "depth": Gain(0.02, 0.01, 0.03)}) == "bigger model"
    assert advice_of({"data": unsure, "width": sure}) == "bigger model"
    assert advice_of({"negatives": sure, "depth": loss}) == "more negatives"
