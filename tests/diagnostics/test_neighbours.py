"""Neighbours against exact fractions, and the purity of codes against loops over pairs."""

import json
from collections import Counter
from fractions import Fraction
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from llmrec.diagnostics import co_sold, nearest_texts, neighbour_purity
from llmrec.diagnostics import neighbours as module
from llmrec.exceptions import DataError, TokenizerError


def padded(rows: list[int], k: int) -> list[int]:
    return rows[:k] + [-1] * (k - len(rows))


def co_sold_exactly(train: list[list[int]], num_items: int, k: int, window: int) -> list[list[int]]:
    counts: Counter = Counter()
    for history in train:
        for i, first in enumerate(history):
            for j in range(i + 1, min(i + window, len(history) - 1) + 1):
                if first != history[j]:
                    counts[first, history[j]] += Fraction(1, j - i)
                    counts[history[j], first] += Fraction(1, j - i)
    totals = Counter()
    for (first, _), count in counts.items():
        totals[first] += count
    result = []
    for item in range(num_items):
        # The square of the cosine, without what is the same for all partners.
        scores = {other: counts[item, other] ** 2 / totals[other] for other in totals if counts[item, other]}
        ranked = sorted(scores, key=lambda other: (-scores[other], other))
        result.append(padded(ranked, k))
    return result


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_co_sold_is_the_definition(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(1, 12))
    history = st.lists(st.integers(0, num_items - 1), max_size=8)
    train = data.draw(st.lists(history, max_size=12))
    k, window = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    arrays = [np.array(one, dtype=np.int32) for one in train]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PAIRS", data.draw(st.sampled_from([1, 5, 1 << 22])))
        found = co_sold(arrays, num_items, k, window)
    assert found.dtype == np.int64
    assert found.tolist() == co_sold_exactly(train, num_items, k, window)


def test_a_partner_of_one_pair_ties_with_another_by_row() -> None:
    # Item 3 meets 0, 1 and 2 at distances 3, 1 and 2 in one history and at 2, 1 and 3 in another.
    train = [np.array([0, 2, 1, 3]), np.array([2, 0, 1, 3])]
    assert co_sold(train, 4, k=3)[3].tolist() == [1, 0, 2]


def test_the_order_of_float_sums_decides_no_tie() -> None:
    # The partners' cosines are equal as fractions and differ in float64.
    train = [[3, 1, 2, 5, 4, 0], [1, 2, 0, 4, 5, 3], [3, 5, 1, 4, 0, 2]]
    found = co_sold([np.array(history) for history in train], 6, k=5, window=5)
    assert found.tolist() == co_sold_exactly(train, 6, 5, 5)


def test_millions_of_items_stay_sparse() -> None:
    found = co_sold([np.array([2_999_999, 7])], 3_000_000, k=2)
    assert found.shape == (3_000_000, 2)
    assert (found[7].tolist(), found[2_999_999].tolist()) == ([2_999_999, -1], [7, -1])
    assert int((found >= 0).sum()) == 2


def nearest_exactly(vectors: list[list[int]], k: int) -> list[list[int]]:
    squares = [sum(x * x for x in vector) for vector in vectors]
    result = []
    for row, vector in enumerate(vectors):
        near = []
        for other, candidate in enumerate(vectors):
            if other != row and squares[row] and squares[other]:
                product = sum(x * y for x, y in zip(vector, candidate, strict=True))
                near.append((-Fraction(product * abs(product), squares[other]), other))
        result.append(padded([other for _, other in sorted(near)], k))
    return result


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_nearest_texts_are_the_definition(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    vector = st.lists(st.integers(-2, 2), min_size=width, max_size=width)  # with equal, scaled and zero vectors
    vectors = data.draw(st.lists(vector, min_size=1, max_size=30))
    k = data.draw(st.integers(1, 8))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64, np.int64]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SPARE", data.draw(st.sampled_from([0, 1, 22])))
        patch.setattr(module, "_QUERIES", data.draw(st.sampled_from([3, 1024])))
        patch.setattr(module, "_NUMBERS", data.draw(st.sampled_from([1, 50, 1 << 23])))
        rows, found = nearest_texts(np.array(vectors, dtype=dtype), k)
    assert rows.tolist() == list(range(len(vectors)))
    assert found.tolist() == nearest_exactly(vectors, k)


