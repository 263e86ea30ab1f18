"""Exact search against a brute force in float64 and the beam search of a one-level trie; faiss against exact."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.beam import beam_search
from llmrec.catalog import Catalog
from llmrec.exceptions import DependencyError, RequestError
from llmrec.selection import Draw
from llmrec.sequence import index as index_module
from llmrec.sequence.index import ExactIndex, FaissIndex, ItemPool, Wanted, open_index, recall
from llmrec.trie_tensors import TrieTensors


def pool_of(mask):
    return ItemPool(torch.as_tensor(np.asarray(mask, dtype=bool)))


def brute_force(query, table, wanted):
    """Rows and scores by definition: a stable sort of the log-softmax."""
    logits = table.double().numpy() @ query.double().numpy()
    legal = wanted.pool.mask.numpy().copy()
    legal[[row for row in wanted.excluded if 0 <= row < len(legal)]] = False
    over = logits[legal] if wanted.renormalize else logits
    total = np.log(np.exp(over - over.max()).sum()) + over.max() if len(over) else 0.0
    rows = [row for row in np.argsort(-logits, kind="stable") if legal[row]][: wanted.k]
    return rows, (logits - total)[rows]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exact_search_is_brute_force(data):
    draw = data.draw
    num_items, width = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Whole numbers, whose inner products are exact: many ties.
    table = torch.from_numpy(rng.integers(-2, 3, size=(num_items, width)).astype(np.float64))
    batch = draw(st.integers(1, 5))
    queries = torch.from_numpy(rng.integers(-2, 3, size=(batch, width)).astype(np.float64))
    wanted = [
        Wanted(
            draw(st.integers(1, num_items + 3)),
            pool_of(rng.random(num_items) < draw(st.sampled_from([0.0, 0.3, 1.0]))),
            rng.integers(-2, num_items + 2, size=draw(st.integers(0, 5))),
            draw(st.booleans()),
        )
        for _ in range(batch)
    ]
    index = ExactIndex(table, chunk=draw(st.integers(1, 40)))
    found = index.search(queries, wanted)
    assert len(found) == batch
    for query, one, ranked in zip(queries, wanted, found, strict=True):
        rows, scores = brute_force(query, table, one)
        assert ranked.rows.tolist() == rows
        assert ranked.scores.tolist() == pytest.approx(scores.tolist(), abs=1e-9)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 5.0])
@pytest.mark.parametrize("renormalize", [False, True])
def test_draws_are_those_of_the_beam_search(temperature, renormalize):
    rng = np.random.default_rng(3)
    table, queries = torch.from_numpy(rng.normal(size=(50, 4))), torch.from_numpy(rng.normal(size=(6, 4)))
    retired = rng.random(50) < 0.2
    catalog = Catalog.of_rows([{"item_id": str(row)} for row in range(50)], retired)
    excluded = [rng.integers(0, 50, size=4) for _ in range(6)]
    draws = [Draw(temperature, seed) for seed in range(6)]
    beams = beam_search(
        queries @ table.T,
        lambda *_: pytest.fail("an item has one level"),
        TrieTensors.of(catalog),
        12,
        excluded,
        renormalize,
        draws=draws,
    )
    wanted = [Wanted(12, pool_of(~retired), excluded[b], renormalize, draws[b]) for b in range(6)]
    wanted[2] = Wanted(12, pool_of(~retired), excluded[2], renormalize)  # the best, between draws
    for place, ranked in enumerate(ExactIndex(table, chunk=70).search(queries, wanted)):
        if place == 2:
            assert ranked.rows.tolist() == brute_force(queries[2], table, wanted[2])[0]
            continue
        assert ranked.rows.tolist() == beams.items[place].tolist()
        assert ranked.scores.tolist() == pytest.approx(beams.scores[place].tolist(), abs=1e-9)


def test_a_draw_has_the_probabilities_of_the_softmax():
    table, query = torch.tensor([[0.0], [1.0], [2.0], [9.0]]).double(), torch.ones(1, 1).double()
    index, pool = ExactIndex(table), pool_of([True, True, True, False])
    first = [int(index.search(query, [Wanted(1, pool, draw=Draw(2.0, seed))])[0].rows[0]) for seed in range(3_000)]
    expected = torch.tensor([0.0, 0.5, 1.0]).softmax(0)
    shares = torch.bincount(torch.tensor(first), minlength=3) / 3_000
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_equal_logits_are_ordered_by_row_across_chunks():
    table = torch.ones(1_000, 2)
    for chunk in (7, 100, 10_000):
        (found,) = ExactIndex(table, chunk).search(torch.ones(1, 2), [Wanted(5, pool_of(np.ones(1_000)), [1])])
        assert found.rows.tolist() == [0, 2, 3, 4, 5]
        assert found.scores.tolist() == pytest.approx([-np.log(1_000)] * 5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_tables_are_scored_in_float32(dtype):
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(300, 8))).to(dtype)
    queries = torch.from_numpy(rng.normal(size=(3, 8))).to(dtype)
    wanted = [Wanted(20, pool_of(np.ones(300)))] * 3
    for query, ranked in zip(queries, ExactIndex(table, 128).search(queries, wanted), strict=True):
        rows, scores = brute_force(query, table, wanted[0])
        assert ranked.rows.tolist() == rows
        assert ranked.scores.dtype == torch.float32
        assert ranked.scores.tolist() == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("draw", [None, Draw()])
def test_scores_that_are_no_numbers_find_nothing(broken, draw):
    table = torch.ones(10, 2)
    table[3] = broken
    (found,) = ExactIndex(table).search(torch.ones(1, 2), [Wanted(4, pool_of(np.ones(10)), draw=draw)])
    assert found.rows.tolist() == []


def test_a_log_probability_is_that_of_the_search():
    rng = np.random.default_rng(1)
    table, query = torch.from_numpy(rng.normal(size=(90, 5))), torch.from_numpy(rng.normal(size=(1, 5)))
    for retrieval in ("exact", "faiss-flat"):
        index = open_index(table, retrieval)
        (found,) = index.search(query, [Wanted(9, pool_of(np.ones(90)))])
        for row, score in zip(found.rows.tolist(), found.scores.tolist(), strict=True):
            assert float(index.log_probability(query, row)) == pytest.approx(score, abs=1e-6)


def test_pools():
    pool = pool_of([1, 1, 0, 1, 1, 0])
    assert pool.count == 4
    part = pool.subset([4, 2, 0, 99, -1])
    assert part.mask.tolist() == [True, False, False, False, True, False]
    assert pool.mask.tolist() == [True, True, False, True, True, False]
    assert pool.without([3, 2, 3, 0, 77]).tolist() == [0, 3]
    assert pool.without([]).tolist() == []


@pytest.fixture(scope="module")
def clustered():
    """6,000 items in clusters, as trained ones lie, and queries near them."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(100, 16))
    table = centres[rng.integers(0, 100, 6_000)] + 0.3 * rng.normal(size=(6_000, 16))
    queries = centres[rng.integers(0, 100, 40)] + 0.3 * rng.normal(size=(40, 16))
    return torch.from_numpy(table).float(), torch.from_numpy(queries).float()


