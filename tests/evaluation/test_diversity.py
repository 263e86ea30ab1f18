import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation.diversity import coverage, gini, intra_list_diversity, novelty
from llmrec.exceptions import DataError

ITEMS = 6
some_lists = st.lists(st.lists(st.integers(-1, ITEMS - 1), max_size=5), max_size=8)


def slots(lists):
    return [item for one in lists for item in one if item >= 0]


@given(some_lists)
def test_coverage_and_gini_equal_their_definitions(lists):
    shown = [slots(lists).count(item) for item in range(ITEMS)]
    assert coverage(lists, ITEMS) == sum(count > 0 for count in shown) / ITEMS
    gaps = sum(abs(a - b) for a in shown for b in shown)
    assert gini(lists, ITEMS) == pytest.approx(gaps / (2 * ITEMS * sum(shown)) if sum(shown) else 0.0)


@given(some_lists, st.lists(st.integers(0, 9), min_size=ITEMS, max_size=ITEMS).filter(any))
def test_novelty_equals_its_definition(lists, counts):
    bits = [-math.log2(max(counts[item], 1) / sum(counts)) for item in slots(lists)]
    assert novelty(lists, counts) == pytest.approx(sum(bits) / len(bits) if bits else 0.0, abs=1e-12)


def test_gini_by_hand():
    assert gini([[0, 1], [2, 3]], 4) == 0
    assert gini([[0, 0], [0, -1]], 4) == 0.75
    # Exposures 0, 0, 1, 3: 2 (3 + 12) / 16 - 5/4
    assert gini([[2, 3], [3, 3]], 4) == pytest.approx(0.625)
    assert gini([[0]], 1) == 0


def test_items_that_are_never_shown_count():
    assert gini([[0, 1]], 2) == 0
    assert gini([[0, 1]], 200) == pytest.approx(0.99)


def pair_by_pair(lists, vectors):
    means = []
    for one in lists:
        items = [item for item in one if item >= 0]
        distances = []
        for i, a in enumerate(items):
            for b in items[:i]:
                norm = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
                distances.append(1 - (vectors[a] @ vectors[b] / norm if norm else 0.0))
        if distances:
            means.append(np.mean(distances))
    return np.mean(means) if means else 0.0


@given(some_lists, st.integers(0, 2**32 - 1))
def test_intra_list_diversity_equals_its_definition(lists, seed):
    vectors = np.random.default_rng(seed).normal(size=(ITEMS, 3))
    vectors[0] = 0
    assert intra_list_diversity(lists, vectors) == pytest.approx(pair_by_pair(lists, vectors), abs=1e-9)


def test_padded_arrays_and_batches(monkeypatch):
    rng = np.random.default_rng(0)
    lists = rng.integers(-1, 50, size=(40, 6)).astype(np.int32)
    lists[3] = [-1, -1, -1, 4, -1, -1]
    lists[4] = -1
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    whole = intra_list_diversity(lists, vectors)
    assert whole == pytest.approx(pair_by_pair(lists.tolist(), vectors.astype(float)))
    monkeypatch.setattr("llmrec.evaluation.diversity._GATHER_BYTES", 8 * 8 * 6 * 7)
    assert intra_list_diversity(lists, vectors) == pytest.approx(whole, abs=1e-12)
    assert coverage(lists, 50) == coverage(lists.tolist(), 50)


def test_intra_list_diversity_by_hand():
    vectors = [[1, 0], [0, 2], [3, 0], [-1, 0], [0, 0]]
    assert intra_list_diversity([[0, 1]], vectors) == pytest.approx(1)
    assert intra_list_diversity([[0, 2]], vectors) == pytest.approx(0)
    assert intra_list_diversity([[0, 3]], vectors) == pytest.approx(2)
    assert intra_list_diversity([[0, 4]], vectors) == pytest.approx(1)
    assert intra_list_diversity([[0, 0]], vectors) == pytest.approx(0)
    assert intra_list_diversity([[0, 1, 2], [4]], vectors) == pytest.approx(2 / 3)
    assert intra_list_diversity([[0], []], vectors) == 0


def test_nothing_recommended():
    for lists in ([], [[]], [[-1]], np.full((2, 3), -1)):
        assert (coverage(lists, 3), gini(lists, 3), novelty(lists, [1, 0, 0])) == (0, 0, 0)


def test_bad_inputs():
    for function in (coverage, gini):
        with pytest.raises(DataError, match="item row 3, the catalog 3"):
            function([[0, 3]], 3)
        with pytest.raises(DataError, match="0 items"):
            function([], 0)
    with pytest.raises(DataError, match="item row 3, the catalog 3"):
        novelty([[3]], [1, 1, 1])
    with pytest.raises(DataError, match="item row 3, the catalog 3"):
        intra_list_diversity([[3, 0]], np.ones((3, 2)))
    for counts in ([0, 0], [3, -1], []):
        with pytest.raises(DataError, match="gives no shares"):
            novelty([[0]], counts)
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        intra_list_diversity([[0]], np.ones(3))
    broken = np.ones((3, 2))
    broken[1, 0] = np.nan
    with pytest.raises(DataError, match="item row 1 is not finite"):
        intra_list_diversity([[0, 1]], broken)
    assert intra_list_diversity([[0, 2]], broken) == pytest.approx(0)
