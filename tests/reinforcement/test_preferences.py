"""Negatives: drawn uniformly among what is left, or proposed by a model."""

import functools
import operator
from types import SimpleNamespace

import numpy as np
import pytest
from factories import random_recommender
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_logs import cases_of

from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.preferences import PreferenceCases, hard_negatives, uniform_negatives
from llmrec.reinforcement.rollouts import TransformersRollouts

N = 10


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.data())
def test_uniform_negatives_are_legal(seed, exclude_seen, data):
    rng = np.random.default_rng(seed)
    live = rng.random(N) < 0.8
    live[:2] = True
    histories = [rng.integers(0, N, rng.integers(0, 6)).tolist() for _ in range(5)]
    targets = rng.integers(0, N, 5).tolist()
    cases = cases_of(targets, histories)
    allowed = [
        set(np.flatnonzero(live).tolist()) - {target} - set(history if exclude_seen else [])
        for target, history in zip(targets, histories, strict=True)
    ]
    fewest = min(map(len, allowed))
    if fewest == 0:
        with pytest.raises(RecipeError, match="has 0 item"):
            uniform_negatives(cases, live, 1, seed, exclude_seen)
        return
    count = data.draw(st.integers(1, fewest))
    found = uniform_negatives(cases, live, count, seed, exclude_seen)
    assert (found.shape, found.dtype) == ((5, count), np.int64)
    for row, legal in zip(found.tolist(), allowed, strict=True):
        assert len(set(row)) == count
        assert set(row) <= legal
    assert np.array_equal(found, uniform_negatives(cases, live, count, seed, exclude_seen))
    PreferenceCases(cases, found)
    with pytest.raises(RecipeError, match=f"has {fewest} item"):
        uniform_negatives(cases, live, fewest + 1, seed, exclude_seen)


def test_uniform_negatives_are_uniform():
    """Every legal item and every pair of places alike: chi-square at a fixed seed, far from its critical value."""
    count = 6000
    cases = cases_of([4] * count, [[1, 1, 7]] * count)
    live = np.ones(N, dtype=bool)
    live[9] = False
    found = uniform_negatives(cases, live, 2, seed=3)
    legal = [0, 2, 3, 5, 6, 8]
    pairs = np.zeros((N, N))
    np.add.at(pairs, (found[:, 0], found[:, 1]), 1)
    inside = pairs[np.ix_(legal, legal)]
    assert inside.sum() == count
    off = inside[~np.eye(6, dtype=bool)]
    expected = count / 30
    assert ((off - expected) ** 2 / expected).sum() < 60  # 29 degrees of freedom: 1 in 2,000 is above
    assert not np.array_equal(found, uniform_negatives(cases, live, 2, seed=4))


class Proposals:
    """Groups that are given."""

    def __init__(self, items):
        self.items, self.asked = np.array(items), []

    def generate(self, chosen):
        self.asked.append(list(chosen))
        return SimpleNamespace(items=self.items[list(chosen)])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_hard_negatives_are_the_first_that_are_not_the_target(batch_size):
    cases = cases_of([3, 5, 0])
    proposals = Proposals([[3, 1, 2, 9], [4, 5, 8, 1], [7, 6, 2, 1]])
    found = hard_negatives(cases, proposals, 2, batch_size)
    assert found.tolist() == [[1, 2], [4, 8], [7, 6]]
    assert found.dtype == np.int64
    assert functools.reduce(operator.iadd, proposals.asked, []) == [0, 1, 2]
    assert max(map(len, proposals.asked)) <= batch_size
    assert hard_negatives(cases, proposals, 3).tolist() == [[1, 2, 9], [4, 8, 1], [7, 6, 2]]


def test_groups_that_cannot_be_used():
    cases = cases_of([3])
    with pytest.raises(RecipeError, match="Groups of 2 items"):
        hard_negatives(cases, Proposals([[3, 1]]), 2)
    with pytest.raises(BackboneError, match="twice"):
        hard_negatives(cases, Proposals([[1, 1, 2]]), 2)
    with pytest.raises(BackboneError, match="what is none"):
        hard_negatives(cases, Proposals([[1, 4, -1]]), 2)
    for make in (lambda count: hard_negatives(cases, Proposals([[1, 2]]), count),
                 lambda count: uniform_negatives(cases, np.ones(N, dtype=bool), count)):  # fmt: skip
        with pytest.raises(RecipeError, match=r"^0 negatives"):
            make(0)


def test_hard_negatives_of_a_model_are_what_it_would_recommend():
    recommender = random_recommender(1)
    histories = [[3, 8], [], [5, 5, 9, 30]]
    targets = [12, 20, recommender.recommend_rows([histories[2]], k=2)[0][0][1]]
    cases = cases_of(targets, histories, prompts=[recommender.encoder.encode(one) for one in histories])
    rollouts = TransformersRollouts(recommender.model, recommender.catalog, cases, 6)
    found = hard_negatives(cases, rollouts, 5)
    listed, _ = recommender.recommend_rows(histories, k=6, num_beams=6)
    for negatives, ranked, target in zip(found.tolist(), listed, targets, strict=True):
        assert negatives == [row for row in ranked if row != target][:5]
    assert targets[2] in listed[2]


def test_preferences_that_are_none():
    cases = cases_of([3, 4])
    made = PreferenceCases(cases, np.array([[1, 2], [5, 0]]))
    assert made.items.tolist() == [[3, 1, 2], [4, 5, 0]]
    assert len(made) == 2
    for negatives, said in (
        ([[1, 2]], "shape"),
        ([[], []], "shape"),
        ([1, 2], "shape"),
        ([[1, 3], [5, 0]], "own target"),
        ([[1, 2], [5, 5]], "twice"),
    ):
        with pytest.raises(RecipeError, match=said):
            PreferenceCases(cases, np.array(negatives))
