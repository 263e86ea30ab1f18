"""Beam search against its definition, on models that are nothing but tables of random logits."""

import math
from collections import Counter
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from factories import random_codes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmrec.beam import Draw, PrefixCap, TrieTensors, beam_search
from llmrec.exceptions import CatalogError, RequestError
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


def definition(model, request, codes, token_ids, beams, live, renormalize=False, cap=None):
    """Beam search with Python lists: keep the best `beams` prefixes of `live` rows per level, ties by code.

    Returns rows, scores and the levels' log-probabilities.
    """
    prefixes = [((), 0.0, ())]
    for level in range(codes.shape[1]):
        grown = []
        for prefix, score, levels in prefixes:
            path = tuple(int(token_ids[depth][code]) for depth, code in enumerate(prefix))
            logits = model.logits(request, path)
            legal = sorted({int(codes[row, level]) for row in live if tuple(codes[row, :level]) == prefix})
            tokens = [int(token_ids[level][code]) for code in legal]
            norm = (logits[tokens] if renormalize else logits).logsumexp(0)  # not used for "nothing"
            for code, token in zip(legal, tokens, strict=True):
                found = float(logits[token] - norm) if token >= 0 else 0.0
                grown.append(((*prefix, code), score + found, (*levels, found)))
        no_ties_on_paper(grown)
        prefixes = []
        kept = Counter()
        for entry in sorted(grown, key=lambda entry: (-round(entry[1], 9), entry[0])):
            branch = entry[0][: cap.levels] if cap is not None and level + 1 >= cap.levels else entry[0]
            if len(prefixes) < beams and (cap is None or kept[branch] < cap.most):
                prefixes.append(entry)
                kept[branch] += 1
    row_of = {tuple(row): place for place, row in enumerate(codes.tolist()) if place in live}
    return [(row_of[prefix], score, levels) for prefix, score, levels in prefixes]


def no_ties_on_paper(grown):
    # Sums that are equal on paper may differ in their last bit, and then their order is no matter of the search.
    # Siblings differ by their logits alone, so their ties are exact.
    assume(
        not any(
            first[0][:-1] != second[0][:-1] and abs(first[1] - second[1]) < 1e-9
            for first, second in pairwise(sorted(grown, key=lambda entry: entry[1]))
        )
    )


def check_row(found, request, expected):
    """That a request's row is the (row, score, levels) expected, and nothing behind them."""
    rows = [row for row in found.items[request].tolist() if row >= 0]
    assert rows == [row for row, _, _ in expected]
    assert len(set(rows)) == len(rows)
    scores, levels = found.scores[request], found.levels[request]
    assert np.allclose(scores[: len(rows)], [score for _, score, _ in expected], atol=1e-12)
    for place, (_, _, own) in enumerate(expected):
        assert np.allclose(levels[place, : len(own)], own, atol=1e-12)
        assert (levels[place, len(own) :] == 0).all()
    assert torch.allclose(levels.sum(-1)[: len(rows)], scores[: len(rows)], atol=1e-12)
    assert (found.items[request, len(rows) :] == -1).all()
    assert (scores[len(rows) :] == -torch.inf).all()
    assert (levels[len(rows) :] == 0).all()


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
    codes, token_ids, rng = random_items(seed, num_items)
    excluded = [rng.integers(0, num_items, size=min(gone, 30) * request) for request in range(3)]
    model = TableModel(seed, 3, rounded)
    trie = TrieTensors(CatalogTrie(codes), token_ids)
    found = beam_search(model.first(), model.step, trie, beams, excluded, renormalize)
    for request in range(3):
        live = [row for row in range(num_items) if row not in excluded[request]]
        expected = definition(model, request, codes, token_ids, beams, live, renormalize)
        check_row(found, request, expected)
        assert len(expected) == min(beams, len(live))


