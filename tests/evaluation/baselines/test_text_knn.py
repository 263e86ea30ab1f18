import math
import random

import numpy as np
import pytest
from baseline_cases import arrays, check_lists_follow_scores, occurrences, random_case

from llmrec.evaluation.baselines import TextKNN
from llmrec.exceptions import DataError


def brute_force(embeddings, history, decay, max_history):
    def unit(vector):
        norm = math.sqrt(sum(x * x for x in vector))
        return [x / norm for x in vector] if norm > 1e-12 else [0.0] * len(vector)

    width = len(embeddings[0])
    mean = [0.0] * width
    for age, item in enumerate(history[::-1][:max_history]):
        for place, value in enumerate(unit(embeddings[item])):
            mean[place] += decay**age * value
    query = unit(mean)
    return [sum(q * x for q, x in zip(query, unit(vector), strict=True)) for vector in embeddings]


@pytest.mark.parametrize("seed", range(20))
def test_text_knn_equals_its_definition(seed):
    rng = random.Random(seed)
    num_items, train, histories = random_case(seed)
    embeddings = np.random.default_rng(seed).normal(size=(num_items, 5)) * 3
    embeddings[rng.randrange(num_items)] = 0
    parameters = {"decay": rng.choice([0.5, 1.0]), "max_history": rng.choice([1, 3, 100])}
    model = TextKNN(embeddings, **parameters).fit(arrays(train), num_items)
    expected = np.array([brute_force(embeddings.tolist(), history, **parameters) for history in histories])
    assert model.scores(arrays(histories)) == pytest.approx(expected, abs=3e-6)
    check_lists_follow_scores(model, histories, occurrences(num_items, train), 5, rng.random() < 0.5)
    assert model.parameters == 5 * (num_items - 1)


def test_items_of_the_same_text_tie_and_go_by_popularity():
    rng = np.random.default_rng(0)
    embeddings = np.repeat(rng.normal(size=(7, 33)), 3, axis=0)  # rows 0-2 are one text, and so on
    model = TextKNN(embeddings).fit(arrays([[2], [2], [1], [5]]), 21)
    scores = model.scores(arrays([[3, 20], [9]]))
    assert (scores.reshape(2, 7, 3) == scores.reshape(2, 7, 3)[..., :1]).all()
    first = [item for item in model.recommend(arrays([[3, 20]]), 21)[0].tolist() if item in (0, 1, 2)]
    assert first == [2, 1, 0]


def test_the_last_bits_of_a_product_do_not_decide_a_tie():
    model = TextKNN(np.ones((3, 2))).fit(arrays([[0], [1], [1], [2]]), 3)
    more = np.nextafter(np.float32(0.6), np.float32(1))
    model.embeddings = np.array([[1, 0], [0.6, 0.8], [more, 0.8]], dtype=np.float32)
    assert model.recommend(arrays([[0]]), 2)[0].tolist() == [1, 2]


def test_wrong_embeddings_and_values_are_refused():
    with pytest.raises(DataError, match="2 embeddings and 3 items"):
        TextKNN(np.ones((2, 4))).fit(arrays([[0]]), 3)
    for wrong in (np.ones(3), np.array([[np.nan]])):
        with pytest.raises(DataError, match="one finite vector per item"):
            TextKNN(wrong)
    for parameters in ({"max_history": 0}, {"decay": 0.0}, {"decay": 2.0}):
        with pytest.raises(DataError, match=f"{next(iter(parameters))} .*Give"):
            TextKNN(np.ones((2, 2)), **parameters)
