import math
import random
from collections import defaultdict

import numpy as np
import pytest
from baseline_cases import arrays, check_lists_follow_scores, occurrences, random_case, ranked
from scipy import sparse

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.evaluation.baselines import ItemCF, Popularity
from llmrec.evaluation.metrics import duplicate_rate, invalid_rate, ranking_metrics, ranks_of
from llmrec.exceptions import DataError


def brute_force_item_cf(num_items, train, history, max_train, parameters):
    window, backward, decay, max_history = parameters
    c = defaultdict(float)
    count = [0] * num_items
    for sequence in train:
        sequence = sequence[-max_train:]
        for place, item in enumerate(sequence):
            count[item] += 1
            for distance in range(1, window + 1):
                if place + distance < len(sequence):
                    later = sequence[place + distance]
                    c[item, later] += 1 / distance + (1 if distance == 1 else 0)
                    c[later, item] += backward / distance
    score = []
    for candidate in range(num_items):
        total = 0.0
        for age, item in enumerate(history[::-1][:max_history]):
            if count[item] and count[candidate]:
                total += decay**age * c[item, candidate] / math.sqrt(count[item] * count[candidate])
        score.append(round(total, 10))
    return score, count


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_item_cf_equals_its_definition(seed, exclude_seen):
    num_items, train, histories = random_case(seed)
    k = random.Random(seed).choice([1, 4, 50])
    max_train = random.Random(seed).choice([7, 200])
    parameters = random.Random(seed).choice([(5, 0.7, 0.8, 20), (2, 0.2, 0.5, 3)])
    names = ("window", "backward", "decay", "max_history")
    model = ItemCF(max_train=max_train, **dict(zip(names, parameters, strict=True)))
    model.fit(arrays(train), num_items)
    found = model.recommend(arrays(histories), k, exclude_seen)
    scores = model.scores(arrays(histories))
    for history, similar, row in zip(histories, found, scores, strict=True):
        score, count = brute_force_item_cf(num_items, train, history, max_train, parameters)
        assert similar.tolist() == ranked(score, count, history, k, exclude_seen)
        assert row == pytest.approx(np.array(score), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_scores_agree_with_lists(seed, exclude_seen):
    num_items, train, histories = random_case(seed)
    model = ItemCF().fit(arrays(train), num_items)
    check_lists_follow_scores(model, histories, occurrences(num_items, train), 7, exclude_seen)


def test_similarity_by_hand():
    # One sequence 0 1 2: forward 2, 2 (distance 1) and 1/2; backward 0.7, 0.7 and 0.35; item 2 occurs twice.
    model = ItemCF().fit(arrays([[0, 1, 2], [2]]), 3)
    half = 1 / math.sqrt(2)
    expected = [[0, 2, 0.5 * half], [0.7, 0, 2 * half], [0.35 * half, 0.7 * half, 0]]
    assert model.similarity.toarray() == pytest.approx(np.array(expected))
    assert model.parameters == 6


def test_the_order_of_a_float_sum_does_not_decide_a_tie():
    # Items 3 and 4 score 0.1 + 0.2 + 0.3 in two orders, which floats tell apart; item 4 is the more popular.
    model = ItemCF(decay=1.0).fit(arrays([[0], [1], [2], [3], [4], [4]]), 5)
    similarity = np.zeros((5, 5))
    similarity[:3, 3:] = [[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]]
    for columns in (similarity, similarity[:, [0, 1, 2, 4, 3]]):
        model.similarity = sparse.csr_array(columns)
        assert model.recommend(arrays([[0, 1, 2]]), 2)[0].tolist() == [4, 3]
        scores = model.scores(arrays([[0, 1, 2]]))[0]
        assert scores[3] == scores[4] > 0


def test_batches_do_not_matter(monkeypatch):
    num_items, train, histories = random_case(5)
    model = ItemCF().fit(arrays(train), num_items)
    whole = model.recommend(arrays(histories), 5)
    monkeypatch.setattr("llmrec.evaluation.baselines.ranking._CELLS", 3 * num_items)
    assert [rows.tolist() for rows in model.recommend(arrays(histories), 5)] == [rows.tolist() for rows in whole]


@pytest.mark.parametrize(
    "parameters",
    [{"window": 0}, {"max_train": 0}, {"max_history": 0}, {"backward": -0.1}, {"decay": 0.0}, {"decay": 1.1}],
)
def test_values_out_of_range_are_refused(parameters):
    with pytest.raises(DataError, match=f"{next(iter(parameters))} .*Give"):
        ItemCF(**parameters)


@pytest.mark.parametrize(
    ("folder", "model", "expected", "later"),
    [
        ("amazon-scientific", Popularity(), {"HR@10": 0.0245}, None),
        ("amazon-scientific", ItemCF(), {"HR@10": 0.1033, "NDCG@10": 0.0775}, None),
        ("amazon-beauty", ItemCF(), {"HR@5": 0.0547, "NDCG@5": 0.0400, "HR@10": 0.0732, "NDCG@10": 0.0459}, 0.0248),
    ],
)
def test_figures_measured_elsewhere(shared_data, folder, model, expected, later):
    interactions = Interactions.read(shared_data / folder / "interactions.csv.gz")
    split = leave_one_out(interactions, Items.read(shared_data / folder / "items.jsonl.gz"))
    recommended = model.fit(split.train, split.num_items).recommend(split.histories("test"), 10)
    ranks = ranks_of(recommended, split.targets("test"))
    metrics = ranking_metrics(ranks, (5, 10))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=0.0005)
    assert invalid_rate(recommended, split.num_items) == duplicate_rate(recommended) == 0.0
    if later is not None:
        assert ranking_metrics(ranks[split.later_days("test")], (10,))["NDCG@10"] == pytest.approx(later, abs=0.0005)
