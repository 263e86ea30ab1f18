import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation.metrics import (
    duplicate_rate,
    hit_rate,
    invalid_rate,
    ndcg,
    ranking_metrics,
    ranks_of,
    values,
)
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError

lists_and_targets = st.lists(
    st.tuples(st.lists(st.integers(-1, 8), max_size=7), st.integers(0, 8)), min_size=1, max_size=12
)


@given(lists_and_targets)
def test_ranks_and_rates_equal_their_definitions(pairs):
    lists = [recommended for recommended, _ in pairs]
    expected = [recommended.index(target) if target in recommended else -1 for recommended, target in pairs]
    assert ranks_of(lists, [target for _, target in pairs]).tolist() == expected
    slots = [(place, item, one) for one in lists for place, item in enumerate(one)]
    invalid = sum(not 0 <= item < 5 for _, item, _ in slots)
    repeated = sum(item >= 0 and item in one[:place] for place, item, one in slots)
    assert invalid_rate(lists, 5) == pytest.approx(invalid / len(slots) if slots else 0)
    assert duplicate_rate(lists) == pytest.approx(repeated / len(slots) if slots else 0)


def test_ranks_of_an_array_whose_padding_is_negative():
    recommended = np.array([[3, 1, -1], [2, 0, 4]], dtype=np.int32)
    assert ranks_of(recommended, np.array([1, 4], dtype=np.int32)).tolist() == [1, 2]
    with pytest.raises(DataError, match="item row -1"):
        ranks_of(recommended, [1, -1])
    with pytest.raises(DataError, match="2 lists do not fit 3 targets"):
        ranks_of(recommended, [1, 1, 1])


RANKS = [0, 1, 6, 9, 10, -1, -1, -1]


def test_hit_rate_by_hand():
    assert [hit_rate(RANKS, k) for k in (1, 2, 7, 10, 11)] == [
        Fraction(1, 8),
        Fraction(2, 8),
        Fraction(3, 8),
        Fraction(4, 8),
        Fraction(5, 8),
    ]


def test_ndcg_by_hand():
    assert ndcg([0, 2, 6, -1], 10) == pytest.approx(float((1 + Fraction(1, 2) + Fraction(1, 3)) / 4))
    assert ndcg([0, 2, 6, -1], 6) == pytest.approx(3 / 8)  # rank 6 is the seventh place
    assert ndcg([1], 5) == pytest.approx(1 / math.log2(3))


def test_the_keys_of_ranking_metrics():
    metrics = ranking_metrics(np.array(RANKS))
    assert list(metrics) == ["HR@5", "NDCG@5", "HR@10", "NDCG@10", "HR@20", "NDCG@20"]
    assert metrics["HR@10"] == 0.5
    assert metrics["NDCG@20"] == ndcg(RANKS, 20)
    assert all(type(value) is float for value in metrics.values())


def test_bad_inputs():
    for metric in (hit_rate, ndcg):
        with pytest.raises(DataError, match="no ranks"):
            metric([], 10)
        with pytest.raises(DataError, match="k is 0"):
            metric([0], 0)


def test_values_by_hand():
    # Places 0; 1 to 3; 2; absent; 3 to 6.
    ranks = Ranks(np.array([0, 1, 2, -1, 3]), np.array([0, 2, 0, 0, 3]))
    assert values(ranks, "HR", 3) == pytest.approx([1, 2 / 3, 1, 0, 0])
    assert values(ranks, "HR", 5).tolist() == [1, 1, 1, 0, Fraction(1, 2)]
    assert values(ranks, "MRR", 3) == pytest.approx([1, (1 / 2 + 1 / 3) / 3, 1 / 3, 0, 0])
    assert values(ranks, "MRR", 9) == pytest.approx(
        [1, (1 / 2 + 1 / 3 + 1 / 4) / 3, 1 / 3, 0, (1 / 4 + 1 / 5 + 1 / 6 + 1 / 7) / 4]
    )
    assert values(ranks, "NDCG", 4) == pytest.approx(
        [1, (1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)) / 3, 1 / 2, 0, 1 / math.log2(5) / 4]
    )
    assert values(ranks, "HR", 3, "optimistic").tolist() == [1, 1, 1, 0, 0]
    assert values(ranks, "HR", 3, "pessimistic").tolist() == [1, 0, 1, 0, 0]
    assert values(ranks, "MRR", 10, "pessimistic").tolist() == [1, 1 / 4, 1 / 3, 0, 1 / 7]


