"""The search over static shapes: the same as `beam_search`, and traceable without a look at any value."""

import numpy as np
import pytest
import torch
from factories import random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from llmrec.beam import TrieTensors, beam_search
from llmrec.exceptions import CatalogError
from llmrec.kernels.select import pad_keys, places
from llmrec.kernels.static_search import StaticSearch
from llmrec.trie import CatalogTrie

VOCABULARY, SIZES = 40, (3, 6, 5)
# Operations whose outcome, or whose shape, the host would have to wait for.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "item", "equal")


class Tables:
    """Logits of the newest token alone, per level: a model that two searches can ask in the same way."""

    def __init__(self, seed, requests, dtype, rounded):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(SIZES), requests, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64) * 2
        self.tables = (drawn.round() if rounded else drawn).to(dtype)
        self.first = self.tables[0, :, 0]
        self.level = 0

    def step(self, tokens, parents):
        self.level += 1
        return self.tables[self.level].gather(1, tokens.unsqueeze(-1).expand(-1, -1, VOCABULARY))


def random_trie(seed, num_items, ragged=False, **options):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(VOCABULARY)[: sum(SIZES)]
    token_ids = np.split(ids, np.cumsum(SIZES)[:-1])
    codes = random_codes(seed, num_items, SIZES)
    if ragged:  # an item ends behind code 1, and then code 0, "nothing", follows alone
        for level in range(1, len(SIZES)):
            over = codes[:, level - 1] <= 1 if level > 1 else codes[:, 0] == 1
            codes[:, level] = np.where(over, 0, np.maximum(codes[:, level], 1))
            token_ids[level] = token_ids[level].copy()
            token_ids[level][0] = -1
        codes = np.unique(codes, axis=0)
    return TrieTensors(CatalogTrie(codes), token_ids, **options)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 60),
    beams=st.integers(1, 70),
    gone=st.integers(0, 60),
    renormalize=st.booleans(),
    rounded=st.booleans(),
    ragged=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_static_search_is_the_search(seed, num_items, beams, gone, renormalize, rounded, ragged, dtype):
    rng = np.random.default_rng(seed)
    trie = random_trie(seed, num_items, ragged)
    excluded = [rng.integers(0, trie.num_rows, size=min(gone, 20) * request) for request in range(3)]
    one, other = (Tables(seed, 3, dtype, rounded) for _ in range(2))
    expected = beam_search(one.first, one.step, trie, beams, excluded, renormalize)
    keys = trie.dead_keys(excluded)
    dead = [pad_keys(k, place) for k, place in zip(keys, places([len(k) for k in keys]), strict=True)]
    found = StaticSearch(trie, beams, renormalize).run(other.first, other.step, dead)
    width = min(expected.items.shape[1], found.items.shape[1])
    for name in ("items", "scores", "levels"):
        assert torch.equal(getattr(found, name)[:, :width], getattr(expected, name)[:, :width])
    for rest in (expected.items[:, width:], found.items[:, width:]):
        assert (rest == -1).all()
    assert other.level == len(SIZES) - 1


def test_a_vocabulary_and_items_that_share_codes_or_have_several():
    vocabulary = np.arange(0, VOCABULARY)
    rows = np.array([0, 1, 2, 0, 1, 3, 4, 5, 5, 5])
    for trie in (
        random_trie(1, 30, vocabulary=vocabulary[::-1].copy()),
        random_trie(2, 10, rows=rows),
        TrieTensors(
            CatalogTrie(np.array([[0, 1], [0, 1], [1, 0], [0, 1]]), shared=True), [np.array([3, 5]), np.array([7, 9])]
        ),
    ):
        one, other = (Tables(4, 2, torch.float64, False) for _ in range(2))
        expected = beam_search(one.first, one.step, trie, 6)
        found = StaticSearch(trie, 6).run(other.first, other.step)
        live = (expected.items >= 0).sum(1)
        assert torch.equal((found.items >= 0).sum(1), live)
        for request, number in enumerate(live.tolist()):
            for name in ("items", "scores", "levels"):
                mine, theirs = (getattr(beams, name)[request, :number] for beams in (found, expected))
                assert torch.equal(mine, theirs)