@pytest.mark.parametrize(("kind", "least"), [("faiss-flat", 1.0), ("faiss-ivf", 0.9), ("faiss-hnsw", 0.9)])
def test_faiss_finds_nearly_the_same_and_scores_it_so(clustered, monkeypatch, kind, least):
    table, queries = clustered
    monkeypatch.setattr(index_module, "_SAMPLED_ROWS", 1_500)
    index = open_index(table, kind)
    assert recall(index, queries, 20) >= least
    wanted = [Wanted(20, pool_of(np.ones(len(table))), [5, 6])] * len(queries)
    exact = ExactIndex(table).search(queries, wanted)
    found = index.search(queries, wanted)
    for best, ranked in zip(exact, found, strict=True):
        scores = dict(zip(best.rows.tolist(), best.scores.tolist(), strict=True))
        both = [(scores[row], score) for row, score in zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True)
                if row in scores]  # fmt: skip
        off = [found - right for right, found in both]
        assert max(off) - min(off) < 1e-4  # one normaliser for all of a query's items,
        assert abs(np.mean(off)) < 0.1  # near the true one
        assert ranked.scores.tolist() == sorted(ranked.scores.tolist(), reverse=True)


@pytest.mark.parametrize("kind", ["faiss-flat", "faiss-ivf", "faiss-hnsw"])
@pytest.mark.parametrize("share", [0.5, 0.01, 0.002, 0.0])
def test_faiss_looks_on_until_filters_leave_enough(clustered, kind, share):
    table, queries = clustered
    index = open_index(table, kind)
    mask = np.random.default_rng(1).random(len(table)) < share
    wanted = [Wanted(15, pool_of(mask), np.flatnonzero(mask)[:3])] * 4
    exact = ExactIndex(table).search(queries[:4], wanted)
    for best, ranked in zip(exact, index.search(queries[:4], wanted), strict=True):
        assert len(ranked.rows) == len(best.rows) == min(15, max(0, mask.sum() - 3))
        assert mask[ranked.rows.numpy()].all()
        assert not set(ranked.rows.tolist()) & set(np.flatnonzero(mask)[:3].tolist())
        if kind == "faiss-flat":
            assert ranked.rows.tolist() == best.rows.tolist()


def test_faiss_answers_exactly_what_needs_all_items(clustered):
    table, queries = clustered
    index, pool = open_index(table, "faiss-ivf"), pool_of(np.ones(len(table)))
    wanted = [Wanted(5, pool, renormalize=True), Wanted(5, pool), Wanted(5, pool, draw=Draw(1.0, 3))]
    found, exact = index.search(queries[:3], wanted), ExactIndex(table).search(queries[:3], wanted)
    for place in (0, 2):
        assert found[place].rows.tolist() == exact[place].rows.tolist()
        assert found[place].scores.tolist() == pytest.approx(exact[place].scores.tolist(), abs=1e-4)


def test_a_normaliser_from_a_whole_sample_is_exact():
    rng = np.random.default_rng(2)
    table, query = torch.from_numpy(rng.normal(size=(700, 6))).float(), torch.from_numpy(rng.normal(size=(1, 6)))
    wanted = [Wanted(10, pool_of(np.ones(700)))]
    (found,), (exact,) = (open_index(table, kind).search(query.float(), wanted) for kind in ("faiss-flat", "exact"))
    assert found.scores.tolist() == pytest.approx(exact.scores.tolist(), abs=1e-5)


def test_recall_counts_what_is_missing():
    class Worse(ExactIndex):
        def search(self, queries, wanted):
            return [type(one)(one.rows[1:], one.scores[1:]) for one in super().search(queries, wanted)]

    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(40, 3)))
    assert recall(Worse(table), table[:5], 4) == 0.75
    assert recall(ExactIndex(table), table[:5], 4) == 1.0


def test_what_no_index_can_be_made_of(monkeypatch):
    with pytest.raises(RequestError, match="no retrieval 'annoy'"):
        open_index(torch.ones(3, 2), "annoy")
    with pytest.raises(RequestError, match="not numbers"):
        FaissIndex(torch.full((3, 2), torch.nan), "faiss-flat")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match="needs faiss"):
        open_index(torch.ones(3, 2), "faiss-flat")
