import html

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.columns import ColumnNames
from llmrec.data.flaws import find_flaws
from llmrec.data.items import Items
from llmrec.exceptions import DataError

TEXT = st.one_of(
    st.none(),
    st.text("a& ;#39ampltnbsp\u00a0\t", max_size=12),
    st.sampled_from(["&nbsp;", "&#39;x", "A", "[]", "{}", '[""]', '{"a": ""}', "[1", "&#91;&#93;"]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.lists(TEXT, max_size=3)), min_size=1, max_size=12), st.booleans())
def test_flaws_equal_their_definition_and_the_reader_s_count(rows, titled):
    frame = pl.DataFrame(
        {
            "id": range(len(rows)),
            "title" if titled else "about": [row[0] for row in rows],
            "brand": [row[1] for row in rows],
            "tags": pl.Series([row[2] for row in rows], dtype=pl.List(pl.String)),
        },
        schema_overrides={"title" if titled else "about": pl.String, "brand": pl.String},
    )
    flaws = find_flaws(frame)
    assert len(flaws.untitled) == Items.from_frame(frame).missing_titles
    if titled:
        hollow = ("", "[]", "{}", '[""]', '{"a": ""}')
        empty = [str(p) for p, row in enumerate(rows) if not unescaped(row[0]).strip() or row[0] in hollow]
        assert flaws.untitled == empty
    cells = [(place, cell) for place, row in enumerate(rows) for cell in (*row[:2], tuple(row[2])) if escaped(cell)]
    assert flaws.escaped_texts == len(cells)
    assert flaws.escaped_items == len({place for place, _ in cells})
    assert len(flaws.examples) == min(3, len(cells))
    for example in flaws.examples:
        assert html.unescape(example["text"]) != example["text"]


def unescaped(text):
    text = text or ""
    while (plain := html.unescape(text)) != text:
        text = plain
    return text


def escaped(cell):
    return any(html.unescape(part or "") != (part or "") for part in (cell if isinstance(cell, tuple) else (cell,)))


def test_columns_are_found_as_the_reader_finds_them():
    frame = pl.DataFrame({"sku": [1, 2], "label": ["", "x"], "title": ["y", ""]})
    assert find_flaws(frame, ColumnNames(item="sku", title="label")).untitled == ["1"]
    assert find_flaws(frame, ColumnNames(item="sku")).untitled == ["2"]
    with pytest.raises(DataError, match=r"goods\.csv has no column 'item_id'"):
        find_flaws(frame.drop("sku"), source="goods.csv")


def test_odd_title_columns():
    assert find_flaws(pl.DataFrame({"item_id": ["a", "b"], "title": [7, None]})).untitled == ["b"]
    assert find_flaws(pl.DataFrame({"item_id": ["a", "b"], "title": [[" "], ["", "x"]]})).untitled == ["a"]
    assert find_flaws(pl.DataFrame({"item_id": ["a"], "title": [None]})).untitled == ["a"]
    nested = find_flaws(pl.DataFrame({"item_id": ["a", "b"], "tree": [[["p"], ["q &gt; r"]], None]}))
    assert nested.examples == [{"item_id": "a", "column": "tree", "text": "q &gt; r"}]
    objects = pl.DataFrame(
        {"item_id": ["a", "b"], "details": [{"of": [{"x": "1"}]}, {"of": [{"x": "&lt;"}, {"x": "&gt;"}]}]}
    )
    assert (find_flaws(objects).escaped_texts, find_flaws(objects).examples[0]["text"]) == (1, "&lt;")


def test_rows_that_reading_leaves_out_are_passed_over():
    frame = pl.DataFrame({"item_id": ["a", None, "a", "b"], "title": ["", "&lt;", "&gt;", "x"]})
    flaws = find_flaws(frame)
    assert (flaws.untitled, flaws.escaped_texts) == (["a"], 0)
    items = Items.from_frame(frame, invalid="drop")
    assert (items.ids, items.missing_titles) == (["a", "b"], 1)


@pytest.mark.parametrize(
    "titles",
    [
        ["[]", "{}", '{"a": null}', "[[], {}]", "x"],
        [" &nbsp; ", "[", "[0.5]", "[1, 2]", '["", "x"]'],
        [["[]"], ["{}", "x"], [], None],
        [float("nan"), None, 2.0],
    ],
)
def test_titles_are_empty_for_both_or_for_neither(titles):
    frame = pl.DataFrame({"item_id": range(len(titles)), "title": titles}, strict=False)
    items = Items.from_frame(frame)
    flaws = find_flaws(frame)
    assert len(flaws.untitled) == items.missing_titles > 0
    # Without another text, the id stands in.
    assert {items.titles[items.ids.index(item)] for item in flaws.untitled} == set(flaws.untitled)
    for find in (find_flaws, Items.from_frame):
        with pytest.raises(DataError, match="--title-column"):
            find(pl.DataFrame({"item_id": ["a"], "title": [b"bytes"]}))