@pytest.mark.parametrize("spare", [0, 22])
def test_what_float32_cannot_tell_apart_is_told(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPARE", spare)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(4, 16))
    vectors = centres[np.arange(400) % 4] + 1e-8 * generator.normal(size=(400, 16))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = np.round(unit @ unit.T, 12)
    np.fill_diagonal(cosines, -np.inf)
    _, found = nearest_texts(vectors, 7)
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :7]
    reached = np.take_along_axis(cosines, found, axis=1)
    np.testing.assert_allclose(reached, np.take_along_axis(cosines, expected, axis=1), atol=2e-12, rtol=0)
    # Of one centre's items all cosines are 1 to 12 decimals.
    np.testing.assert_array_equal(found, [[j for j in range(i % 4, 400, 4) if j != i][:7] for i in range(400)])


def test_a_near_tie_far_from_the_query_is_ordered() -> None:
    # 60 vectors whose cosines with row 0 differ by some 1e-9 each, descending with the row.
    angles = 1.0 - 1e-9 * np.arange(60)
    vectors = np.concatenate([[[1.0, 0.0]], np.stack([np.cos(angles), np.sin(angles)], axis=1)])
    _, found = nearest_texts(vectors, 5)
    assert found[0].tolist() == [60, 59, 58, 57, 56]


def test_a_sample_asks_about_some_items_and_answers_the_same() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    vectors[9] = 0
    everything = nearest_texts(vectors, 4)[1]
    rows, found = nearest_texts(vectors, 4, sample=20, seed=5)
    assert len(rows) == 20 == len(np.unique(rows))
    assert rows.tolist() == sorted(rows.tolist())
    np.testing.assert_array_equal(found, everything[rows])
    np.testing.assert_array_equal(rows, nearest_texts(vectors, 4, sample=20, seed=5)[0])
    assert nearest_texts(vectors, 4, sample=20, seed=6)[0].tolist() != rows.tolist()
    assert nearest_texts(vectors, 4, sample=50)[0].tolist() == list(range(50))
    assert (everything[9] == -1).all()
    assert 9 not in everything


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_vectors_are_searched_once_and_found_all(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 3))
    some = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    few = data.draw(st.lists(some, min_size=1, max_size=5))  # so that most have many equals, in any order
    vectors = data.draw(st.lists(st.sampled_from(few), min_size=1, max_size=40))
    k = data.draw(st.integers(1, 45))
    sample = data.draw(st.none() | st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SPARE", data.draw(st.sampled_from([0, 22])))
        patch.setattr(module, "_QUERIES", data.draw(st.sampled_from([1, 1024])))
        rows, found = nearest_texts(np.array(vectors, dtype=np.float32), k, sample)
    assert found.tolist() == [nearest_exactly(vectors, k)[row] for row in rows]


def test_many_equal_vectors_are_searched_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(3000, 8)).astype(np.float32)
    vectors[generator.permutation(3000)[:2000]] = vectors[0]
    vectors[5] = -0.0  # no cosine, with a sign or without
    vectors[6:8] = [[1, 0, 0, 0, 0, 0, 0, 0], [1, -0.0, 0, 0, 0, 0, 0, 0]]
    searched = []
    knn = faiss.knn

    def counted(queries: np.ndarray, unit: np.ndarray, depth: int, metric: int) -> Any:
        searched.append((len(queries), len(unit), depth))
        return knn(queries, unit, depth, metric)

    monkeypatch.setattr(faiss, "knn", counted)
    _, found = nearest_texts(vectors, 10)
    distinct = len(set(map(tuple, vectors.tolist()))) - 1
    assert sum(queries for queries, _, _ in searched) == distinct
    assert {unit for _, unit, _ in searched} == {distinct}
    assert max(depth for _, _, depth in searched) < 40
    alike = np.flatnonzero((vectors == vectors[0]).all(axis=1))
    assert found[alike[0]].tolist() == alike[1:11].tolist()
    assert found[alike[4]].tolist() == [*alike[:4], *alike[5:11]]
    assert found[alike[50]].tolist() == found[alike[-1]].tolist() == alike[:10].tolist()
    assert (found[5] == -1).all()
    assert 5 not in found


