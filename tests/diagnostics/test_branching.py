"""The code tree's counts, against sets of tuples and entropies of their definition."""

import json
import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.diagnostics import prefix_branching
from llmrec.diagnostics.branching import prefix_groups
from llmrec.exceptions import TokenizerError


def entropy(counts: Counter, items: int) -> float:
    return -math.fsum(count / items * math.log2(count / items) for count in counts.values())


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_branching_is_the_definition(data: st.DataObject) -> None:
    levels, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    row = st.tuples(*[st.integers(0, size - 1)] * levels)
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=40)), dtype=np.uint8)
    found = prefix_branching(codes)
    json.dumps(found, allow_nan=False)
    assert [one["level"] for one in found] == list(range(1, levels + 1))
    items = len(codes)
    for level, one in enumerate(found, start=1):
        below = Counter(tuple(code[:level]) for code in codes.tolist())
        above = Counter(tuple(code[: level - 1]) for code in codes.tolist())
        children = list(Counter(prefix[:-1] for prefix in below).values())
        assert one["prefixes"] == len(below)
        assert one["children_mean"] == pytest.approx(statistics.mean(children))
        assert one["children_median"] == statistics.median(children)
        assert one["children_max"] == max(children)
        assert one["items_mean"] == pytest.approx(items / len(below))
        assert one["items_max"] == max(below.values())
        assert one["alone_share"] == sum(count == 1 for count in below.values()) / items
        conditional = entropy(below, items) - entropy(above, items)
        assert one["conditional_entropy_bits"] == pytest.approx(conditional, abs=1e-12)
        assert one["conditional_entropy_bits"] >= 0


def test_a_level_that_the_others_decide_tells_nothing() -> None:
    codes = np.array([[0, 5, 1], [1, 7, 1], [1, 7, 1], [2, 5, 0]])
    first, second, third = prefix_branching(codes)
    assert first["conditional_entropy_bits"] == 1.5
    assert second["conditional_entropy_bits"] == third["conditional_entropy_bits"] == 0
    assert (second["children_max"], second["prefixes"], second["alone_share"]) == (1, 3, 0.5)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_prefixes_are_numbered_in_lexicographic_order(data: st.DataObject) -> None:
    levels = data.draw(st.integers(1, 4))
    code = st.sampled_from([0, 1, 2, 255, 2**31 - 1, 2**32, 2**62])
    codes = np.array(data.draw(st.lists(st.tuples(*[code] * levels), min_size=1, max_size=30)), dtype=np.int64)
    numbered = prefix_groups(codes)
    for length, group in enumerate(numbered, start=1):
        prefixes = [tuple(row[:length]) for row in codes.tolist()]
        ranked = sorted(set(prefixes))
        assert group.tolist() == [ranked.index(prefix) for prefix in prefixes]


def test_unsigned_codes_do_not_wrap() -> None:
    codes = np.array([[2**64 - 1, 0], [0, 2**64 - 1], [2**64 - 1, 1]], dtype=np.uint64)
    assert [group.tolist() for group in prefix_groups(codes)] == [[1, 0, 1], [1, 0, 2]]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 2), np.int64), r"shape \(0, 2\) are no semantic IDs"),
        (np.zeros((2, 0), np.int64), r"shape \(2, 0\)"),
        (np.zeros(3, np.int64), r"shape \(3,\)"),
        (np.array([[0.5]]), "not whole numbers"),
        (np.array([[True]]), "not whole numbers"),
        (np.array([[0, 1], [2, -1]]), r"row 1 are \[2, -1\]"),
    ],
)
def test_misuse_is_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        prefix_branching(codes)
