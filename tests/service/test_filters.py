"""Filters against a definition that asks one item after another; keys, errors, candidates."""

import numpy as np
import pytest
from factories import random_catalog
from hypothesis import given
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.exceptions import FilterError
from llmrec.service.attributes import Attributes
from llmrec.service.filters import Matching, candidates, key, matches, matching, read, require
from llmrec.service.schema import Condition

ITEMS = [
    {"item_id": "a", "title": "A", "brand": "Norvik", "price": 10, "new": True, "tags": ["red", "wool"]},
    {"item_id": "b", "title": "B", "brand": "norvik", "price": 10.5, "new": False, "tags": []},
    {"item_id": "c", "title": "C", "brand": "1", "price": -1, "tags": ["wool"]},
    {"item_id": "d", "title": "D", "price": None, "new": None, "tags": None},
    {"item_id": "e", "title": "E", "brand": None, "price": 2**53 + 1, "new": True, "tags": "red"},
]
NAMES = {"brand": "text", "price": "number", "new": "flag", "tags": "list"}
VALUES = {
    "brand": st.sampled_from(["Norvik", "norvik", "1", "lost"]),
    "price": st.sampled_from([10, 10.0, 10.5, -1, 2**53, 0, 10**400]),
    "new": st.booleans(),
    "tags": st.sampled_from(["red", "wool", "lost"]),
}


@st.composite
def filter_sets(draw):
    """Conditions that fit `NAMES`, at most one for each."""
    found = {}
    for name in draw(st.lists(st.sampled_from(sorted(NAMES)), unique=True)):
        parts = {}
        for part in ("any_of", "none_of"):
            if draw(st.booleans()):
                parts[part] = draw(st.lists(VALUES[name], min_size=1, max_size=3))
        if name == "price" and draw(st.booleans()):
            parts["min"] = draw(st.sampled_from([-1, 0, 10, -1e300]))
            if draw(st.booleans()):
                parts["max"] = draw(st.sampled_from([10, 10.5, 1e300]))
        if parts:
            found[name] = parts
    return found


def holds(item, name, parts):
    """Whether one item fulfils one condition."""
    value = item.get(name)
    if value is None:
        return False
    entries = value if isinstance(value, list) else [value]
    if name == "price":
        entries = [float(value)]
        asked = {part: [float(v) for v in parts.get(part, []) if v < 10**300] for part in ("any_of", "none_of")}
    else:
        asked = {part: parts.get(part, []) for part in ("any_of", "none_of")}
    if "any_of" in parts and not any(entry == v for entry in entries for v in asked["any_of"]):
        return False
    if any(entry == v for entry in entries for v in asked["none_of"]):
        return False
    return parts.get("min", -np.inf) <= (entries[0] if name == "price" else 0) <= parts.get("max", np.inf)


@given(filter_sets())
def test_a_filter_is_what_each_item_is_asked(filters):
    wanted = [all(holds(item, name, parts) for name, parts in filters.items()) for item in ITEMS]
    attributes = Attributes(ITEMS)
    assert matches(filters, attributes).tolist() == wanted
    assert matches({name: Condition(**parts) for name, parts in filters.items()}, attributes).tolist() == wanted


def test_one_is_one_and_neither_true_nor_a_text():
    attributes = Attributes(ITEMS)
    assert matches({"price": {"any_of": [10.0]}}, attributes).tolist() == [True, False, False, False, False]
    assert matches({"brand": {"any_of": ["1"]}}, attributes).tolist() == [False, False, True, False, False]
    assert matches({"new": {"none_of": [True]}}, attributes).tolist() == [False, True, False, False, False]
    for name, value in [("brand", 1), ("brand", True), ("price", "10"), ("price", True), ("new", 1), ("new", "true")]:
        with pytest.raises(FilterError, match=f"'{name}' compares a {NAMES[name]} with"):
            matches({name: {"any_of": [value]}}, attributes)
    with pytest.raises(FilterError, match="'tags' compares a list with 2"):
        matches({"tags": {"none_of": [2]}}, attributes)
    with pytest.raises(FilterError, match="'tags' has a min or max, and the attribute is a list"):
        matches({"tags": {"max": 2}}, attributes)


def test_a_name_that_is_no_attribute_is_told_with_the_nearest():
    attributes = Attributes(ITEMS)
    with pytest.raises(
        FilterError, match=r"no attribute 'prize'\. The nearest is 'price'\. Filter by one of brand, pr"
    ):
        matches({"prize": {"max": 2}}, attributes)
    with pytest.raises(FilterError, match="no attribute 'title'"):
        matches({"title": {"any_of": ["A"]}}, attributes)
    with pytest.raises(FilterError, match="have no attributes, and 'brand' is none"):
        matches({"brand": {"any_of": ["x"]}}, Attributes([{"item_id": "a", "title": "b"}]))


