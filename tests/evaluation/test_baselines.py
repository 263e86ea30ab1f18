import math
import random
from collections import defaultdict

import numpy as np
import pytest
from scipy import sparse

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.evaluation.baselines import ItemCF, Popularity
from llmrec.evaluation.metrics import duplicate_rate, invalid_rate, ranking_metrics, ranks_of
from llmrec.exceptions import DataError


def arrays(sequences):
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


def random_case(seed):
    rng = random.Random(seed)
    num_items = rng.randrange(3, 25)
    length = rng.choice([6, 30])
    train = [[rng.randrange(num_items) for _ in range(rng.randrange(length))] for _ in range(rng.randrange(1, 20))]
    histories = [[rng.randrange(num_items) for _ in range(rng.randrange(length))] for _ in range(8)]
    return num_items, train, histories


def brute_force_popularity(num_items, train, history, k, exclude_seen):
    count = [sum(sequence.count(item) for sequence in train) for item in range(num_items)]
    candidates = [item for item in range(num_items) if not (exclude_seen and item in history)]
    return sorted(candidates, key=lambda item: (-count[item], item))[:k]


def brute_force_item_cf(num_items, train, history, k, exclude_seen, max_train):
    c = defaultdict(float)
    count = [0] * num_items
    for sequence in train:
        sequence = sequence[-max_train:]
        for place, item in enumerate(sequence):
            count[item] += 1
            for distance in range(1, 6):
                if place + distance < len(sequence):
                    later = sequence[place + distance]
                    c[item, later] += 1 / distance + (1 if distance == 1 else 0)
                    c[later, item] += 0.7 / distance
    score = {}
    for candidate in range(num_items):
        total = 0.0
        for age, item in enumerate(history[::-1][:20]):
            if count[item] and count[candidate]:
                total += 0.8**age * c[item, candidate] / math.sqrt(count[item] * count[candidate])
        score[candidate] = round(total, 10)
    candidates = [item for item in range(num_items) if not (exclude_seen and item in history)]
    return sorted(candidates, key=lambda item: (-score[item], -count[item], item))[:k]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_both_equal_their_definitions(seed, exclude_seen):
    num_items, train, histories = random_case(seed)
    k = random.Random(seed).choice([1, 4, 50])
    max_train = random.Random(seed).choice([7, 200])
    popularity = Popularity().fit(arrays(train), num_items).recommend(arrays(histories), k, exclude_seen)
    item_cf = ItemCF(max_train=max_train).fit(arrays(train), num_items).recommend(arrays(histories), k, exclude_seen)
    for history, popular, similar in zip(histories, popularity, item_cf, strict=True):
        assert popular.tolist() == brute_force_popularity(num_items, train, history, k, exclude_seen)
        assert similar.tolist() == brute_force_item_cf(num_items, train, history, k, exclude_seen, max_train)


def test_similarity_by_hand():
    # One sequence 0 1 2: forward 2, 2 (distance 1) and 1/2; backward 0.7, 0.7 and 0.35; item 2 occurs twice.
    model = ItemCF().fit(arrays([[0, 1, 2], [2]]), 3)
    half = 1 / math.sqrt(2)
    expected = [[0, 2, 0.5 * half], [0.7, 0, 2 * half], [0.35 * half, 0.7 * half, 0]]
    assert model.similarity.toarray() == pytest.approx(np.array(expected))


def test_the_order_of_a_float_sum_does_not_decide_a_tie():
    # Items 3 and 4 score 0.1 + 0.2 + 0.3 in two orders, which floats tell apart; item 4 is the more popular.
    model = ItemCF(decay=1.0).fit(arrays([[0], [1], [2], [3], [4], [4]]), 5)
    similarity = np.zeros((5, 5))
    similarity[:3, 3:] = [[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]]
    for columns in (similarity, similarity[:, [0, 1, 2, 4, 3]]):
        model.similarity = sparse.csr_array(columns)
        assert model.recommend(arrays([[0, 1, 2]]), 2)[0].tolist() == [4, 3]


def test_batches_do_not_matter(monkeypatch):
    num_items, train, histories = random_case(5)
    model = ItemCF().fit(arrays(train), num_items)
    whole = model.recommend(arrays(histories), 5)
    monkeypatch.setattr("llmrec.evaluation.baselines._BATCH", 3)
    assert [rows.tolist() for rows in model.recommend(arrays(histories), 5)] == [rows.tolist() for rows in whole]


@pytest.mark.parametrize("model", [Popularity(), ItemCF()])
def test_edges(model):
    model.fit(arrays([[0, 1, 1], []]), 4)
    assert model.recommend([], 3) == []
    assert [rows.tolist() for rows in model.recommend(arrays([[], [0, 1, 2, 3], [1, 0]]), 3)] == [
        [1, 0, 2],
        [],
        [2, 3],
    ]
    assert model.recommend(arrays([[0]]), 0)[0].tolist() == []
    for wrong in (4, -1):
        with pytest.raises(DataError, match=f"item row {wrong}, the catalog 4 items"):
            model.fit(arrays([[0, wrong]]), 4)


@pytest.mark.parametrize(
    ("folder", "model", "expected"),
    [
        ("amazon-scientific", Popularity(), {"HR@10": 0.0245}),
        ("amazon-scientific", ItemCF(), {"HR@10": 0.1033, "NDCG@10": 0.0775}),
        ("amazon-beauty", ItemCF(), {"HR@5": 0.0547, "NDCG@5": 0.0400, "HR@10": 0.0732, "NDCG@10": 0.0459}),
    ],
)
def test_figures_measured_elsewhere(shared_data, folder, model, expected):
    interactions = Interactions.read(shared_data / folder / "interactions.csv.gz")
    split = leave_one_out(interactions, Items.read(shared_data / folder / "items.jsonl.gz"))
    recommended = model.fit(split.train, split.num_items).recommend(split.histories("test"), 10)
    metrics = ranking_metrics(ranks_of(recommended, split.targets("test")), (5, 10))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=0.0005)
    assert invalid_rate(recommended, split.num_items) == duplicate_rate(recommended) == 0.0
