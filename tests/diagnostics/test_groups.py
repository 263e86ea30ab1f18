"""Groups of items with one ID, against a dictionary of tuples."""

import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.diagnostics import collision_groups
from llmrec.exceptions import TokenizerError


def by_dictionary(codes: np.ndarray) -> list[list[int]]:
    """All IDs' rows, most rows first, then by first row."""
    rows = defaultdict(list)
    for row, code in enumerate(codes.tolist()):
        rows[tuple(code)].append(row)
    return sorted(rows.values(), key=lambda group: (-len(group), group[0]))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_groups_are_those_of_a_dictionary(data: st.DataObject) -> None:
    levels, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    row = st.tuples(*[st.integers(0, size - 1)] * levels)
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=40)), dtype=np.int32)
    limit = data.draw(st.integers(0, 6))
    found = collision_groups(codes, limit)
    json.dumps(found, allow_nan=False)
    groups = by_dictionary(codes)
    shared = [group for group in groups if len(group) > 1]
    sizes = [len(group) for group in shared]
    assert found == {
        "items": len(codes),
        "unique": len(groups),
        "collision_rate": pytest.approx(1 - len(groups) / len(codes), abs=1e-15),
        "sharing_items": sum(sizes),
        "sharing_rate": sum(sizes) / len(codes),
        "largest_group": len(groups[0]),
        "histogram": [[size, sizes.count(size)] for size in sorted(set(sizes))],
        "groups": shared[:limit],
    }


def test_ties_go_to_the_lowest_row_whatever_the_code() -> None:
    codes = np.array([[9], [1], [9], [0], [1], [0], [5], [5], [5]])
    assert collision_groups(codes)["groups"] == [[6, 7, 8], [0, 2], [1, 4], [3, 5]]
    assert collision_groups(codes, limit=2)["groups"] == [[6, 7, 8], [0, 2]]


def test_unique_codes_have_no_groups() -> None:
    found = collision_groups(np.array([[0, 1], [1, 0], [1, 1]]))
    assert (found["collision_rate"], found["sharing_rate"], found["largest_group"]) == (0.0, 0.0, 1)
    assert found["histogram"] == found["groups"] == []


def test_misuse_is_refused() -> None:
    with pytest.raises(TokenizerError, match="limit of -1 groups"):
        collision_groups(np.array([[0]]), limit=-1)
    with pytest.raises(TokenizerError, match="no semantic IDs"):
        collision_groups(np.zeros((0, 3), np.int64))
