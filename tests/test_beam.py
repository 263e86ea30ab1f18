"""Beam search against its definition, on models that are nothing but tables of random logits."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from factories import random_codes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmrec.beam import TrieTensors, beam_search
from llmrec.exceptions import CatalogError
from llmrec.title_spelling import codes_of_tokens
from llmrec.trie import CatalogTrie

VOCABULARY = 40


class TableModel:
    """Logits drawn per (request, prefix of tokens): a worst case for caches and parents, with ties if rounded."""

    def __init__(self, seed: int, batch: int, rounded: bool) -> None:
        self.seed, self.batch, self.rounded = seed, batch, rounded
        self.paths: list[list[tuple[int, ...]]] = [[()] for _ in range(batch)]

    def logits(self, request: int, path: tuple[int, ...]) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, request, *path])
        values = rng.normal(size=VOCABULARY) * 2
        return torch.from_numpy(np.round(values) if self.rounded else values)

    def first(self) -> torch.Tensor:
        return torch.stack([self.logits(request, ()) for request in range(self.batch)])

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        self.paths = [
            [(*self.paths[r][p], t) for t, p in zip(tokens[r].tolist(), parents[r].tolist(), strict=True)]
            for r in range(self.batch)
        ]
        return torch.stack([torch.stack([self.logits(r, path) for path in self.paths[r]]) for r in range(self.batch)])


def definition(model, request, codes, token_ids, beams, excluded, renormalize):
    """Beam search with Python lists: keep the best `beams` live prefixes per level, ties by code."""
    live = [row for row in range(len(codes)) if row not in excluded]
    prefixes = [((), 0.0)]
    for level in range(codes.shape[1]):
        grown = []
        for prefix, score in prefixes:
            path = tuple(int(token_ids[depth][code]) for depth, code in enumerate(prefix))
            logits = model.logits(request, path)
            legal = sorted({int(codes[row, level]) for row in live if tuple(codes[row, :level]) == prefix})
            tokens = [int(token_ids[level][code]) for code in legal]
            norm = (logits[tokens] if renormalize else logits).logsumexp(0)
            grown += [
                ((*prefix, code), score + float(logits[t] - norm)) for code, t in zip(legal, tokens, strict=True)
            ]
        # Sums that are equal on paper may differ in their last bit, and then their order is no matter of the search.
        # Siblings differ by their logits alone, so their ties are exact.
        assume(
            not any(
                a[:-1] != b[:-1] and abs(first - second) < 1e-9
                for (a, first), (b, second) in pairwise(sorted(grown, key=lambda entry: entry[1]))
            )
        )
        prefixes = sorted(grown, key=lambda entry: (-round(entry[1], 9), entry[0]))[:beams]
    row_of = {tuple(row): place for place, row in enumerate(codes.tolist())}
    return [(row_of[prefix], score) for prefix, score in prefixes]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 40),
    beams=st.integers(1, 50),
    gone=st.integers(0, 45),
    renormalize=st.booleans(),
    rounded=st.booleans(),
)
def test_beam_search_is_its_definition(seed, num_items, beams, gone, renormalize, rounded):
    sizes = (3, 4, 5)
    rng = np.random.default_rng(seed)
    codes = random_codes(seed, num_items, sizes)
    ids = rng.permutation(VOCABULARY)[: sum(sizes)]
    token_ids = np.split(ids, np.cumsum(sizes)[:-1])
    excluded = [rng.integers(0, num_items, size=min(gone, 30) * request) for request in range(3)]
    model = TableModel(seed, 3, rounded)
    trie = TrieTensors(CatalogTrie(codes), token_ids)
    found = beam_search(model.first(), model.step, trie, beams, excluded, renormalize)
    for request in range(3):
        expected = definition(model, request, codes, token_ids, beams, set(excluded[request].tolist()), renormalize)
        rows = [row for row in found.items[request].tolist() if row >= 0]
        assert rows == [row for row, _ in expected]
        assert np.allclose(found.scores[request, : len(rows)], [score for _, score in expected], atol=1e-12)
        assert (found.items[request, len(rows) :] == -1).all()
        assert torch.isinf(found.scores[request, len(rows) :]).all()
        assert len(set(rows)) == len(rows)
        left = num_items - len(set(excluded[request].tolist()))
        assert len(rows) == min(beams, left)


def ragged_definition(model, request, items, beams, excluded, renormalize, vocabulary):
    """Beam search over whole items (tuples of tokens), with Python lists: finished ones stay, and compete."""
    live = [item for row, item in enumerate(items) if row not in excluded]
    hypotheses = [((), 0.0)] if live else []
    while any(hypothesis not in live for hypothesis, _ in hypotheses):
        grown = []
        for tokens, score in hypotheses:
            if tokens in live:
                grown.append((tokens, score))
                continue
            logits = model.logits(request, tokens)
            legal = sorted({item[len(tokens)] for item in live if item[: len(tokens)] == tokens})
            norm = logits[legal if renormalize else vocabulary].logsumexp(0)
            grown += [((*tokens, token), score + float(logits[token] - norm)) for token in legal]
        assume(
            not any(
                a[:-1] != b[:-1] and abs(first - second) < 1e-9
                for (a, first), (b, second) in pairwise(sorted(grown, key=lambda entry: entry[1]))
            )
        )
        hypotheses = sorted(grown, key=lambda entry: (-round(entry[1], 9), entry[0]))[:beams]
    return [(items.index(tokens), score) for tokens, score in hypotheses]


def ragged_items(rng, num_items, end=3, longest=5):
    """Different tuples of few tokens, so that many share their beginning; all end with `end`."""
    tokens = np.setdiff1d(rng.permutation(VOCABULARY)[:4], [end])
    found = {(*rng.choice(tokens, size=rng.integers(0, longest)).tolist(), end) for _ in range(num_items)}
    return [tuple(map(int, item)) for item in rng.permutation(np.array([*found, None], dtype=object)) if item]


def ragged_tensors(items, vocabulary=None):
    codes = codes_of_tokens(items)
    table = np.arange(-1, VOCABULARY)
    return TrieTensors(CatalogTrie(codes), [table] * codes.shape[1], vocabulary=vocabulary)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 40),
    beams=st.integers(1, 45),
    gone=st.integers(0, 45),
    renormalize=st.booleans(),
    rounded=st.booleans(),
    narrow=st.booleans(),
)
def test_beam_search_over_ragged_items_is_its_definition(seed, num_items, beams, gone, renormalize, rounded, narrow):
    rng = np.random.default_rng(seed)
    items = ragged_items(rng, num_items)
    vocabulary = np.unique([token for item in items for token in item] + [7, 11, 38]) if narrow else None
    excluded = [rng.integers(0, len(items), size=min(gone, 30) * request) for request in range(3)]
    model = TableModel(seed, 3, rounded)
    found = beam_search(model.first(), model.step, ragged_tensors(items, vocabulary), beams, excluded, renormalize)
    norm_over = list(range(VOCABULARY)) if vocabulary is None else vocabulary.tolist()
    for request in range(3):
        out = set(excluded[request].tolist())
        expected = ragged_definition(model, request, items, beams, out, renormalize, norm_over)
        rows = [row for row in found.items[request].tolist() if row >= 0]
        assert rows == [row for row, _ in expected]
        assert np.allclose(found.scores[request, : len(rows)], [score for _, score in expected], atol=1e-12)
        assert torch.isinf(found.scores[request, len(rows) :]).all()
        if beams >= len(items):
            assert len(rows) == len(items) - len(out)


def test_a_search_ends_once_all_its_items_have_ended():
    # Ten times as probable, the short item is found alone, and nobody runs the model for the long one's tokens.
    trie = ragged_tensors([(5, 0), (6, *[7] * 20, 0)])
    calls = []

    def step(tokens, parents):
        calls.append(tokens.tolist())
        return torch.full((*tokens.shape, VOCABULARY), torch.nan if len(calls) > 1 else 0.0, dtype=torch.float64)

    first = torch.zeros((1, VOCABULARY), dtype=torch.float64)
    first[0, 5] = math.log(10)
    found = beam_search(first, step, trie, 1)
    assert found.items.tolist() == [[0]]
    assert found.scores[0].tolist() == pytest.approx([math.log(10 / 49) - math.log(40)], abs=1e-12)
    assert calls == [[[5]]]
    calls.clear()
    found = beam_search(first, step, trie, 2, [np.array([1])])  # the second beam is dead, and nobody waits for it
    assert found.items.tolist() == [[0, -1]]
    assert len(calls) == 1


def test_a_finished_item_is_not_hurt_by_what_its_beam_computes():
    trie = ragged_tensors([(5, 0), (6, 7, 7, 0)])
    seen = []

    def step(tokens, parents):
        seen.append(tokens[0].tolist())
        logits = torch.zeros((*tokens.shape, VOCABULARY), dtype=torch.float64)
        return logits.masked_fill((tokens == 0).unsqueeze(-1), torch.nan)  # what the finished beam was fed

    found = beam_search(torch.zeros((1, VOCABULARY), dtype=torch.float64), step, trie, 2)
    assert found.items.tolist() == [[0, 1]]
    assert found.scores[0].tolist() == pytest.approx([-2 * math.log(40), -4 * math.log(40)], abs=1e-12)
    assert seen == [[5, 6], [0, 7], [0, 7]]


def test_probabilities_over_a_range_of_the_vocabulary_by_hand():
    # The logits' exponentials are 1, 2, 3 and 4; the softmax range are the tokens 0, 2 and 3.
    trie = TrieTensors(CatalogTrie(np.array([[0], [1]])), [np.array([0, 2])], vocabulary=np.array([3, 0, 2, 2]))
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).log()
    found = beam_search(first, lambda *_: first, trie, 2)
    assert found.scores[0].tolist() == pytest.approx([math.log(3 / 8), math.log(1 / 8)], abs=1e-15)
    first[0, 1] = torch.nan  # what a loss over the range alone never trained
    assert beam_search(first, lambda *_: first, trie, 2).scores.equal(found.scores)
    with pytest.raises(CatalogError, match=r"1 token\(s\) of items are outside the softmax range, 2 first"):
        TrieTensors(CatalogTrie(np.array([[0], [1]])), [np.array([0, 2])], vocabulary=np.array([0, 3]))


def test_scores_by_hand():
    # Two items, <0, 0> and <1, 0>, in a vocabulary of four; the first token's logits are ln 1, ln 2, ln 3, ln 4.
    trie = TrieTensors(CatalogTrie(np.array([[0, 0], [1, 0]])), [np.array([0, 2]), np.array([1])])
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).log()
    found = beam_search(first, lambda tokens, parents: torch.zeros((1, 2, 4), dtype=torch.float64), trie, 2)
    assert found.items.tolist() == [[1, 0]]
    expected = [math.log(3 / 10) + math.log(1 / 4), math.log(1 / 10) + math.log(1 / 4)]
    assert found.scores[0].tolist() == pytest.approx(expected, abs=1e-15)
    again = beam_search(
        first, lambda tokens, parents: torch.zeros((1, 2, 4), dtype=torch.float64), trie, 2, renormalize=True
    )
    assert again.scores[0].tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)], abs=1e-15)


@pytest.mark.parametrize("renormalize", [False, True])
def test_ties_of_everything_are_ordered_by_code(renormalize):
    codes = random_codes(1, 64, (4, 4, 4))
    trie = TrieTensors(CatalogTrie(codes), [np.arange(4), np.arange(4, 8), np.arange(8, 12)])

    def step(tokens, parents):
        assert tokens.dtype == parents.dtype == torch.long  # what models take
        return torch.zeros((*tokens.shape, 16))

    found = beam_search(torch.zeros((2, 16)), step, trie, 7, None, renormalize)
    assert codes[found.items[0]].tolist() == [[0, code // 4, code % 4] for code in range(7)]
    assert found.items[0].tolist() == found.items[1].tolist()
    assert found.items.dtype == torch.long


def test_half_precision_logits_are_summed_in_float32():
    trie = TrieTensors(CatalogTrie(np.array([[0], [1]])), [np.array([0, 1])])
    found = beam_search(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), lambda *_: torch.empty(0), trie, 2)
    assert found.scores.dtype == torch.float32
    assert found.scores[0].tolist() == pytest.approx([-0.3132617, -1.3132617], abs=1e-6)