@pytest.mark.parametrize(
    "condition",
    [{}, {"max": "x"}, {"min": 2, "max": 1}, {"any": [1]}, {"any_of": []}, {"min": float("nan")}, {"any_of": [None]}],
)
def test_what_is_no_condition_is_refused(condition):
    with pytest.raises(FilterError, match="The filter on 'price' cannot be read"):
        read({"price": condition})


@given(filter_sets(), st.randoms(use_true_random=False))
def test_the_order_of_words_does_not_change_a_key(filters, random):
    names = list(filters)
    random.shuffle(names)
    other = {}
    for name in names:
        parts = {part: list(value) if isinstance(value, list) else value for part, value in filters[name].items()}
        for value in parts.values():
            if isinstance(value, list):
                value += value[:1]
                random.shuffle(value)
        other[name] = dict(reversed(parts.items()))
    assert key(other) == key(filters)


@given(filter_sets(), filter_sets())
def test_filters_of_one_key_mean_the_same(one, other):
    attributes = Attributes(ITEMS)
    if key(one) == key(other):
        assert matches(one, attributes).tolist() == matches(other, attributes).tolist()


def test_keys_tell_values_apart():
    said = [
        {"any_of": [1]}, {"any_of": ["1"]}, {"any_of": [True]}, {"any_of": ["true"]}, {"none_of": [1]},
        {"any_of": [0]}, {"any_of": [False]}, {"any_of": [10**400]}, {"min": 1}, {"max": 1}, {"min": 1, "max": 1},
        {"any_of": [1], "none_of": [0]}, {"any_of": ["null"]},
    ]  # fmt: skip
    keys = [key({name: condition}) for name in "xy" for condition in said]
    assert len(set(keys)) == len(keys)
    assert key({"x": {"any_of": [0.0]}}) == key({"x": {"any_of": [-0.0, 0]}})
    assert key({"x": {"min": 0.0}}) == key({"x": {"min": -0.0}})
    assert len(key({})) == 16


def test_a_matching_is_its_mask():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        mask = rng.random(rng.integers(1, 40)) < 0.5
        left = Matching(mask)
        assert left.rows().tolist() == np.flatnonzero(mask).tolist()
        assert left.count == mask.sum()
        rows = rng.integers(0, len(mask), 20)
        assert left.holds(rows).tolist() == mask[rows].tolist()
        assert left.holds(rows[:0]).tolist() == []


@given(st.data())
def test_candidates_are_live_and_left_and_allowed_and_neither_denied_nor_seen(data):
    ids = [f"item-{row}" for row in range(12)]
    retired = data.draw(st.lists(st.integers(0, 11), max_size=6, unique=True))
    whole = random_catalog(0, 12)
    catalog = Catalog(whole.items, whole.codes, whole.codebook_sizes, retired=np.isin(np.arange(12), retired))
    brands = data.draw(st.none() | st.lists(st.integers(0, 3).map("Brand {}".format), min_size=1, max_size=3))
    allow = data.draw(st.none() | st.lists(st.sampled_from([*ids, "lost"]), max_size=8))
    deny = data.draw(st.lists(st.sampled_from([*ids, "lost"]), max_size=8))
    seen = data.draw(st.lists(st.integers(0, 11), max_size=8))
    left = None
    if brands is not None:
        left = matching({"brand": {"any_of": brands}}, catalog, Attributes(catalog.items))
    found = candidates(catalog, left, allow, deny, seen)
    wanted = [
        row
        for row in range(12)
        if row not in retired
        and (brands is None or f"Brand {row % 3}" in brands)
        and (allow is None or ids[row] in allow)
        and ids[row] not in deny
        and row not in seen
    ]
    searched = np.flatnonzero(~catalog.retired) if found.searched is None else found.searched
    assert np.setdiff1d(searched, found.excluded).tolist() == wanted
    assert found.count == len(wanted)
    assert (found.searched is None) == (allow is None and brands is None)
    assert set(found.excluded.tolist()) <= set(searched.tolist())
    assert (np.diff(found.excluded) > 0).all()
    assert (np.diff(searched) > 0).all()
    if allow is not None:
        assert found.searched.tolist() == wanted


def test_too_few_candidates_are_refused():
    require(3, 3)
    with pytest.raises(FilterError, match=r"2 item\(s\) may be recommended here, and the request asks for at least 3"):
        require(2, 3)


@pytest.mark.parametrize("count", [0, 1, 10, 11, 639, 640])
def test_the_rows_of_a_narrow_filter_are_known_without_looking_through_the_catalog(count, monkeypatch):
    mask = np.zeros(640, dtype=bool)
    rows = np.sort(np.random.default_rng(count).permutation(640)[:count])
    mask[rows] = True
    left = Matching(mask)
    assert left.rows().tolist() == rows.tolist()
    assert left.holds(np.arange(640)).tolist() == mask.tolist()
    left.rows()[:] = 7  # a copy
    assert left.rows().tolist() == rows.tolist()
    asked = []
    monkeypatch.setattr(np, "unpackbits", lambda *given, **named: asked.append(given) or np.zeros(640, dtype=bool))
    left.rows()
    assert bool(asked) == (count > 10)
