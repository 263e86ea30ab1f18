import itertools
import math

import numpy as np
import pytest
from scipy import stats

from llmrec.evaluation.uncertainty import bootstrap_means, holm, over_seeds, paired_difference
from llmrec.exceptions import DataError


def clustered(rng, users, most=4):
    """Owners with 1 to `most` cases each, in mixed order, and a value per case that users share in part."""
    owner = rng.permutation(np.repeat(np.arange(users), rng.integers(1, most + 1, size=users)))
    return owner, rng.normal(size=users)[owner] + 0.5 * rng.normal(size=len(owner))


def test_every_resample_is_of_whole_users():
    # 3 users: all 27 draws are equally likely, and only their ratios of sums can come out.
    values, users = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), np.array([5, 5, 2, 2, 2, 9])
    possible = []
    for draw in itertools.product([2, 5, 9], repeat=3):
        taken = np.concatenate([values[users == user] for user in draw])
        possible.append(taken.mean())
    found = bootstrap_means(values[:, None], users, resamples=20000)
    assert found.mean[0] == pytest.approx(4 / 6)
    low, high = np.quantile(possible, [0.025, 0.975], method="inverted_cdf")
    assert found.low[0] == pytest.approx(low)
    assert found.high[0] == pytest.approx(high)


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(0)
    owner, values = clustered(rng, 60)
    sums, cases = np.bincount(owner, weights=values), np.bincount(owner)

    def ratio(sums, cases, axis):
        return sums.sum(axis=axis) / cases.sum(axis=axis)

    theirs = stats.bootstrap((sums, cases), ratio, paired=True, method="percentile", n_resamples=20000, rng=1)
    found = bootstrap_means(np.stack([values, -values], axis=1), owner, resamples=20000)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low[0] == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert found.high[0] == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)
    assert found.mean[1] == -found.mean[0]
    assert found.low[1] == pytest.approx(-found.high[0])  # the same resamples for all columns


def test_intervals_of_clustered_users_cover_the_truth():
    rng = np.random.default_rng(1)
    covered, covered_if_independent = 0, 0
    for _ in range(300):
        owner, values = clustered(rng, 80, most=8)
        found = bootstrap_means(values[:, None], owner, resamples=300)
        covered += found.low[0] <= 0 <= found.high[0]
        found = bootstrap_means(values[:, None], np.arange(len(owner)), resamples=300)
        covered_if_independent += found.low[0] <= 0 <= found.high[0]
    assert 0.90 <= covered / 300 <= 0.98
    assert covered_if_independent / 300 < 0.80


def test_user_names_and_the_order_of_cases_do_not_matter():
    rng = np.random.default_rng(2)
    owner, values = clustered(rng, 30)
    table = np.stack([values, values**2], axis=1)
    found = bootstrap_means(table, owner, resamples=100)
    order = rng.permutation(len(owner))
    names = np.array([f"user {number:03}" for number in owner])
    for other in (bootstrap_means(table[order], owner[order], 100), bootstrap_means(table, names, 100)):
        assert other.low == pytest.approx(found.low)
        assert other.high == pytest.approx(found.high)


def test_seeds_decide_and_memory_does_not(monkeypatch):
    owner, values = clustered(np.random.default_rng(3), 50)
    a, b = values[:, None], np.abs(values)[::-1, None] / 2
    whole, test = bootstrap_means(a, owner, 200), paired_difference(a, b, owner, 200)
    assert bootstrap_means(a, owner, 200, seed=1).low != whole.low
    assert paired_difference(a, b, owner, 200, seed=1).p_value != test.p_value
    monkeypatch.setattr("llmrec.evaluation.uncertainty._CHUNK_BYTES", 16 * 50 * 7)
    assert bootstrap_means(a, owner, 200).low == pytest.approx(whole.low)
    assert paired_difference(a, b, owner, 200).p_value == test.p_value


def test_constant_values_have_no_width():
    found = bootstrap_means(np.full((5, 1), 0.25), [0, 0, 1, 2, 2], 50)
    assert (found.mean.tolist(), found.low.tolist(), found.high.tolist()) == ([0.25], [0.25], [0.25])
    assert bootstrap_means([[0.0], [1.0]], [4, 4], 50).low.tolist() == [0.5]


def test_the_difference_has_the_interval_of_differences():
    rng = np.random.default_rng(4)
    owner, a = clustered(rng, 40)
    b = a + rng.normal(size=len(a))
    found = paired_difference(a[:, None], b[:, None], owner, resamples=300, seed=7)
    same = bootstrap_means((a - b)[:, None], owner, resamples=300, seed=7)
    assert (found.mean, found.low, found.high) == (same.mean, same.low, same.high)
    swapped = paired_difference(b[:, None], a[:, None], owner, resamples=300, seed=7)
    assert (swapped.mean[0], swapped.p_value[0]) == (-found.mean[0], found.p_value[0])
    assert swapped.low[0] == pytest.approx(-found.high[0])