def traced_level(search, level, requests, dead, renormalize=False):
    """One level as a graph of torch's basic operations, made of tensors without values."""
    before = search.widths[level - 1] if level else 1
    score = torch.zeros(requests, before)
    state = (torch.zeros(requests, before, dtype=torch.long), score, torch.zeros(requests, before, level))
    logits = torch.zeros(requests, before, VOCABULARY)

    def advance(logits, node, score, gains, dead):
        given = search.begin(logits[:, 0])._replace(node=node, score=score, gains=gains)
        return tuple(search.advance(level, logits, given, dead))

    return make_fx(advance, tracing_mode="fake", _allow_non_fake_inputs=True)(logits, *state, dead)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("excluding", [False, True])
def test_no_operation_waits_for_a_value(renormalize, excluding):
    search = StaticSearch(random_trie(0, 50), 12, renormalize)
    for level in range(len(SIZES)):
        dead = torch.full((16,), torch.iinfo(torch.int64).max) if excluding else None
        graph = traced_level(search, level, 2, dead)
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert len(names) > 10
        assert not [name for name in names if any(word in name.split(".") for word in WAITING)]


def test_the_trace_would_notice_a_wait():
    """The library's own search reads a fan-out back; the tracing that the test above relies on refuses that."""
    trie, tables = random_trie(0, 50), Tables(0, 2, torch.float32, False)
    with pytest.raises(Exception, match=r"(?i)data.dependent|fake|_local_scalar_dense"):
        make_fx(lambda logits: beam_search(logits, tables.step, trie, 4).items, tracing_mode="fake")(tables.first)


def test_a_traced_graph_is_right_for_other_values_of_its_shapes():
    trie = random_trie(3, 50)
    search, tables = StaticSearch(trie, 12), Tables(7, 2, torch.float32, False)
    expected = StaticSearch(trie, 12).run(tables.first, tables.step)
    tables.level = 0
    state = search.begin(tables.first)
    logits = tables.first.unsqueeze(1)
    for level in range(len(SIZES)):
        graph = traced_level(search, level, 2, None)
        state = type(state)(*graph(logits, state.node, state.score, state.gains, None))
        if level + 1 < len(SIZES):
            logits = tables.step(state.token, state.parent)
    found = search.finish(state)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_whole_levels_compile_without_a_break():
    search, tables = StaticSearch(random_trie(5, 40), 9), Tables(1, 2, torch.float32, False)
    compiled = torch.compile(search.advance, backend="eager", fullgraph=True, dynamic=False)
    state, logits = search.begin(tables.first), tables.first.unsqueeze(1)
    for level in range(len(SIZES)):
        mine, expected = compiled(level, logits, state), search.advance(level, logits, state)
        assert all(torch.equal(one, other) for one, other in zip(mine, expected, strict=True))
        state = expected
        logits = tables.step(state.token, state.parent) if level + 1 < len(SIZES) else logits


def test_shapes_follow_from_the_catalog_and_not_from_what_is_excluded():
    trie = random_trie(6, 30)
    search = StaticSearch(trie, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = search.advance(0, torch.zeros(4, 1, VOCABULARY), search.begin(torch.zeros(4, VOCABULARY)))
    assert state.node.shape == (4, search.widths[0]) == (4, 3)
    tables = Tables(2, 4, torch.float32, False)
    keys = trie.dead_keys([np.arange(30)] * 4)
    found = search.run(tables.first, tables.step, [pad_keys(k, 256) for k in keys])
    assert (found.items == -1).all()
    assert found.items.shape == (4, 8)


def test_no_beams_and_no_items_are_refused():
    with pytest.raises(CatalogError, match="0 beams"):
        StaticSearch(random_trie(0, 5), 0)
    with pytest.raises(CatalogError, match="no item"):
        StaticSearch(random_trie(0, 5).subset([]), 3)