def random_items(seed, num_items, sizes=(3, 4, 5)):
    """Codes, token ids, and the generator that goes on."""
    rng = np.random.default_rng(seed)
    codes = random_codes(seed, num_items, sizes)
    ids = rng.permutation(VOCABULARY)[: sum(sizes)]
    return codes, np.split(ids, np.cumsum(sizes)[:-1]), rng


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), num_items=st.integers(1, 40), rounded=st.booleans(), data=st.data())
def test_requests_with_options_of_their_own_are_each_its_definition(seed, num_items, rounded, data):
    batch = 5
    codes, token_ids, rng = random_items(seed, num_items)
    whole = TrieTensors(CatalogTrie(codes), token_ids)
    parts = [rng.integers(-3, num_items + 3, size=size) for size in (0, 4, 30)]
    choices = [(whole, range(num_items)), *((whole.subset(rows), rows.tolist()) for rows in parts)]
    chosen = data.draw(st.lists(st.sampled_from(choices), min_size=batch, max_size=batch))
    # Few widths, so that requests meet which differ in nothing else.
    beams = data.draw(st.lists(st.sampled_from([2, 7, 45]), min_size=batch, max_size=batch))
    renormalize = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    cap = st.none() | st.builds(PrefixCap, st.integers(1, 3), st.integers(1, 6))
    caps = data.draw(st.lists(cap, min_size=batch, max_size=batch))
    excluded = [rng.integers(0, num_items, size=data.draw(st.sampled_from([0, 0, 5, 60]))) for _ in range(batch)]
    model = TableModel(seed, batch, rounded)
    tries = [trie for trie, _ in chosen]
    found = beam_search(model.first(), model.step, tries, beams, excluded, renormalize, caps)
    for request in range(batch):
        live = {row for row in chosen[request][1] if 0 <= row < num_items} - set(excluded[request].tolist())
        one = (codes, token_ids, beams[request], live, renormalize[request], caps[request])
        check_row(found, request, definition(model, request, *one))
        assert int((found.items[request] >= 0).sum()) <= min(beams[request], len(live))
        assert tries[request].candidates(excluded[request]) == len(live)


def ragged_definition(model, request, items, beams, excluded, renormalize, vocabulary):
    """Beam search over whole items (tuples of tokens), with Python lists: finished ones stay, and compete."""
    live = [item for row, item in enumerate(items) if row not in excluded]
    hypotheses = [((), 0.0, ())] if live else []
    while any(tokens not in live for tokens, _, _ in hypotheses):
        grown = []
        for tokens, score, levels in hypotheses:
            if tokens in live:
                grown.append((tokens, score, levels))
                continue
            logits = model.logits(request, tokens)
            legal = sorted({item[len(tokens)] for item in live if item[: len(tokens)] == tokens})
            norm = logits[legal if renormalize else vocabulary].logsumexp(0)
            own = [float(logits[token] - norm) for token in legal]
            grown += [((*tokens, token), score + p, (*levels, p)) for token, p in zip(legal, own, strict=True)]
        no_ties_on_paper(grown)
        hypotheses = sorted(grown, key=lambda entry: (-round(entry[1], 9), entry[0]))[:beams]
    return [(items.index(tokens), score, levels) for tokens, score, levels in hypotheses]


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
        check_row(found, request, expected)
        if beams >= len(items):
            assert len(expected) == len(items) - len(out)


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


def told_apart(codes):
    """Codes with one more level: the place of a row among those of its code."""
    place = [sum(map(tuple(row).__eq__, map(tuple, codes[:at].tolist()))) for at, row in enumerate(codes.tolist())]
    return np.column_stack([codes, place])


