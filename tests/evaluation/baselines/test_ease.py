import random

import numpy as np
import pytest
from baseline_cases import arrays, check_lists_follow_scores, occurrences, random_case

from llmrec.evaluation.baselines import EASE
from llmrec.exceptions import DataError


def dense(sequences, num_items, decay):
    """Entry by entry: decay to the power of the distance from the end, of an item's last occurrence."""
    matrix = np.zeros((len(sequences), num_items))
    for user, sequence in enumerate(sequences):
        for place, item in enumerate(sequence):
            matrix[user, item] = decay ** (len(sequence) - 1 - place)
    return matrix


def constrained_ridge(matrix, regularisation):
    """Column by column, the normal equations of a ridge regression on all the other items."""
    num_items = matrix.shape[1]
    weights = np.zeros((num_items, num_items))
    for target in range(num_items):
        others = [item for item in range(num_items) if item != target]
        x = matrix[:, others]
        solved = np.linalg.solve(x.T @ x + regularisation * np.eye(len(others)), x.T @ matrix[:, target])
        weights[others, target] = solved
    return weights


@pytest.mark.parametrize("seed", range(20))
def test_ease_equals_the_regression_under_its_constraint(seed, monkeypatch):
    num_items, train, histories = random_case(seed)
    rng = random.Random(seed)
    regularisation = rng.choice([0.5, 20.0])
    train_decay, decay = rng.choice([(1.0, 1.0), (0.7, 0.4)])
    monkeypatch.setattr("llmrec.evaluation.baselines.ease._BLOCK", rng.choice([3, 512]))
    model = EASE(regularisation, decay, train_decay).fit(arrays(train), num_items)
    expected = constrained_ridge(dense(train, num_items, train_decay), regularisation)
    whole = np.zeros((num_items, num_items))
    whole[np.ix_(model.kept, model.kept)] = model.weights
    assert whole == pytest.approx(expected, abs=2e-5)
    assert model.weights.dtype == np.float32
    scores = model.scores(arrays(histories))
    assert scores == pytest.approx(dense(histories, num_items, decay) @ expected, abs=1e-4)
    check_lists_follow_scores(model, histories, occurrences(num_items, train), 5, rng.random() < 0.5)
    assert model.parameters == np.count_nonzero(whole)


def test_by_hand():
    # Users {0, 1}, {0, 1}, {1}: B[0, 1] = 2 / (2 + 1) and B[1, 0] = 2 / (3 + 1).
    model = EASE(regularisation=1.0).fit(arrays([[0, 1, 0], [1, 0], [1]]), 2)
    assert model.weights == pytest.approx(np.array([[0, 2 / 3], [1 / 2, 0]]))


@pytest.mark.parametrize("seed", range(10))
def test_only_the_most_popular_items_take_part(seed):
    num_items, train, histories = random_case(seed)
    count = occurrences(num_items, train)
    kept = sorted(sorted((i for i in range(num_items) if count[i]), key=lambda item: (-count[item], item))[:4])
    model = EASE(3.0, max_items=4).fit(arrays(train), num_items)
    assert model.kept.tolist() == kept
    expected = np.zeros((num_items, num_items))
    expected[np.ix_(kept, kept)] = constrained_ridge(dense(train, num_items, 1.0)[:, kept], 3.0)
    assert model.scores(arrays(histories)) == pytest.approx(dense(histories, num_items, 1.0) @ expected, abs=1e-4)
    check_lists_follow_scores(model, histories, count, 50, True)


def test_a_matrix_that_does_not_fit_is_refused_with_what_it_needs(monkeypatch):
    train = arrays([np.arange(1000)])
    monkeypatch.setattr("llmrec.evaluation.baselines.ease._RESERVE", 0)
    monkeypatch.setattr("llmrec.machine.available_memory", lambda: 4 * 1000**2)
    EASE().fit(train, 1000)
    monkeypatch.setattr("llmrec.machine.available_memory", lambda: 4 * 400**2)
    with pytest.raises(DataError, match=r"over 1,000 items needs 0\.0 GiB .*max_items=400 or fewer"):
        EASE().fit(train, 1000)
    EASE(max_items=400).fit(train, 1000)
    monkeypatch.setattr("llmrec.machine.available_memory", lambda: 0)
    with pytest.raises(DataError, match="max_items=1 or fewer"):
        EASE().fit(train, 1000)


def test_a_regularisation_that_float32_cannot_see_is_refused():
    train = arrays([[0, 1]] * 100)
    with pytest.raises(DataError, match=r"not positive definite in float32 .*larger regularisation"):
        EASE(regularisation=1e-9).fit(train, 2)


@pytest.mark.parametrize(
    "parameters",
    [
        {"regularisation": 0.0},
        {"regularisation": float("inf")},
        {"decay": 0.0},
        {"train_decay": 1.5},
        {"max_items": 0},
    ],
)
def test_values_out_of_range_are_refused(parameters):
    with pytest.raises(DataError, match=f"{next(iter(parameters))} .*Give"):
        EASE(**parameters)