def purity_by_loops(codes: list, neighbours: list, rows: list) -> list[dict]:
    result = []
    for length in range(1, len(codes[0]) + 1):
        prefixes = [tuple(code[:length]) for code in codes]
        same, chance = [], []
        for row, near in zip(rows, neighbours, strict=True):
            for other in near:
                if other >= 0:
                    same.append(prefixes[row] == prefixes[other])
                    others = [prefixes[one] == prefixes[row] for one in range(len(codes)) if one != row]
                    chance.append(Fraction(sum(others), len(others)))
        pairs = len(same)
        result.append(
            {
                "prefix": length,
                "purity": sum(same) / pairs if pairs else None,
                "chance": float(sum(chance) / pairs) if pairs else None,
                "lift": float(Fraction(sum(same)) / sum(chance)) if pairs and sum(chance) else None,
                "pairs": pairs,
            }
        )
    return result


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_purity_is_the_definition(data: st.DataObject) -> None:
    items, levels = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 3))
    code = st.lists(st.integers(0, 2), min_size=levels, max_size=levels)
    codes = data.draw(st.lists(code, min_size=items, max_size=items))
    every = list(range(items))
    rows = data.draw(st.none() | st.lists(st.sampled_from(every), max_size=8, unique=True))
    k = data.draw(st.integers(1, 4))
    asked = every if rows is None else rows
    near = [data.draw(st.lists(st.sampled_from([-1, *every]), min_size=k, max_size=k)) for _ in asked]
    near = [[-1 if other == row else other for other in found] for row, found in zip(asked, near, strict=True)]
    found = neighbour_purity(
        np.array(codes),
        np.array(near, dtype=np.int64).reshape(-1, k),
        None if rows is None else np.array(rows, dtype=np.int64),
    )
    json.dumps(found, allow_nan=False)
    for one, expected in zip(found, purity_by_loops(codes, near, asked), strict=True):
        interval = one.pop("interval95")
        assert one == pytest.approx(expected)
        if sum(any(other >= 0 for other in found) for found in near) < 2:
            assert interval is None
        else:
            assert 0 <= interval[0] <= one["purity"] <= interval[1] <= 1


def test_all_pairs_of_items_have_the_purity_of_chance() -> None:
    codes = np.array([[0], [0], [0], [1], [1], [2]])
    everyone = np.array([[other for other in range(6) if other != row] for row in range(6)])
    (found,) = neighbour_purity(codes, everyone)
    assert found["purity"] == found["chance"] == pytest.approx((3 * 2 + 2 * 1) / (6 * 5))
    assert found["lift"] == pytest.approx(1)


def test_the_interval_covers_and_knows_of_clusters() -> None:
    """95 % of the intervals of samples of items hold the purity of all, though pairs of one item agree alike."""
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(2), 500)[:, None]
    # An item's neighbours are all of its own half or all of the other.
    loyal = generator.random(1000) < 0.7
    near = (generator.integers(0, 500, size=(1000, 10)) + 500 * (codes == loyal[:, None])) % 1000
    near = np.where(near == np.arange(1000)[:, None], -1, near)
    (whole,) = neighbour_purity(codes, near)
    covered, widths = 0, []
    for seed in range(300):
        rows = np.random.default_rng(seed).integers(0, 1000, 80)
        (found,) = neighbour_purity(codes, near[rows], rows)
        low, high = found["interval95"]
        covered += low <= whole["purity"] <= high
        widths.append(high - low)
    assert 0.91 <= covered / 300 <= 0.985
    # As many independent pairs would give an interval about a third as wide.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 80), rel=0.1)


def nearest_points(dimension: int, items: int) -> np.ndarray:
    """(N, 10) the nearest of random points: mostly mutual in 3 dimensions, with hubs in 64."""
    points = np.random.default_rng(dimension).normal(size=(items, dimension))
    return cKDTree(points).query(points, 11)[1][:, 1:]