NOTHING = np.full(100, -1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 40),
    beams=st.integers(1, 50),
    renormalize=st.booleans(),
    cap=st.none() | st.builds(PrefixCap, st.integers(1, 4), st.integers(1, 4)),
)
def test_items_that_share_a_code_tie_and_the_lower_row_is_first(seed, num_items, beams, renormalize, cap):
    codes, token_ids, rng = random_items(seed, 12)
    codes = codes[rng.integers(0, 12, num_items)]
    gone = rng.integers(0, num_items, size=num_items // 3)
    retired = rng.random(num_items) < 0.2
    retired[rng.integers(num_items)] = False
    model = TableModel(seed, 1, False)
    calls = []

    def step(tokens, parents):
        calls.append(tokens)
        return model.step(tokens, parents)

    trie = TrieTensors(CatalogTrie(codes, ~retired, shared=True), token_ids)
    assert (trie.num_levels, trie.token_levels, trie.num_items) == (4, 3, int((~retired).sum()))
    found = beam_search(model.first(), step, trie, beams, [gone], renormalize, [cap])
    assert len(calls) == 2  # none for the level that has no tokens
    live = [row for row in range(num_items) if row not in gone and not retired[row]]
    model = TableModel(seed, 1, False)
    expected = definition(model, 0, told_apart(codes), [*token_ids, NOTHING], beams, live, renormalize, cap)
    check_row(found, 0, expected)
    for (row, score, _), (below, lower, _) in pairwise(expected):
        if codes[row].tolist() == codes[below].tolist():
            assert row < below
            assert score == lower
    if cap is None:
        assert len(expected) == min(beams, len(live)) == min(beams, trie.candidates(gone))


def test_a_tie_of_many_items_of_one_code_is_cut_by_row():
    codes = np.array([[1], [0], [1], [1], [0], [1]])
    trie = TrieTensors(CatalogTrie(codes, shared=True), [np.array([2, 3])])
    first = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    assert beam_search(first, None, trie, 3).items.tolist() == [[0, 2, 3]]
    assert beam_search(first, None, trie, 5, [[2]]).items.tolist() == [[0, 3, 5, 1, 4]]
    assert beam_search(first, None, trie, 6, caps=[PrefixCap(1, 1)]).items.tolist()[0][:3] == [0, 1, -1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_codes=st.integers(1, 40), beams=st.integers(1, 50), renormalize=st.booleans())
def test_an_item_of_several_codes_is_returned_once_with_its_best(seed, num_codes, beams, renormalize):
    codes, token_ids, rng = random_items(seed, num_codes)
    rows = rng.integers(0, 12, num_codes)
    gone = rng.integers(0, 14, size=3)
    trie = TrieTensors(CatalogTrie(codes), token_ids, rows=rows)
    model = TableModel(seed, 1, False)
    found = beam_search(model.first(), model.step, trie, beams, [gone], renormalize)
    live = [place for place in range(num_codes) if rows[place] not in gone]
    expected = definition(TableModel(seed, 1, False), 0, codes, token_ids, beams, live, renormalize)
    best = {}
    for place, score, levels in expected:
        best.setdefault(rows[place], (rows[place], score, levels))
    check_row(found, 0, list(best.values()))
    items = set(rows[live].tolist())
    assert trie.candidates(gone) == len(items)
    assert trie.num_items == len(set(rows.tolist()))
    if beams >= len(live):
        assert set(best) == items


def any_trie(kind, seed, num_items):
    """A trie of one of the kinds there are, and how many rows its catalog has."""
    codes, token_ids, rng = random_items(seed, min(num_items, 40))
    if kind == "ragged":
        items = ragged_items(rng, num_items)
        return ragged_tensors(items), len(items)
    if kind == "several":
        return TrieTensors(CatalogTrie(codes), token_ids, rows=rng.integers(0, 15, len(codes))), 15
    if kind == "shared":
        codes = codes[rng.integers(0, len(codes), len(codes))]
    retired = rng.random(len(codes)) < 0.2
    retired[0] = False
    return TrieTensors(CatalogTrie(codes, ~retired, shared=kind == "shared"), token_ids), len(codes)


KINDS = st.sampled_from(["plain", "ragged", "several", "shared"])
DRAWS = st.none() | st.builds(Draw, st.sampled_from([0.3, 1.0, 5.0]), st.integers(-(2**70), 2**70))
CAPS = st.none() | st.builds(PrefixCap, st.integers(1, 2), st.integers(1, 6))


@settings(max_examples=100, deadline=None)
@given(
    kind=KINDS,
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 40),
    beams=st.integers(1, 50),
    renormalize=st.booleans(),
    cap=CAPS,
    draw=DRAWS,
    data=st.data(),
)
def test_a_search_of_a_part_is_one_with_all_others_excluded(
    kind, seed, num_items, beams, renormalize, cap, draw, data
):
    trie, rows = any_trie(kind, seed, num_items)
    assume(cap is None or cap.levels <= trie.num_levels)
    kept = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=60)), dtype=int)
    gone = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=10)), dtype=int)
    others = np.setdiff1d(np.arange(rows), kept)
    options = {"renormalize": renormalize, "caps": [cap], "draws": [draw]}
    model = TableModel(seed, 1, False)
    of_part = beam_search(model.first(), model.step, trie.subset(kept), beams, [gone], **options)
    model = TableModel(seed, 1, False)
    of_whole = beam_search(model.first(), model.step, trie, beams, [np.append(others, gone)], **options)
    width = of_part.items.shape[1]
    for name in ("items", "scores", "levels"):
        assert getattr(of_part, name).equal(getattr(of_whole, name)[:, :width])
    assert (of_whole.items[:, width:] == -1).all()
    assert trie.subset(kept).candidates(gone) == trie.candidates(np.append(others, gone))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_a_request_is_answered_as_if_it_were_alone(seed, data):
    batch = 6
    model = TableModel(seed, batch, False)
    kinds = data.draw(st.lists(KINDS, min_size=2, max_size=2))
    whole = [any_trie(kind, seed + place, 30)[0] for place, kind in enumerate(kinds)]
    choices = [*whole, whole[0].subset(range(4)), whole[1].subset([])]
    options = {
        "trie": data.draw(st.lists(st.sampled_from(choices), min_size=batch, max_size=batch)),
        "num_beams": data.draw(st.lists(st.sampled_from([1, 3, 60]), min_size=batch, max_size=batch)),
        "renormalize": data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)),
        "caps": data.draw(st.lists(CAPS, min_size=batch, max_size=batch)),
        "draws": data.draw(st.lists(DRAWS, min_size=batch, max_size=batch)),
        "excluded": [list(range(place)) for place in range(batch)],
    }
    fits = zip(options["caps"], options["trie"], strict=True)
    assume(all(cap is None or cap.levels <= trie.num_levels for cap, trie in fits))
    calls = []

    def step(tokens, parents):
        calls.append(tokens)
        assert tokens.shape == parents.shape == (batch, tokens.shape[1])
        assert tokens.dtype == parents.dtype == torch.long
        return model.step(tokens, parents)

    together = beam_search(model.first(), step, **options)
    lone = 0
    for request in range(batch):
        alone = TableModel(seed, batch, False)
        own = []

        def lonely_step(tokens, parents, alone=alone, request=request, own=own):
            own.append(tokens)
            padded = torch.zeros((2, batch, tokens.shape[1]), dtype=torch.long)
            padded[0, request], padded[1, request] = tokens[0], parents[0]
            return alone.step(padded[0], padded[1])[request : request + 1]

        one = {name: values[request : request + 1] for name, values in options.items()}
        found = beam_search(alone.first()[request : request + 1], lonely_step, **one)
        width, depth = found.items.shape[1], found.levels.shape[2]
        assert found.items[0].equal(together.items[request, :width])
        assert found.scores[0].equal(together.scores[request, :width])
        assert found.levels[0].equal(together.levels[request, :width, :depth])
        assert (together.items[request, width:] == -1).all()
        assert (together.levels[request, :, depth:] == 0).all()
        lone = max(lone, len(own))
    assert len(calls) == lone  # all share each call of the model


