import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.relevance import Relevance, SetMetric
from llmrec.exceptions import DataError

cases = st.lists(
    st.tuples(
        st.lists(st.integers(-2, 9), max_size=9),
        st.lists(st.integers(-1, 9), max_size=6).filter(lambda items: any(item >= 0 for item in items)),
    ),
    min_size=1,
    max_size=6,
)


def definition(metric, recommended, relevant, k):
    """One case, place by place."""
    wanted = {item for item in relevant if item >= 0}
    hits = [item in wanted and item not in recommended[:i] for i, item in enumerate(recommended)][:k]
    discount = [1 / math.log2(i + 2) for i in range(max(k, len(hits)))]
    if metric == "HR":
        return float(any(hits))
    if metric == "Recall":
        return sum(hits) / len(wanted)
    if metric == "Precision":
        return sum(hits) / k
    if metric == "NDCG":
        return sum(d for d, hit in zip(discount, hits, strict=False) if hit) / sum(discount[: min(k, len(wanted))])
    if metric == "MRR":
        return 1 / (hits.index(True) + 1) if True in hits else 0.0
    return sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / min(k, len(wanted))


@given(cases, st.integers(1, 12))
def test_values_equal_their_definitions(pairs, k):
    found = Relevance.from_lists([one for one, _ in pairs], [wanted for _, wanted in pairs])
    for metric in get_args(SetMetric):
        expected = [definition(metric, one, wanted, k) for one, wanted in pairs]
        assert found.values(metric, k) == pytest.approx(expected, abs=1e-12)


def test_values_by_hand():
    # Relevant items at places 1 and 3 of three; then all of two, in one list of two; then none.
    found = Relevance.from_lists([[7, 0, 8, 1, 2], [5, 6], [1, 2, 3, 4]], [[7, 8, 9], [6, 5], [0]])
    assert found.totals.tolist() == [3, 2, 1]
    assert found.values("Precision", 5).tolist() == [Fraction(2, 5) + 0.0, Fraction(2, 5) + 0.0, 0]
    assert found.values("Recall", 2) == pytest.approx([1 / 3, 1, 0])
    assert found.values("MAP", 5) == pytest.approx([(1 + 2 / 3) / 3, 1, 0])
    assert found.values("MAP", 2) == pytest.approx([1 / 2, 1, 0])  # the third relevant item has no room
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert found.values("NDCG", 3) == pytest.approx([1.5 / ideal, 1, 0])
    assert found.values("NDCG", 1).tolist() == [1, 1, 0]


def test_arrays_padded_with_negative_values():
    lists, wanted = np.array([[3, -1, 4], [-1, -1, 2]], dtype=np.int32), np.array([[4, -1], [2, 2]], dtype=np.int32)
    found = Relevance.from_lists(lists, wanted)
    assert (found.place.tolist(), found.totals.tolist()) == ([2, 2], [1, 1])
    assert found.values("MRR", 3) == pytest.approx([1 / 3, 1 / 3])
    assert found.values("HR", 2).tolist() == [0, 0]


def test_one_relevant_item_gives_the_metrics_of_one_target():
    rng = np.random.default_rng(1)
    lists = np.stack([rng.permutation(30)[:12] for _ in range(100)])
    targets = rng.integers(0, 30, size=100)
    found, ranks = Relevance.from_lists(lists, targets[:, None]), Ranks.from_lists(lists, targets)
    for k in (1, 5, 12, 20):
        for metric, same in (("HR", "HR"), ("Recall", "HR"), ("NDCG", "NDCG"), ("MRR", "MRR"), ("MAP", "MRR")):
            assert found.values(metric, k) == pytest.approx(values(ranks, same, k), abs=1e-15)


def test_values_agree_with_torchmetrics():
    import torch
    from torchmetrics.functional import retrieval

    theirs = {
        "HR": retrieval.retrieval_hit_rate,
        "Recall": retrieval.retrieval_recall,
        "Precision": retrieval.retrieval_precision,
        "NDCG": retrieval.retrieval_normalized_dcg,
        "MRR": retrieval.retrieval_reciprocal_rank,
        "MAP": retrieval.retrieval_average_precision,
    }
    rng = np.random.default_rng(0)
    for k in (1, 3, 10, 25):
        for _ in range(15):
            order, wanted = rng.permutation(25), rng.random(25) < 0.3
            wanted[rng.integers(25)] = True
            scores = np.empty(25, dtype=np.float32)
            scores[order] = np.arange(25, 0, -1)
            found = Relevance.from_lists([order], [np.flatnonzero(wanted)])
            for metric, function in theirs.items():
                expected = float(function(torch.tensor(scores), torch.tensor(wanted), top_k=k))
                if metric == "MAP":  # its denominator is the number of hits within k
                    expected *= int(found.values("Precision", k)[0] * k + 0.5) / min(k, wanted.sum())
                assert found.values(metric, k)[0] == pytest.approx(expected, abs=1e-6)


def test_bad_inputs():
    with pytest.raises(DataError, match=r"2 case\(s\) have no relevant item, such as case 1"):
        Relevance.from_lists([[1], [1], [1]], [[1], [], [-1]])
    with pytest.raises(DataError, match="1 lists do not fit 2 sets"):
        Relevance.from_lists([[1]], [[1], [2]])
    found = Relevance.from_lists([[1]], [[1]])
    with pytest.raises(DataError, match="k is 0"):
        found.values("HR", 0)
    with pytest.raises(DataError, match="'AUC' is not known"):
        found.values("AUC", 1)
    assert Relevance.from_lists([], []).values("NDCG", 3).tolist() == []
    assert Relevance.from_lists(np.empty((2, 0), int), [[0], [1]]).values("MAP", 3).tolist() == [0, 0]
