"""Columns of attributes against a definition that looks at one item at a time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.service.attributes import Attributes, plain

WORDS = st.sampled_from(["", "a", "b", "A", "1", "true", "ß", "a b"])
NUMBERS = st.sampled_from([0, 1, -1, 1.0, 0.5, -0.0, 2**53 + 1, 10**400, math.nan, math.inf, 1e308])
SCALARS = WORDS | NUMBERS | st.booleans() | st.none() | st.just({"x": 1})
LISTS = st.lists(SCALARS | st.just(["a"]), max_size=3)
COLUMN = st.sampled_from([WORDS, NUMBERS, st.booleans(), LISTS, st.lists(WORDS), SCALARS, SCALARS | LISTS, st.none()])


@st.composite
def tables(draw):
    """Item tables of up to four fields, some of them missing in some items."""
    columns = {name: draw(COLUMN) for name in draw(st.sets(st.sampled_from(["brand", "price", "tags", "new"])))}
    items = []
    for row in range(draw(st.integers(0, 8))):
        fields = {name: draw(values) for name, values in columns.items() if draw(st.integers(0, 5))}
        items.append({"item_id": f"item-{row}", "title": f"Title {row}", **fields})
    return items


def is_number(value):
    return type(value) in (int, float)


def written(value):
    """A scalar as a text, by hand."""
    if isinstance(value, str):
        return value
    if value is True or value is False:
        return "true" if value else "false"
    if is_number(value) and abs(value) <= 1.7976931348623157e308:
        return str(value)
    return None


def kind_of(items, name):
    values = [item[name] for item in items if name in item and not isinstance(item[name], dict)]
    values = [value for value in values if value is not None]
    if not values:
        return None
    if any(isinstance(value, list) for value in values):
        return "list"
    if all(type(value) is bool for value in values):
        return "flag"
    return "number" if all(is_number(value) for value in values) else "text"


def value_of(items, name, row):
    """What an item's attribute is; None if it has none."""
    kind, value = kind_of(items, name), items[row].get(name)
    if kind is None or value is None or isinstance(value, dict):
        return None
    if kind == "number":
        return float(value) if abs(value) <= 1.7976931348623157e308 else None
    if kind == "flag":
        return value
    if kind == "text":
        return written(value)
    if isinstance(value, list):
        return [written(entry) for entry in value if not isinstance(entry, list | dict) and written(entry) is not None]
    return None if written(value) is None else [written(value)]


@given(tables())
def test_attributes_are_what_each_item_says(items):
    attributes = Attributes(items)
    names = {name for item in items for name in item} - {"item_id", "title"}
    expected = {name: kind for name in names if (kind := kind_of(items, name)) is not None}
    assert attributes.kinds == expected
    for row in range(len(items)):
        own = {name: value for name in expected if (value := value_of(items, name, row)) is not None}
        assert attributes.of(row) == own
        assert {name: type(value) for name, value in attributes.of(row).items()} == {
            name: type(value) for name, value in own.items()
        }


@given(tables(), st.lists(st.sampled_from([0.0, 1.0, 0.5, -1.0])))
def test_columns_find_what_a_look_at_each_item_finds(items, numbers):
    attributes = Attributes(items)
    for name, kind in attributes.kinds.items():
        column = attributes.column(name)
        values = [value_of(items, name, row) for row in range(len(items))]
        assert column.present.tolist() == [value is not None for value in values]
        wanted = {"number": numbers, "flag": [True], "text": ["a", "1", "z"], "list": ["a", "true"]}[kind]
        among = [
            value is not None and (any(entry in wanted for entry in value) if kind == "list" else value in wanted)
            for value in values
        ]
        assert column.one_of(wanted).tolist() == among
        if kind == "number":
            inside = [value is not None and -0.5 <= value <= 1.0 for value in values]
            assert column.between(-0.5, 1.0).tolist() == inside
            assert column.between(None, None).tolist() == column.present.tolist()


def test_kinds_come_in_the_order_of_the_items_and_columns_once():
    items = [{"item_id": "a", "title": "t", "price": 1, "brand": "x"}, {"item_id": "b", "new": True, "price": 2.5}]
    attributes = Attributes(items)
    assert list(attributes.kinds.items()) == [("price", "number"), ("brand", "text"), ("new", "flag")]
    assert attributes.made == []
    column = attributes.column("price")
    assert attributes.column("price") is column
    assert attributes.made == ["price"]
    assert column.nbytes == 2 * 8 + 2
    with pytest.raises(KeyError):
        attributes.column("title")


def test_a_mixed_field_is_text_and_beside_a_list_all_are_lists():
    items = [{"item_id": str(n), "size": value, "tags": tag} for n, (value, tag) in enumerate([
        (10, ["new", 7]), ("XL", "old"), (1.5, []), (True, None), (None, {"no": 1}),
    ])]  # fmt: skip
    attributes = Attributes(items)
    assert attributes.kinds == {"size": "text", "tags": "list"}
    assert [attributes.of(row) for row in range(5)] == [
        {"size": "10", "tags": ["new", "7"]},
        {"size": "XL", "tags": ["old"]},
        {"size": "1.5", "tags": []},
        {"size": "true"},
        {},
    ]
    assert attributes.column("tags").starts.tolist() == [0, 2, 3, 3, 3, 3]
    assert attributes.column("size").one_of(["10", "true"]).tolist() == [True, False, False, True, False]


def test_a_catalog_without_attributes_has_none():
    attributes = Attributes([{"item_id": "a", "title": "t"}])
    assert attributes.kinds == {}
    assert attributes.of(0) == {}
    assert len(attributes) == 1
    assert plain(["a", ["b"]], "list") == ["a"]
    assert np.isnan(Attributes([{"item_id": "a", "n": 1}, {"item_id": "b"}]).column("n").values[1])
