"""Distributions: by hand, by definition, and where there is nothing to describe."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import DAY, START, split_of

from llmrec.data.distribution import gini, histogram, lengths, popularity, quantiles, thirds, times

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_gini_is_the_mean_difference(counts: list[int]) -> None:
    values = np.array(counts)
    if values.sum() == 0:
        assert gini(values) == 0
    else:
        differences = np.abs(values[:, None] - values[None, :]).sum()
        assert gini(values) == pytest.approx(differences / (2 * len(values) * values.sum()), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_head_torso_and_tail_equal_their_definition(counts: list[int]) -> None:
    expected = [3] * len(counts)
    before = 0
    for item in sorted(range(len(counts)), key=lambda item: (-counts[item], item)):
        if counts[item]:
            expected[item] = sum(3 * before >= third * sum(counts) for third in (1, 2))
        before += counts[item]
    assert thirds(np.array(counts, dtype=np.int64)).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_a_histogram_counts_everything_once(values: list[int]) -> None:
    found = histogram(np.array(values))
    edges, counts = found["edges"], found["counts"]
    assert sum(counts) == len(values)
    assert edges == sorted(set(edges))
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == sum(low <= value < high for value in values)


def test_lengths_by_hand() -> None:
    found = lengths(split_of([[0, 1, 2], [0], [1, 2], [0, 1, 2, 0]]))
    assert found["mean"] == 2.5
    assert found["quantiles"]["0.5"] == 2.5
    assert found["quantiles"]["1.0"] == 4
    assert sum(found["counts"]) == 4
    assert quantiles(np.zeros(0)) == {}
    assert histogram(np.zeros(0, dtype=np.int64)) == {"edges": [], "counts": []}


def test_popularity_by_hand() -> None:
    """Training: item 0 six times, 1 and 2 once; 3 in no training, 4 nowhere."""
    found = popularity(split_of([[0, 0, 0, 1, 3], [0, 0, 0, 1, 2, 0, 3]], num_items=5))
    assert found["mean"] == pytest.approx(8 / 5)
    assert found["top_1_share"] == found["top_10_share"] == pytest.approx(6 / 8)
    assert found["unseen_items"] == 2
    assert found["groups"]["head"]["items"] == 1
    assert found["groups"]["torso"] == {"items": 0, "item_share": 0.0}
    assert found["groups"]["tail"]["items"] == 2
    assert found["curve"] == {"rank": [1, 2, 3], "interactions": [6, 1, 1]}


def test_times_by_hand() -> None:
    day = float(DAY)
    split = split_of(
        [[0, 1, 2, 3], [0, 1, 2]], [[START, START, START + 30, START + 10 * day], [START, None, START + day]]
    )
    found = times(split)
    assert found is not None
    assert found["unix"] is True
    assert found["span_days"] == 10
    assert (found["first"], found["last"]) == (START, START + 10 * day)
    assert sum(found["interactions"]) == 6
    # Three known gaps, all of the first user: none, 30 s, nearly 10 days.
    assert found["gap_shares"] == pytest.approx(
        {"none": 1 / 3, "up to a minute": 1 / 3, "up to an hour": 0, "up to a day": 0, "up to a week": 0}
        | {"up to 30 days": 1 / 3, "longer": 0}
    )
    json.dumps(found, allow_nan=False)
    assert times(split_of([[0, 1, 2]])) is None
    # A user of whom a time is missing is in an order of his own, and what goes back is neither a gap nor a tie.
    backward = times(
        split_of([[0, 1, 2, 3], [0, 1, 2]], [[START + 90, START, None, START], [START, START, START + 9]])
    )
    assert backward is not None
    assert backward["backward_gaps"] == 1
    assert backward["gap_quantiles"]["0.0"] == 0
    assert (backward["gap_shares"]["none"], backward["gap_shares"]["up to a minute"]) == (0.5, 0.5)
    counted = times(split_of([[0, 1, 2]], [[1.0, 2.0, 9.0]]))
    assert counted is not None
    assert counted["unix"] is False
    assert counted["span_days"] is counted["gap_shares"] is None
