import numpy as np
import pytest
from factories import random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import CatalogError
from llmrec.trie import CatalogTrie


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([(64,), (8, 8), (4, 5, 6), (2, 3, 4, 5)]))
def test_children_are_those_of_the_code_table(seed, num_items, sizes):
    codes = random_codes(seed, min(num_items, int(np.prod(sizes))), sizes)
    trie = CatalogTrie(codes)
    prefixes = {tuple(row[:depth]) for row in codes.tolist() for depth in range(len(sizes) + 1)}
    for prefix in [*prefixes, (99,), (*codes[0, :-1].tolist(), 99)]:
        depth = len(prefix)
        expected = sorted(
            {row[depth] for row in codes.tolist() if depth < len(sizes) and tuple(row[:depth]) == prefix}
        )
        assert trie.children(prefix) == expected


def test_leaves_are_rows_in_lexicographic_order():
    codes = random_codes(3, 50, (4, 5, 6))
    trie = CatalogTrie(codes)
    assert codes[trie.item_of_leaf].tolist() == sorted(codes.tolist())
    assert (trie.leaf_of_item[trie.item_of_leaf] == np.arange(50)).all()
    assert trie.num_levels == 3
    assert trie.num_items == 50


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_dead_nodes_are_those_with_no_item_left(seed, excluded_count):
    rng = np.random.default_rng(seed)
    codes = random_codes(seed, 40, (3, 4, 5))
    trie = CatalogTrie(codes)
    # Repeats, an empty request in the middle, and a request that excludes everything.
    excluded = [rng.integers(0, 40, excluded_count), np.array([], dtype=np.int64), np.arange(40)]
    dead = trie.dead_nodes(excluded)
    for level in range(3):
        keys = set(dead[level].tolist())
        assert sorted(keys) == dead[level].tolist()
        for request, gone in enumerate(excluded):
            for node in range(len(trie.code[level])):
                leaves = trie.item_of_leaf[trie.first_leaf[level][node] : trie.first_leaf[level][node + 1]]
                expected = set(leaves.tolist()) <= set(gone.tolist())
                assert (request * len(trie.code[level]) + node in keys) == expected


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 3)), "at least one item"),
        (np.array([[1, 2], [1, 2]]), "share the code"),
        (np.array([[-1, 2]]), "negative"),
    ],
)
def test_codes_that_are_no_catalog(codes, message):
    with pytest.raises(CatalogError, match=message):
        CatalogTrie(codes)