def test_nobody_runs_the_model_for_requests_without_items():
    codes, token_ids, _ = random_items(0, 20)
    trie = TrieTensors(CatalogTrie(codes), token_ids)
    model = TableModel(0, 2, False)
    found = beam_search(model.first(), None, trie.subset([]), 4)
    assert found.items.tolist() == [[-1], [-1]]
    assert found.scores.tolist() == [[-math.inf], [-math.inf]]
    assert found.levels.tolist() == [[[0.0] * 3]] * 2
    found = beam_search(model.first(), model.step, [trie.subset([]), trie], 4)
    assert found.items[0].tolist() == [-1] * 4
    assert (found.items[1] >= 0).all()
    assert found.scores[1].equal(beam_search(model.first(), TableModel(0, 2, False).step, trie, 4).scores[1])


def test_what_no_search_can_be():
    codes, token_ids, _ = random_items(0, 20)
    trie = TrieTensors(CatalogTrie(codes), token_ids)
    first = torch.zeros((2, VOCABULARY))
    with pytest.raises(RequestError, match="num_beams is 0"):
        beam_search(first, None, trie, [3, 0])
    with pytest.raises(RequestError, match="1 caps do not fit 2 requests"):
        beam_search(first, None, trie, 3, caps=[None])
    with pytest.raises(RequestError, match="first 4 levels does not fit items of 3"):
        beam_search(first, None, trie, 3, caps=[None, PrefixCap(4, 1)])