def test_p_values_equal_the_enumeration_of_all_signs():
    rng = np.random.default_rng(5)
    owner, a = clustered(rng, 9)
    b = a + 0.6 * rng.normal(size=len(a)) + 0.25
    sums = np.bincount(owner, weights=a - b)
    reached = [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-12 for signs in itertools.product([-1, 1], repeat=9)]
    found = paired_difference(a[:, None], b[:, None], owner, resamples=20000)
    assert found.p_value[0] == pytest.approx(np.mean(reached), abs=0.015)
    theirs = stats.permutation_test((sums, np.zeros(9)), lambda x, y: np.sum(x - y), permutation_type="samples")
    assert found.p_value[0] == pytest.approx(theirs.pvalue, abs=0.015)


def test_p_values_count_sums_that_rounding_sets_apart_as_equal():
    # 0.1 + 0.2 + 0.3 in any order of signs: 2 of 8 assignments reach the observed sum, in exact arithmetic.
    a = np.array([[0.1], [0.2], [0.3], [0.6], [-0.6]])
    found = paired_difference(a, np.zeros_like(a), np.arange(5), resamples=20000)
    signs = np.array(list(itertools.product([-1, 1], repeat=5)))
    exact = (np.abs(signs @ np.array([1, 2, 3, 6, -6])) >= 6).mean()
    assert found.p_value[0] == pytest.approx(exact, abs=0.015)


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(6)
    p_values = []
    for _ in range(300):
        owner, a = clustered(rng, 40)
        b = a + rng.normal(size=40)[owner] * 0.7  # a user's cases differ together, and not in either's favour
        p_values.append(paired_difference(a[:, None], b[:, None], owner, resamples=200).p_value[0])
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


def test_p_values_of_a_real_effect_and_of_none():
    rng = np.random.default_rng(7)
    owner, a = clustered(rng, 200)
    b = a - 0.3 + 0.3 * rng.normal(size=len(a))
    found = paired_difference(np.stack([a, a], axis=1), np.stack([b, a], axis=1), owner, resamples=999)
    assert found.p_value.tolist() == [0.001, 1.0]  # never 0; and never above 1
    assert found.low[0] > 0.2
    assert (found.mean[1], found.low[1], found.high[1]) == (0, 0, 0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5, 0.001]) == pytest.approx([1, 1, 0.003])
    assert holm([0.9, 0.8]).tolist() == [1, 1]  # at most
    assert holm([]).tolist() == []
    assert holm([0.2]).tolist() == [0.2]
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])


def test_holm_rejects_what_stepping_down_rejects():
    rng = np.random.default_rng(8)
    for _ in range(100):
        p_values = rng.random(6) ** 4
        rejected = set()
        for step, place in enumerate(np.argsort(p_values)):
            if p_values[place] > 0.05 / (6 - step):
                break
            rejected.add(int(place))
        assert set(np.flatnonzero(holm(p_values) <= 0.05).tolist()) == rejected


def test_holm_keeps_the_chance_of_a_false_finding():
    rng = np.random.default_rng(9)
    false = [(holm(rng.random(10)) <= 0.05).any() for _ in range(2000)]
    assert 0.03 < np.mean(false) < 0.065


def test_over_seeds():
    mean, deviation = over_seeds([0.5, 0.7, 0.9])
    assert (mean, deviation) == (pytest.approx(0.7), pytest.approx(0.2))
    assert over_seeds([0.5]) == (0.5, None)
    for wrong in ([], [0.5, math.nan]):
        with pytest.raises(DataError, match="one finite number per seed"):
            over_seeds(wrong)


def test_bad_inputs():
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        bootstrap_means([1.0, 2.0, 3.0], [0, 1, 2])
    with pytest.raises(DataError, match=r"users \(2,\)"):
        bootstrap_means([[1.0]], [0, 1])
    with pytest.raises(DataError, match="no cases"):
        bootstrap_means(np.empty((0, 2)), [])
    with pytest.raises(DataError, match="0 resamples"):
        bootstrap_means([[1.0]], [0], resamples=0)
    with pytest.raises(DataError, match=r"1 value\(s\) are not finite, such as nan of case 1 in column 0"):
        bootstrap_means([[1.0], [math.nan]], [0, 1])
    with pytest.raises(DataError, match=r"\(2, 1\) and \(1, 1\)"):
        paired_difference([[1.0], [2.0]], [[1.0]], [0, 1])
    for wrong in ([0.5, math.nan], [-0.1], [1.1]):
        with pytest.raises(DataError, match="no probability"):
            holm(wrong)
