import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from llmrec.evaluation.probability import auc, calibration, log_loss, user_auc
from llmrec.exceptions import DataError

impressions = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([-1.5, 0.0, -0.0, 2.0, math.inf]), st.integers(0, 3)),
    min_size=1,
    max_size=15,
)


def pair_by_pair(labels, scores):
    """None if a label is missing."""
    positive = [s for label, s in zip(labels, scores, strict=True) if label]
    negative = [s for label, s in zip(labels, scores, strict=True) if not label]
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative)) if positive and negative else None


@given(impressions)
def test_auc_equals_its_definition_per_user_and_over_all(drawn):
    labels, scores, users = (list(column) for column in zip(*drawn, strict=True))
    whole = pair_by_pair(labels, scores)
    if whole is None:
        with pytest.raises(DataError, match="no pairs to order"):
            auc(labels, scores)
    else:
        assert auc(labels, scores) == pytest.approx(whole)
    by_user = {}
    for user in sorted(set(users)):
        mine = [place for place, other in enumerate(users) if other == user]
        one = pair_by_pair([labels[m] for m in mine], [scores[m] for m in mine])
        if one is not None:
            by_user[user] = one, len(mine)
    if not by_user:
        with pytest.raises(DataError, match="users has both labels"):
            user_auc(labels, scores, users)
        return
    found = user_auc(labels, scores, users)
    assert found.users.tolist() == list(by_user)
    assert found.values == pytest.approx([value for value, _ in by_user.values()])
    assert found.impressions.tolist() == [size for _, size in by_user.values()]
    assert found.mean == pytest.approx(sum(value for value, _ in by_user.values()) / len(by_user))
    sizes = sum(size for _, size in by_user.values())
    assert found.weighted == pytest.approx(sum(value * size for value, size in by_user.values()) / sizes)
    assert found.skipped_users == pytest.approx(1 - len(by_user) / len(set(users)))
    assert found.skipped_impressions == pytest.approx(1 - sizes / len(users))


def test_auc_agrees_with_scikit_learn_and_with_ranks():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for decimals in (1, 8):
        labels, scores = rng.random(2000) < 0.2, rng.random(2000).round(decimals)
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        ones = labels.sum()
        statistic = rankdata(scores)[labels].sum() - ones * (ones + 1) / 2
        assert auc(labels, scores) == pytest.approx(statistic / (ones * (2000 - ones)), abs=1e-12)


def test_user_auc_by_hand():
    # a: one of two pairs right, b: one tied pair, c: one label only.
    labels, scores = [1, 0, 0, 1, 0, 1], [0.5, 0.1, 0.9, 0.3, 0.3, 0.7]
    found = user_auc(labels, scores, ["a", "a", "a", "b", "b", "c"])
    assert (found.users.tolist(), found.values.tolist()) == (["a", "b"], [0.5, 0.5])
    found = user_auc(labels[:5], [0.95, 0.1, 0.9, 0.3, 0.3], ["a", "a", "a", "b", "b"])
    assert (found.mean, found.weighted) == (0.75, (3 * 1 + 2 * 0.5) / 5)
    assert (found.skipped_users, found.skipped_impressions) == (0, 0)


def test_user_auc_does_not_care_how_scores_differ_between_users():
    rng = np.random.default_rng(2)
    labels, scores, users = rng.random(500) < 0.3, rng.random(500).round(1), rng.integers(0, 40, size=500)
    moved = scores + 100.0 * rng.permutation(40)[users]
    assert user_auc(labels, moved, users).values == pytest.approx(user_auc(labels, scores, users).values)
    assert auc(labels, moved) != pytest.approx(auc(labels, scores), abs=1e-3)


def test_log_loss_by_hand_and_with_scikit_learn():
    from sklearn.metrics import log_loss as theirs

    assert log_loss([1, 0, 0], [0.5, 0.75, 0.0]) == pytest.approx((math.log(2) + math.log(4)) / 3, abs=1e-6)
    assert log_loss([1, 0], [0.0, 1.0]) == pytest.approx(7 * math.log(10))
    assert log_loss([1, 0], [0.0, 1.0], clip=0.01) == pytest.approx(2 * math.log(10))
    rng = np.random.default_rng(0)
    labels, probabilities = rng.random(500) < 0.2, rng.uniform(0.01, 0.99, size=500)
    assert log_loss(labels, probabilities) == pytest.approx(theirs(labels, probabilities), abs=1e-12)