def drawn(model, request, codes, token_ids, live, draw, beams, cap=None):
    """Stochastic beam search with Decimals, in the formula's plain form: codes and perturbed values, in order."""
    key = mixed(draw.seed + STEP)
    prefixes = [((), Decimal(0), Decimal(0), key)]
    for level in range(codes.shape[1]):
        grown = []
        for prefix, total, greatest, key in prefixes:
            path = tuple(int(token_ids[depth][code]) for depth, code in enumerate(prefix))
            legal = sorted({int(codes[row, level]) for row in live if tuple(codes[row, :level]) == prefix})
            if not legal:
                continue
            tokens = [int(token_ids[level][code]) for code in legal]
            logits = [float(model.logits(request, path)[token]) if token >= 0 else 0.0 for token in tokens]
            weights = [(Decimal(logit) / Decimal(draw.temperature)).exp() for logit in logits]
            keys = [mixed(key + (code + 1) * STEP) for code in legal]
            own = [total + (weight / sum(weights)).ln() for weight in weights]
            free = [p - (-Decimal(uniform_of(k)).ln()).ln() for p, k in zip(own, keys, strict=True)]
            bound = [(-greatest).exp() - (-max(free)).exp() + (-one).exp() for one in free]
            grown += [
                ((*prefix, code), p, -value.ln(), k) for code, p, value, k in zip(legal, own, bound, keys, strict=True)
            ]
        prefixes, kept = [], Counter()
        for entry in sorted(grown, key=lambda entry: (-entry[2], entry[0])):
            branch = entry[0][: cap.levels] if cap is not None and level + 1 >= cap.levels else entry[0]
            if len(prefixes) < beams and (cap is None or kept[branch] < cap.most):
                prefixes.append(entry)
                kept[branch] += 1
    return [(prefix, greatest) for prefix, _, greatest, _ in prefixes]


STEP = 0x9E3779B97F4A7C15


def mixed(key):
    """splitmix64's finaliser, in Python's integers."""
    key %= 2**64
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    return key ^ key >> 31


