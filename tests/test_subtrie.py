"""Parts of a trie are the tries that would be built of their items."""

import numpy as np
import pytest
import torch
from factories import random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

import llmrec.subtrie
from llmrec.exceptions import CatalogError, RequestError
from llmrec.subtrie import ancestors, ascending, parents_of
from llmrec.trie import CatalogTrie
from llmrec.trie_tensors import TrieTensors

SIZES = (3, 4, 5)
TOKENS = [np.arange(size) + 10 * level for level, size in enumerate(SIZES)]


def built(codes, live, shared=False):
    return TrieTensors(CatalogTrie(codes, live, shared=shared), TOKENS)


def assert_alike(part, whole, codes_too=True):
    """That two tries are the same, array by array and type by type."""
    for name in ("start", "token", *(["code"] if codes_too else [])):
        for mine, its in zip(getattr(part, name), getattr(whole, name), strict=True):
            assert mine.dtype == its.dtype
            assert mine.tolist() == its.tolist()
    assert part.item_of_leaf.dtype == whole.item_of_leaf.dtype
    assert part.item_of_leaf.tolist() == whole.item_of_leaf.tolist()
    assert (part.num_leaves, part.num_items) == (whole.num_leaves, whole.num_items)
    assert part.fan_out == whole.fan_out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 60),
    kept=st.lists(st.integers(-5, 70), max_size=80),
    share=st.sampled_from([0.0, 1 / 16, 1.0]),
    shared=st.booleans(),
)
def test_a_part_is_the_trie_of_its_items(seed, num_items, kept, share, shared):
    codes = random_codes(seed, num_items, SIZES)
    rng = np.random.default_rng(seed)
    if shared:
        codes = codes[rng.integers(0, num_items, num_items)]
    live = rng.random(num_items) < 0.8
    live[0] = True
    whole = built(codes, live, shared)
    inside = np.isin(np.arange(num_items), kept) & live
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmrec.subtrie, "_DENSE", share)
        part = whole.subset(kept)
        again = part.subset(np.array(kept[: len(kept) // 2], dtype=np.int64))
    half = np.isin(np.arange(num_items), kept[: len(kept) // 2]) & live
    for found, marks in ((part, inside), (again, half)):
        assert found.num_leaves == marks.sum()
        if marks.any():
            # Places among the items of one code are those of the whole trie.
            assert_alike(found, built(codes, marks, shared), codes_too=not shared)
        else:
            assert [begins.tolist() for begins in found.start] == [[0, 0], [0], [0], [0]][: found.num_levels]
    assert_alike(whole.subset(torch.arange(num_items)), whole)


def test_rows_that_are_no_rows_are_refused():
    whole = built(random_codes(0, 20, SIZES), None)
    for rows in ([0.5], np.array([True, False]), np.zeros((2, 2), dtype=int)):
        with pytest.raises(RequestError, match="Give a list of whole numbers"):
            whole.subset(rows)


@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint8"])
def test_rows_of_any_integers_name_the_same_part(kind):
    whole = built(random_codes(0, 20, SIZES), None)
    part = whole.subset(np.array([3, 9, 3, 12], dtype=kind))
    assert sorted(part.item_of_leaf.tolist()) == [3, 9, 12]
    assert whole.subset((12, 3, 9)).item_of_leaf.equal(part.item_of_leaf)


def test_numbers_beyond_every_catalog_are_no_rows():
    whole = built(random_codes(0, 20, SIZES), None)
    for trie in (whole, whole.subset(range(20))):
        assert trie.subset([2**31, 2**32 + 3, -(2**40), -1, 20, 2**62, -(2**63)]).num_leaves == 0
        assert trie.subset([2**31 + 3, 3]).item_of_leaf.tolist() == [3]


def test_a_part_stays_what_it_is_when_its_whole_is_gone_from_view():
    codes = random_codes(1, 30, SIZES)
    whole = built(codes, None)
    part = whole.subset([4, 5, 6])
    codes_of_part = [level.tolist() for level in built(codes, np.isin(np.arange(30), [4, 5, 6])).code]
    del whole
    assert [level.tolist() for level in part.code] == codes_of_part
    with pytest.raises(CatalogError, match="leaves_of"):
        _ = part.leaf_of_item


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_items=st.integers(1, 60))
def test_ancestors_are_the_prefixes_of_a_code(seed, num_items):
    codes = random_codes(seed, num_items, SIZES)
    whole = built(codes, None)
    leaves = torch.from_numpy(np.random.default_rng(seed).integers(0, num_items, 7))
    rows = whole.item_of_leaf[leaves].tolist()
    for level, nodes in enumerate(ancestors(whole.start, leaves)):
        prefixes = sorted({tuple(row) for row in codes[:, : level + 1].tolist()})
        assert [prefixes[node] for node in nodes] == [tuple(codes[row, : level + 1].tolist()) for row in rows]
    tokens = whole.tokens_of_leaves()
    expected = [[int(TOKENS[level][code]) for level, code in enumerate(codes[row])] for row in whole.item_of_leaf]
    assert tokens.tolist() == expected


def test_parents_and_leaves_by_hand():
    begins = torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    assert parents_of(begins, torch.tensor([0, 1, 2, 3, 6], dtype=torch.int32)).tolist() == [0, 0, 1, 2, 2]
    assert (
        ascending(torch.tensor([5, 0, 5]), 6).tolist() == ascending(torch.tensor([5, 0, 5]), 6_000).tolist() == [0, 5]
    )
