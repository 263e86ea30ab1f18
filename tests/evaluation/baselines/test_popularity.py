import random

import numpy as np
import pytest
from baseline_cases import arrays, check_lists_follow_scores, occurrences, random_case, ranked

from llmrec.evaluation.baselines import EASE, ItemCF, Markov, Popularity, TextKNN
from llmrec.exceptions import DataError

DAY = 86_400.0


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_popularity_equals_its_definition(seed, exclude_seen):
    num_items, train, histories = random_case(seed)
    k = random.Random(seed).choice([1, 4, 50])
    count = occurrences(num_items, train)
    model = Popularity().fit(arrays(train), num_items)
    for history, found in zip(histories, model.recommend(arrays(histories), k, exclude_seen), strict=True):
        assert found.tolist() == ranked(count, count, history, k, exclude_seen)
    check_lists_follow_scores(model, histories, count, k, exclude_seen)
    assert model.parameters == sum(c > 0 for c in count)


def brute_force_recent(num_items, train, times, half_life_days, last_share):
    known = sorted((t for row in times for t in row if t == t), reverse=True)
    weight = [0.0] * num_items
    # The oldest time that is in the share, by walking through the times from the newest.
    taken = 0
    while taken < len(known) and last_share is not None and taken < last_share * len(known) - 1e-9:
        taken += 1
    for sequence, row in zip(train, times, strict=True):
        for item, moment in zip(sequence, row, strict=True):
            if moment != moment:
                continue
            if half_life_days is not None:
                weight[item] += 0.5 ** ((known[0] - moment) / DAY / half_life_days)
            elif moment >= known[taken - 1]:
                weight[item] += 1
    return [round(value, 9) for value in weight]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("parameters", [{"half_life_days": 3.0}, {"last_share": 0.3}, {"last_share": 1.0}])
def test_recent_popularity_equals_its_definition(seed, parameters, caplog):
    num_items, train, histories = random_case(seed)
    rng = random.Random(seed)
    train.append([0])  # someone has something
    times = [[float("nan") if rng.random() < 0.1 else DAY * rng.randrange(9) for _ in one] for one in train]
    times[-1] = [DAY]
    unknown = sum(t != t for row in times for t in row)
    model = Popularity(**parameters).fit(arrays(train), num_items, [np.array(row) for row in times])
    expected = brute_force_recent(
        num_items, train, times, parameters.get("half_life_days"), parameters.get("last_share")
    )
    assert model.weights == pytest.approx(np.array(expected), abs=2e-9)
    check_lists_follow_scores(model, histories, occurrences(num_items, train), 5, True)
    assert (f"{unknown} of " in caplog.text) == (unknown > 0)


def test_recent_popularity_by_hand():
    train, times = arrays([[0, 1], [2]]), [np.array([0.0, 2 * DAY]), np.array([DAY])]
    assert Popularity(half_life_days=1).fit(train, 4, times).weights.tolist() == [0.25, 1, 0.5, 0]
    # Two of three; and one that shares its day with another takes both.
    assert Popularity(last_share=0.6).fit(train, 4, times).weights.tolist() == [0, 1, 1, 0]
    times[1][0] = 2 * DAY
    assert Popularity(last_share=0.1).fit(train, 4, times).weights.tolist() == [0, 1, 1, 0]


def test_ties_of_recent_popularity_go_by_all_of_training():
    train = arrays([[0, 1, 1, 1, 0, 2, 2]])
    times = [np.array([5.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0])]
    model = Popularity(last_share=2 / 7).fit(train, 4, times)
    assert model.weights.tolist() == [1, 1, 0, 0]
    assert model.recommend(arrays([[]]), 4)[0].tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"half_life_days": 1.0, "last_share": 0.5}, "two ways of the same"),
        ({"half_life_days": 0.0}, "half_life_days is 0.0"),
        ({"half_life_days": float("nan")}, "half_life_days is nan"),
        ({"last_share": 0.0}, "last_share is 0.0"),
        ({"last_share": 1.5}, "last_share is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(parameters, message):
    with pytest.raises(DataError, match=message):
        Popularity(**parameters)


def test_times_that_are_absent_unknown_or_too_few_are_refused():
    model = Popularity(half_life_days=1)
    with pytest.raises(DataError, match="needs timestamps"):
        model.fit(arrays([[0]]), 1)
    with pytest.raises(DataError, match="None of the 1 training interactions has a known time"):
        model.fit(arrays([[0]]), 1, [np.array([np.nan])])
    with pytest.raises(DataError, match="3 items of 2 users, the timestamps are 3 of 2"):
        model.fit(arrays([[0, 0], [0]]), 1, [np.array([1.0]), np.array([1.0, 2.0])])


@pytest.mark.parametrize(
    "model",
    [Popularity(), ItemCF(), EASE(), Markov(), Markov(order=2), TextKNN(np.zeros((4, 2)))],
    ids=["popularity", "item_cf", "ease", "markov", "markov 2", "text_knn"],
)
def test_edges(model):
    model.fit(arrays([[0, 1, 1], []]), 4)
    assert model.recommend([], 3) == []
    assert model.scores([]).shape == (0, 4)
    lists = [rows.tolist() for rows in model.recommend(arrays([[], [0, 1, 2, 3], [1, 0]]), 3)]
    assert lists == [[1, 0, 2], [], [2, 3]]
    assert model.recommend(arrays([[0]]), 0)[0].tolist() == []
    assert sorted(model.recommend(arrays([[0]]), 9, exclude_seen=False)[0].tolist()) == [0, 1, 2, 3]
    for wrong in (4, -1):
        with pytest.raises(DataError, match=f"item row {wrong}, the catalog 4 items"):
            model.fit(arrays([[0, wrong]]), 4)
    model.fit([], 4)
    assert model.recommend(arrays([[3], []]), 2)[0].tolist() == [0, 1]


@pytest.mark.parametrize("size", [("_USERS", 3), ("_CELLS", 40)], ids=str)
@pytest.mark.parametrize("model", [EASE(), Markov(order=2), TextKNN(np.random.default_rng(0).normal(size=(20, 4)))])
def test_batches_do_not_matter(model, size, monkeypatch):
    rng = np.random.default_rng(0)
    train, histories = (arrays(rng.integers(0, 20, size=(11, 6))) for _ in range(2))
    model.fit(train, 20)
    whole = model.recommend(histories, 5)
    monkeypatch.setattr(f"llmrec.evaluation.baselines.ranking.{size[0]}", size[1])
    assert [rows.tolist() for rows in model.recommend(histories, 5)] == [rows.tolist() for rows in whole]