def bin_by_bin(labels, probabilities, edges):
    """(count, mean probability, share of ones) of every bin that holds one."""
    table = []
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        last = place == len(edges) - 2
        mine = [i for i, p in enumerate(probabilities) if low <= p and (p < high or (last and p <= high))]
        if mine:
            predicted, observed = (sum(column[i] for i in mine) / len(mine) for column in (probabilities, labels))
            table.append((len(mine), predicted, observed))
    return table


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from(["width", "mass"]),
)
def test_calibration_equals_its_definition(drawn, bins, by):
    labels, probabilities = [label for label, _ in drawn], [number / 20 for _, number in drawn]
    edges = [place / bins for place in range(bins + 1)]
    if by == "mass":
        edges = np.quantile(probabilities, edges).tolist()
    table = bin_by_bin(labels, probabilities, edges)
    found = calibration(labels, probabilities, bins, by)
    assert found.counts.tolist() == [count for count, _, _ in table]
    assert found.predicted == pytest.approx([predicted for _, predicted, _ in table])
    assert found.observed == pytest.approx([observed for _, _, observed in table])
    assert (found.low <= found.predicted + 1e-12).all()
    assert (found.predicted <= found.high + 1e-12).all()
    error = sum(count * abs(observed - predicted) for count, predicted, observed in table) / len(labels)
    assert found.error == pytest.approx(error)


def test_calibration_agrees_with_torchmetrics_and_scikit_learn():
    import torch
    from sklearn.calibration import calibration_curve
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    probabilities = rng.random(3000) ** 2
    labels = rng.random(3000) < probabilities**1.5
    for bins in (1, 10, 15):
        expected = binary_calibration_error(torch.tensor(probabilities), torch.tensor(labels).int(), n_bins=bins)
        assert calibration(labels, probabilities, bins).error == pytest.approx(float(expected), abs=1e-6)
        for by, strategy in (("width", "uniform"), ("mass", "quantile")):
            found = calibration(labels, probabilities, bins, by)
            observed, predicted = calibration_curve(labels, probabilities, n_bins=bins, strategy=strategy)
            assert found.observed == pytest.approx(observed)
            assert found.predicted == pytest.approx(predicted)


def test_bins_of_equal_mass_hold_equally_many():
    probabilities = np.random.default_rng(0).random(1000) ** 4 / 10
    assert calibration(probabilities > 0.05, probabilities, 8, by="mass").counts.tolist() == [125] * 8
    assert calibration(probabilities > 0.05, probabilities, 8).counts.tolist() == [1000]


def test_true_probabilities_are_calibrated_and_distorted_ones_are_not():
    rng = np.random.default_rng(0)
    probabilities = rng.random(20000)
    labels = rng.random(20000) < probabilities
    assert calibration(labels, probabilities).error < 0.015
    assert calibration(labels, probabilities**2).error > 0.1


def test_bad_inputs():
    for function in (auc, log_loss, calibration, lambda *both: user_auc(*both, [0] * len(both[0]))):
        with pytest.raises(DataError, match=r"1 label\(s\) are neither 0 nor 1, such as 5"):
            function([0, 5], [0.1, 0.2])
        with pytest.raises(DataError, match=r"1 score\(s\) are .* nan of impression 1"):
            function([0, 1], [0.1, math.nan])
        with pytest.raises(DataError, match=r"shape \(1,\) and scores \(2,\)"):
            function([0], [0.1, 0.2])
        with pytest.raises(DataError, match="at least one impression"):
            function([], [])
    for function in (log_loss, calibration):
        with pytest.raises(DataError, match=r"1 score\(s\) are no probabilities, such as 1.5 of impression 0"):
            function([0, 1], [1.5, 0.5])
    with pytest.raises(DataError, match=r"\(1,\) users do not fit 2"):
        user_auc([0, 1], [0.1, 0.2], [3])
    for clip in (0, 0.5, -1):
        with pytest.raises(DataError, match="cannot be clipped"):
            log_loss([0], [0.5], clip)
    for wrong in ({"bins": 0}, {"by": "count"}):
        with pytest.raises(DataError, match="cannot be made"):
            calibration([0], [0.5], **wrong)
