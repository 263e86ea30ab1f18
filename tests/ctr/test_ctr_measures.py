import math

import numpy as np
import pytest
from ctr_factories import make_rows, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.ctr.baselines import baselines
from llmrec.ctr.measures import auc_interval, length_slices, measure, reliability, sliced
from llmrec.ctr.rows import MISSING
from llmrec.evaluation.probability import auc
from llmrec.exceptions import DataError


def cases(seed, count=60, users=9, ties=True):
    rng = np.random.default_rng(seed)
    scores = rng.random(count)
    return rng.integers(0, 2, count), np.round(scores, 1) if ties else scores, rng.integers(0, users, count)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_the_interval_of_auc_is_that_of_resampled_users(seed, num_users):
    labels, scores, users = cases(seed, count=25, users=num_users)
    generator, found = np.random.default_rng(seed), []
    names = np.unique(users)
    for _ in range(50):
        drawn = generator.integers(len(names), size=len(names))
        places = np.concatenate([np.flatnonzero(users == names[one]) for one in drawn])
        if 0 < labels[places].sum() < len(places):
            found.append(auc(labels[places], scores[places]))
    interval = auc_interval(labels, scores, users, resamples=50, seed=seed)
    assert interval == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), abs=1e-12)


def test_measures_are_their_definitions():
    labels, scores, users = cases(1)
    found = measure(labels, scores, users, resamples=100)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert found["AUC"] == pytest.approx(np.mean(pairs))
    own = {
        user: [
            (a > b) + 0.5 * (a == b)
            for a in scores[(labels == 1) & (users == user)]
            for b in scores[(labels == 0) & (users == user)]
        ]
        for user in np.unique(users)
    }
    both = [user for user, pairs in own.items() if pairs]
    assert found["UAUC"] == pytest.approx(np.mean([np.mean(own[user]) for user in both]))
    sizes = [np.count_nonzero(users == user) for user in both]
    assert found["GAUC"] == pytest.approx(np.average([np.mean(own[user]) for user in both], weights=sizes))
    assert found["users_left_out"] == pytest.approx(1 - len(both) / len(own))
    losses = [-math.log(np.clip(p if y else 1 - p, 1e-7, 1)) for y, p in zip(labels, scores, strict=True)]
    assert found["log_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    for metric in ("AUC", "UAUC", "log_loss", "Brier"):
        low, high = found[f"{metric} interval95"]
        assert low <= found[metric] <= high


def test_users_of_one_label_are_left_out_and_counted():
    found = measure([1, 1, 0, 1, 0], [0.9, 0.2, 0.4, 0.3, 0.1], [0, 0, 1, 2, 2], resamples=10)
    assert (found["UAUC"], found["UAUC_users"], found["users_left_out"]) == (1.0, 1, pytest.approx(2 / 3))
    alike = measure([1, 1], [0.9, 0.2], [0, 1], resamples=10)
    assert alike["AUC"] is alike["UAUC"] is alike["AUC interval95"] is alike["GAUC"] is None
    separate = measure([1, 0], [0.9, 0.2], [0, 1], resamples=10)
    assert (separate["AUC"], separate["UAUC"], separate["users_left_out"]) == (1.0, None, 1.0)


def test_labels_that_are_not_known_are_left_out():
    labels, scores, users = cases(2)
    known = np.arange(len(labels)) % 3 > 0
    partly = np.where(known, labels, MISSING)
    assert measure(partly, scores, users, 20) == measure(labels[known], scores[known], users[known], 20)
    assert reliability(partly, scores) == reliability(labels[known], scores[known])
    found = sliced(partly, scores, users, {"even": users % 2 == 0, "none": users < 0})
    assert list(found) == ["even"]
    kept = known & (users % 2 == 0)
    assert found["even"]["AUC"] == auc(labels[kept], scores[kept])
    assert found["even"]["cases"] == kept.sum()
    with pytest.raises(DataError, match="one of each"):
        measure(labels, scores[:-1], users)


def test_every_length_is_in_one_slice():
    lengths = np.array([0, 1, 9, 10, 49, 50, 300])
    chosen = length_slices(lengths)
    assert np.stack(list(chosen.values())).sum(axis=0).tolist() == [1] * 7
    assert [lengths[one].tolist() for one in chosen.values()] == [[0], [1, 9], [10, 49], [50, 300]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["known", "unknown"]), st.integers(0, 1))
def test_baselines_are_smoothed_shares_of_what_is_known(seed, simultaneous, label):
    rows = random_rows(seed, count=40, num_labels=2, missing=True, tied=True)
    rows.part[30:] = 1
    train, asked = np.arange(30), np.arange(25, 40)
    found = baselines(rows, train, asked, label, simultaneous, strength=2.0)
    own = rows.labels[:, label]
    share = (np.count_nonzero(own[train] == 1) + 0.5) / (np.count_nonzero(own[train] >= 0) + 1)
    keys = [(rows.part[row], rows.timestamps[row], row) for row in range(40)]
    for place, row in enumerate(asked.tolist()):
        same = [other for other in train if rows.items[other] == rows.items[row] and own[other] >= 0]
        item = (sum(own[other] for other in same) + 2 * share) / (len(same) + 2)
        known = [
            other
            for other in range(40)
            if rows.users[other] == rows.users[row] and own[other] >= 0 and keys[other] < keys[row]
            and (simultaneous == "known" or keys[other][:2] != keys[row][:2])
        ]  # fmt: skip
        user = (sum(own[other] for other in known) + 2 * share) / (len(known) + 2)
        odds = item / (1 - item) * user / (1 - user) / (share / (1 - share))
        assert found["share"][place] == pytest.approx(share)
        assert found["item"][place] == pytest.approx(item)
        assert found["user"][place] == pytest.approx(user)
        assert found["item and user"][place] == pytest.approx(odds / (1 + odds))


def test_a_new_item_and_user_have_the_overall_share():
    rows = make_rows([0, 0, 1], [0, 1, 2], [1, 0, 1], part=[0, 0, 1])
    found = baselines(rows, np.array([0, 1]), np.array([2]))
    assert all(values[0] == pytest.approx(0.5) for values in found.values())