def uniform_of(key):
    return ((mixed(key ^ 0xBF58476D1CE4E5B9) >> 12) + 0.5) / 2**52


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 40),
    draw=st.builds(Draw, st.sampled_from([0.2, 1.0, 30.0]), st.integers(0, 2**53)),
    beams=st.integers(1, 50),
    cap=CAPS,
    shared=st.booleans(),
    renormalize=st.booleans(),
)
def test_a_draw_is_its_definition(seed, num_items, draw, beams, cap, shared, renormalize):
    codes, token_ids, rng = random_items(seed, num_items)
    if shared:
        codes = codes[rng.integers(0, num_items, num_items)]
    gone = rng.integers(0, num_items, size=num_items // 4)
    live = [row for row in range(num_items) if row not in gone]
    trie = TrieTensors(CatalogTrie(codes, shared=shared), token_ids)
    model = TableModel(seed, 1, False)
    found = beam_search(model.first(), model.step, trie, beams, [gone], renormalize, [cap], [draw])
    if shared:
        codes, token_ids = told_apart(codes), [*token_ids, NOTHING]
    with localcontext(prec=60):
        expected = drawn(TableModel(seed, 1, False), 0, codes, token_ids, live, draw, beams, cap)
        if cap is None:  # the first W of all, drawn one by one
            all_of_them = drawn(TableModel(seed, 1, False), 0, codes, token_ids, live, draw, num_items)
            assert expected == all_of_them[:beams]
    row_of = {tuple(row): place for place, row in enumerate(codes.tolist()) if place in live}
    true = definition(TableModel(seed, 1, False), 0, codes, token_ids, num_items, live, renormalize)
    whole = {row: (row, score, levels) for row, score, levels in true}
    check_row(found, 0, [whole[row_of[prefix]] for prefix, _ in expected])


def test_draws_have_the_distribution_that_they_say():
    from scipy.stats import chisquare

    draws, temperature = 40_000, 1.7
    codes = np.array([[0, 0], [0, 1], [0, 3], [1, 2], [2, 0], [2, 1], [2, 3]])
    trie = TrieTensors(CatalogTrie(codes), [np.arange(3), np.arange(3, 7)])
    first, second = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 7)))

    def step(tokens, parents):
        return torch.stack([second * (1 + token) for token in range(3)])[tokens]

    found = beam_search(
        first.expand(draws, -1), step, trie, 2, draws=[Draw(temperature, seed) for seed in range(draws)]
    )
    chances = torch.zeros(len(codes), dtype=torch.float64)
    for row, (head, _) in enumerate(codes):
        heads, tails = (first[:3] / temperature).softmax(0), second[3:] * (1 + head) / temperature
        siblings = codes[codes[:, 0] == head, 1]
        chances[row] = heads[head] * tails[siblings].softmax(0)[(codes[:row, 0] == head).sum()]
    assert float(chances.sum()) == pytest.approx(1.0)
    once = np.bincount(found.items[:, 0], minlength=len(codes))
    assert chisquare(once, draws * chances.numpy()).pvalue > 1e-3
    pairs = np.bincount(found.items[:, 0] * len(codes) + found.items[:, 1], minlength=len(codes) ** 2)
    expected = chances.unsqueeze(1) * chances / (1 - chances.unsqueeze(1))
    apart = ~np.eye(len(codes), dtype=bool).flatten()
    assert pairs[~apart].sum() == 0
    assert chisquare(pairs[apart], draws * expected.flatten().numpy()[apart]).pvalue > 1e-3


def test_a_cold_draw_takes_the_best_child_of_the_best_child():
    codes, token_ids, _ = random_items(3, 40)
    trie = TrieTensors(CatalogTrie(codes), token_ids)

    def search(draw):
        model = TableModel(3, 1, False)
        return beam_search(model.first(), model.step, trie, 10, draws=[draw])

    model = TableModel(3, 1, False)
    surest = definition(model, 0, codes, token_ids, 1, range(40))[0][0]  # the best child of the best child
    for temperature in (1e-9, 1e-300):
        cold = search(Draw(temperature, 1))
        assert cold.items[0, 0] == surest
        assert (cold.items >= 0).all()
    assert search(Draw(1.0, 1)).items.equal(search(Draw(1.0, 1 + 2**64)).items)
    assert not search(Draw(1.0, 1)).items.equal(search(Draw(1.0, 2)).items)


def test_scores_that_are_not_numbers_are_items_not_found_in_a_draw_too():
    trie = TrieTensors(CatalogTrie(np.array([[0], [1], [2]])), [np.array([0, 1, 2])])
    first = torch.tensor([[0.0, torch.nan, -torch.inf, 1.0]])
    assert beam_search(first, None, trie, 3, draws=[Draw()]).items.tolist() == [[-1, -1, -1]]
    found = beam_search(first, None, trie, 3, renormalize=True, excluded=[[1]], draws=[Draw()])
    assert found.items.tolist() == [[0, -1, -1]]
    assert found.scores.tolist() == [[0.0, -math.inf, -math.inf]]