@pytest.mark.parametrize(("dimension", "hub"), [(3, 15), (64, 100)])
@pytest.mark.parametrize(("size", "skew"), [(8, 0.0), (16, 0.0), (32, 1.0)])
def test_the_interval_of_random_codes_covers(dimension: int, hub: int, size: int, skew: float) -> None:
    """Pairs are often there twice, once from each side, and hubs are the neighbours of many."""
    near = nearest_points(dimension, 500)
    assert np.bincount(near.ravel()).max() > hub
    chances = np.arange(1, size + 1) ** -skew
    chances /= chances.sum()
    expected = chances @ chances
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        (found,) = neighbour_purity(generator.choice(size, (500, 1), p=chances), near)
        low, high = found["interval95"]
        covered += low <= expected <= high
    assert 0.92 <= covered / 600 <= 0.985


def interval_by_loops(codes: list[int], pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """By the double sum over all pairs of pairs that have an item in common."""
    same = [codes[a] == codes[b] for a, b in pairs]
    share = sum(same) / len(pairs)
    left = [one - share for one in same]
    dyadic = owners = twos = 0.0
    for (a, b), first in zip(pairs, left, strict=True):
        for (c, d), second in zip(pairs, left, strict=True):
            dyadic += first * second if {a, b} & {c, d} else 0
            owners += first * second if a == c else 0
            twos += first * second if {a, b} == {c, d} else 0
    count = len({a for a, _ in pairs})
    half = 1.959963984540054 * (count / (count - 1) * max(dyadic, owners, twos)) ** 0.5 / len(pairs)
    return max(0.0, share - half), min(1.0, share + half)


@pytest.mark.parametrize("seed", range(12))
def test_the_interval_is_the_double_sum(seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 1 + seed % 3 + 1, 14)
    near = np.stack([generator.permutation([row for row in range(14) if row != own])[:3] for own in range(14)])
    near[generator.random(near.shape) < 0.2] = -1
    pairs = [(row, int(other)) for row in range(14) for other in near[row] if other >= 0]
    (found,) = neighbour_purity(codes[:, None], near)
    assert found["interval95"] == pytest.approx(interval_by_loops(codes.tolist(), pairs))


def test_without_pairs_there_is_no_purity() -> None:
    found = neighbour_purity(np.array([[0, 1], [0, 2]]), np.full((2, 3), -1))
    assert [(one["purity"], one["chance"], one["lift"], one["pairs"], one["interval95"]) for one in found] == [
        (None, None, None, 0, None)
    ] * 2
    assert neighbour_purity(np.array([[0]]), np.zeros((0, 3), np.int64), np.zeros(0, np.int64))[0]["purity"] is None


def test_codes_that_are_all_different_have_no_lift() -> None:
    (found,) = neighbour_purity(np.arange(3)[:, None], np.array([[1], [2], [0]]))
    assert (found["purity"], found["chance"], found["lift"], found["interval95"]) == (0, 0, None, [0, 0])


def test_misuse_is_refused() -> None:
    codes = np.array([[0], [1], [1]])
    with pytest.raises(DataError, match="k is 0"):
        co_sold([], 3, k=0)
    with pytest.raises(DataError, match="catalog has 3 items"):
        co_sold([np.array([0, 3])], 3)
    with pytest.raises(DataError, match="k is -1"):
        nearest_texts(np.ones((2, 2)), k=-1)
    with pytest.raises(DataError, match="sample of 0 items"):
        nearest_texts(np.ones((2, 2)), sample=0)
    with pytest.raises(TokenizerError, match="row 1 first"):
        nearest_texts(np.array([[0.0], [np.inf]]))
    with pytest.raises(DataError, match=r"shape \(2, 1\) do not belong to rows of shape \(3,\)"):
        neighbour_purity(codes, np.array([[1], [0]]))
    with pytest.raises(DataError, match="outside the 3 items"):
        neighbour_purity(codes, np.array([[1], [3], [0]]))
    with pytest.raises(DataError, match="outside the 3 items"):
        neighbour_purity(codes, np.array([[1]]), np.array([3]))
    with pytest.raises(DataError, match="outside the 3 items"):
        neighbour_purity(codes, np.array([[1]]), np.array([-1]))
    with pytest.raises(DataError, match="its own neighbour"):
        neighbour_purity(codes, np.array([[1], [0], [2]]))