def gain(metric, k, place):
    return (place < k) * {"HR": 1, "NDCG": 1 / math.log2(place + 2), "MRR": 1 / (place + 1)}[metric]


@pytest.mark.parametrize("metric", ["HR", "NDCG", "MRR"])
@given(better=st.integers(-1, 6), ties=st.integers(0, 5), k=st.integers(1, 12))
def test_values_equal_the_enumeration_of_all_orders(metric, better, ties, k):
    ranks = Ranks(np.array([better, 0]), np.array([ties if better >= 0 else 0, 0]))
    gains = [0.0]
    if better >= 0:
        orders = itertools.permutations(range(ties + 1))  # candidate 0 is the target
        gains = [gain(metric, k, better + order.index(0)) for order in orders]
    assert values(ranks, metric, k)[0] == pytest.approx(sum(gains) / len(gains), abs=1e-12)
    assert values(ranks, metric, k, "optimistic")[0] == max(gains)
    assert values(ranks, metric, k, "pessimistic")[0] == min(gains)


def test_values_of_decided_rankings_are_the_functions_that_know_no_ties():
    ranks = Ranks(np.array(RANKS), np.zeros(len(RANKS), int))
    for k in (1, 2, 7, 10, 11, 10**9):
        for ties in ("expected", "optimistic", "pessimistic"):
            assert values(ranks, "HR", k, ties).mean() == hit_rate(RANKS, k)
            assert values(ranks, "NDCG", k, ties).mean() == ndcg(RANKS, k)


def test_the_order_of_rows_moves_nothing_that_ties_leave_open():
    # 1,000 candidates of one score: a sort by row gives the target in row 0 a hit, that in row 999 a miss.
    ranks = Ranks(np.zeros(2, int), np.full(2, 999))
    assert values(ranks, "HR", 10).tolist() == [0.01, 0.01]


def test_values_agree_with_torchmetrics():
    import torch
    from torchmetrics.functional import retrieval

    rng = np.random.default_rng(0)
    theirs = {"HR": retrieval.retrieval_hit_rate, "NDCG": retrieval.retrieval_normalized_dcg}
    theirs |= {"MRR": retrieval.retrieval_reciprocal_rank}
    for k in (1, 5, 10):
        for _ in range(20):
            scores = torch.tensor(rng.permutation(30).astype(np.float32))
            target = int(rng.integers(30))
            place = int((scores > scores[target]).sum())
            wanted = torch.arange(30) == target
            ranks = Ranks(np.array([place]), np.array([0]))
            for metric, function in theirs.items():
                expected = float(function(scores, wanted, top_k=k))
                assert values(ranks, metric, k)[0] == pytest.approx(expected, abs=1e-6)
    # Its NDCG averages over ties as well (its other metrics sort).
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    tied = retrieval.retrieval_normalized_dcg(scores, torch.tensor([0, 0, 1, 0, 0]))
    assert values(Ranks(np.array([1]), np.array([2])), "NDCG", 5)[0] == pytest.approx(float(tied), abs=1e-6)


def test_bad_values():
    ranks = Ranks(np.array([0]), np.array([0]))
    with pytest.raises(DataError, match="k is 0"):
        values(ranks, "HR", 0)
    with pytest.raises(DataError, match="'MAP' with ties 'expected' is not known"):
        values(ranks, "MAP", 10)
    with pytest.raises(DataError, match="'HR' with ties 'random' is not known"):
        values(ranks, "HR", 10, "random")
    assert values(Ranks(np.empty(0, int), np.empty(0, int)), "HR", 10).tolist() == []
    assert values(Ranks(np.array([-1]), np.array([0])), "NDCG", 10, "optimistic").tolist() == [0.0]
