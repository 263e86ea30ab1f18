"""New runs by way of the suffix tree are those of a dictionary that is kept as one."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.scaling.run_dictionary import _paths, new_run_lengths
from llmrec.scaling.suffix_automaton import Tokens, links

SEQUENCES = (
    st.lists(st.integers(0, 3), min_size=1, max_size=60)
    | st.lists(st.integers(0, 1), min_size=1, max_size=200)
    | st.lists(st.integers(0, 20), min_size=1, max_size=60)
    | st.integers(1, 100).map(lambda times: [0, 1, 0, 2] * times)
    | st.integers(1, 100).map(lambda times: [0] * times + [1] + [0] * times)
)


def by_dictionary(tokens: list[int]) -> list[int]:
    """The runs walked token by token down a trie of what was new."""
    children: dict[tuple[int, int], int] = {}
    lengths = []
    for start in range(len(tokens)):
        node, place = 0, start
        while place < len(tokens):
            child = children.get((node, tokens[place]))
            if child is None:
                children[node, tokens[place]] = len(children) + 1
                break
            node, place = child, place + 1
        lengths.append(place - start + 1)
    return lengths


def numbered(tokens: npt.ArrayLike) -> Tokens:
    return np.unique(tokens, return_inverse=True)[1].astype(np.int32)


@settings(max_examples=400, deadline=None)
@given(SEQUENCES)
def test_new_runs_are_the_dictionary_s(tokens: list[int]) -> None:
    sequence = numbered(tokens)
    assert new_run_lengths(sequence).tolist() == by_dictionary(sequence.tolist())


@pytest.mark.parametrize("items", [1, 2, 5, 100, 3000])
def test_new_runs_in_longer_sequences(items: int) -> None:
    generator = np.random.default_rng(items)
    sequence = numbered((generator.random(3000) ** 2 * items).astype(np.int64))
    assert new_run_lengths(sequence).tolist() == by_dictionary(sequence.tolist())
    periodic = numbered(np.tile(sequence[:300], 10))
    assert new_run_lengths(periodic).tolist() == by_dictionary(periodic.tolist())


def test_sequences_that_repeat_themselves_take_few_steps() -> None:
    """Of one item n times the runs are of 1, 2, ... until the rest is known; walked, they are n^2 / 4 steps."""
    n = 1_000_000
    found = new_run_lengths(np.zeros(n, dtype=np.int32))
    assert (found == np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1) + 1)).all()


@settings(max_examples=100, deadline=None)
@given(SEQUENCES)
def test_no_node_has_more_paths_above_it_than_the_logarithm(tokens: list[int]) -> None:
    tree = links(numbered(tokens))
    heavy, top = _paths(tree.length, tree.link)
    for node in range(len(top)):
        assert heavy[node] < 0 or tree.link[heavy[node]] == node
        paths = 0
        while node >= 0:
            paths += 1
            node = int(tree.link[top[node]])
        assert 2 ** (paths - 1) <= len(top)
