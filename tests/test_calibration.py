"""Calibrators against the likelihood that they claim to maximise."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.metrics import log_loss

from llmrec.calibration import Calibrator, sigmoid
from llmrec.exceptions import DataError


def answers(seed: int, count: int = 200, slope: float = 0.5, intercept: float = -1.0):
    """Logits whose labels came true with probability sigmoid(slope * logit + intercept)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, count)
    return logits, (rng.random(count) < sigmoid(slope * logits + intercept)).astype(int)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_slope_and_intercept_are_the_likeliest(method, seed):
    logits, labels = answers(seed)
    found = Calibrator.fit(method, logits, labels)
    ones = labels.sum()
    aims = np.where(labels == 1, (ones + 1) / (ones + 2), 1 / (len(labels) - ones + 2))

    def loss(values):
        z = values[0] * logits + (values[1] if method == "platt" else 0.0)
        return float(np.sum(np.logaddexp(0, z) - aims * z))

    best = minimize(loss, [1.0, 0.0], method="BFGS", options={"gtol": 1e-9})
    assert found.slope == pytest.approx(best.x[0], abs=1e-5)
    if method == "platt":
        assert found.intercept == pytest.approx(best.x[1], abs=1e-5)
    else:
        assert found.intercept == 0.0


def test_it_finds_what_made_the_labels():
    found = Calibrator.fit("platt", *answers(0, 50_000))
    assert (found.slope, found.intercept) == (pytest.approx(0.5, abs=0.03), pytest.approx(-1.0, abs=0.06))
    logits, labels = answers(1, 20_000)
    raw = log_loss(labels, sigmoid(logits))
    for method in ("temperature", "platt", "isotonic"):
        assert log_loss(labels, Calibrator.fit(method, *answers(0, 50_000))(logits)) < raw - 0.05


def test_isotonic_is_the_best_rising_fit_by_pooling_neighbours():
    logits, labels = answers(3, 60)
    order = np.argsort(logits)
    blocks = [[float(label), 1] for label in labels[order]]
    place = 0
    while place + 1 < len(blocks):  # pool adjacent violators, by the definition
        if blocks[place][0] > blocks[place + 1][0]:
            (a, n), (b, m) = blocks[place], blocks.pop(place + 1)
            blocks[place] = [(a * n + b * m) / (n + m), n + m]
            place = max(place - 1, 0)
        else:
            place += 1
    expected = np.concatenate([[mean] * count for mean, count in blocks])
    found = Calibrator.fit("isotonic", logits, labels)
    assert found(logits[order]) == pytest.approx(expected)
    assert found([-1e9, 1e9]).tolist() == [expected[0], expected[-1]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=2, max_size=40),
    st.sampled_from(["temperature", "platt", "isotonic"]),
)
def test_any_answers_give_a_rising_map_that_survives_json(pairs, method):
    logits, labels = np.array([x for x, _ in pairs]), np.array([int(y) for _, y in pairs])
    if len(set(labels.tolist())) == 1:
        with pytest.raises(DataError, match="both kinds"):
            Calibrator.fit(method, logits, labels)
        return
    found = Calibrator.fit(method, logits, labels)
    values = found(np.linspace(-60, 60, 200))
    assert (np.diff(values) >= 0).all()
    assert ((values >= 0) & (values <= 1)).all()
    assert Calibrator.from_document(json.loads(json.dumps(found.document(), allow_nan=False))) == found


def test_divided_labels_have_a_finite_answer():
    found = Calibrator.fit("platt", [-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1])
    assert 0 < found.slope < 10
    assert found([-2.0])[0] > 0.01


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_an_order_worse_than_chance_becomes_flat_and_is_not_turned_round(method):
    found = Calibrator.fit(method, [3.0, 2.0, -2.0, -3.0, -1.0, -4.0], [0, 0, 1, 1, 1, 1])
    assert found.slope == 0.0
    # (5/6 * 4 + 1/4 * 2) / 6 of Platt's aims, or a half where there is no intercept
    assert found([9.0])[0] == pytest.approx((4 * 5 / 6 + 2 / 4) / 6 if method == "platt" else 0.5)


def test_what_is_no_calibration_is_refused():
    for logits, labels in (([0.0, np.nan], [0, 1]), ([0.0], [0, 1]), ([0.0, 1.0], [0, 2]), ([[0.0]], [[1]])):
        with pytest.raises(DataError, match="cannot be calibrated on"):
            Calibrator.fit("platt", logits, labels)
    with pytest.raises(DataError, match="no calibration 'beta'"):
        Calibrator.fit("beta", [0.0, 1.0], [0, 1])
    good = Calibrator.fit("isotonic", *answers(0)).document()
    for change in (
        {"method": "beta"},
        {"slope": -1.0},
        {"slope": "x"},
        {"slope": float("nan")},
        {"logits": []},
        {"logits": good["logits"][::-1]},
        {"probabilities": [2.0 for _ in good["logits"]]},
        {"logits": [], "probabilities": []},
    ):
        with pytest.raises(DataError, match="Fit it anew"):
            Calibrator.from_document(good | change)
    with pytest.raises(DataError, match="Fit it anew"):
        Calibrator.from_document({})


def test_sigmoid_has_no_overflow():
    with np.errstate(over="raise", invalid="raise"):
        assert sigmoid(np.array([-800.0, 0.0, 800.0])).tolist() == [0.0, 0.5, 1.0]
