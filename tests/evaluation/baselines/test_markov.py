import random

import numpy as np
import pytest
from baseline_cases import arrays, check_lists_follow_scores, occurrences, random_case

from llmrec.evaluation.baselines import Markov
from llmrec.exceptions import DataError


def first_order(train, share, last, item, smoothing):
    """P(item | last), by counting."""
    followed = both = 0
    for sequence in train:
        for place in range(len(sequence) - 1):
            if sequence[place] == last:
                followed += 1
                both += sequence[place + 1] == item
    return (both + smoothing * share[item]) / (followed + smoothing) if followed + smoothing else 0.0


def second_order(train, share, before, last, item, smoothing):
    """P(item | before, last), by counting."""
    followed = both = 0
    for sequence in train:
        for place in range(len(sequence) - 2):
            if sequence[place : place + 2] == [before, last]:
                followed += 1
                both += sequence[place + 2] == item
    lower = first_order(train, share, last, item, smoothing)
    return (both + smoothing * lower) / (followed + smoothing) if followed else lower


def brute_force(num_items, train, history, smoothing, order, max_history, decay):
    count = occurrences(num_items, train)
    share = [value / max(1, sum(count)) for value in count]
    if not history:
        return share
    scores = [0.0] * num_items
    for age in range(min(max_history, len(history))):
        place = len(history) - 1 - age
        for item in range(num_items):
            if order == 2 and place > 0:
                p = second_order(train, share, history[place - 1], history[place], item, smoothing)
            else:
                p = first_order(train, share, history[place], item, smoothing)
            scores[item] += decay**age * p
    return scores


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("order", [1, 2])
def test_markov_equals_its_definition(seed, order):
    rng = random.Random(seed)
    num_items, train, histories = random_case(seed)
    num_items = min(num_items, 9)  # so that pairs come again
    train, histories = ([[item % num_items for item in one] for one in many] for many in (train, histories))
    histories.append([])
    parameters = (rng.choice([0, 0.5, 3]), order, rng.choice([1, 2, 50]), rng.choice([0.5, 1.0]))
    model = Markov(*parameters).fit(arrays(train), num_items)
    expected = np.array([brute_force(num_items, train, history, *parameters) for history in histories])
    assert model.scores(arrays(histories)) == pytest.approx(expected, abs=1e-9)
    check_lists_follow_scores(model, histories, occurrences(num_items, train), 4, rng.random() < 0.5)


def test_by_hand():
    train = arrays([[0, 1, 2], [3, 1, 0]])
    first = Markov(smoothing=1).fit(train, 4)
    # After 1 came 2 and 0, once each; shares are 2/6, 2/6, 1/6, 1/6.
    assert first.scores(arrays([[1]]))[0] == pytest.approx(np.array([4 / 3, 1 / 3, 7 / 6, 1 / 6]) / 3)
    assert first.parameters == 4 + 4
    second = Markov(smoothing=0, order=2).fit(train, 4)
    assert second.scores(arrays([[0, 1], [3, 1], [1, 1]])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0.5, 0, 0.5, 0]]
    assert second.parameters == 4 + 4 + 2


def test_pairs_of_two_users_are_none():
    model = Markov(smoothing=0, order=2).fit(arrays([[0], [1], [], [2, 3], [0, 1]]), 4)
    assert model.transitions.toarray().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert len(model.pairs) == 0
    assert model.scores(arrays([[2], [0]])).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    "parameters", [{"smoothing": -1.0}, {"smoothing": float("nan")}, {"order": 3}, {"max_history": 0}, {"decay": 0.0}]
)
def test_values_out_of_range_are_refused(parameters):
    with pytest.raises(DataError, match=f"{next(iter(parameters))} .*Give"):
        Markov(**parameters)
