import logging

import pytest

from llmrec.data.arguments import ColumnArguments
from llmrec.data.columns import (
    ACTION,
    DOMAIN,
    ITEM,
    POSITION,
    RATING,
    TIMESTAMP,
    TITLE,
    USER,
    WEIGHT,
    ColumnNames,
)
from llmrec.data.interactions import Interactions
from llmrec.exceptions import DataError


@pytest.mark.parametrize(
    ("canonical", "available", "expected"),
    [
        (USER, ["uid", "user_id"], "user_id"),  # the canonical name before any alias
        (USER, ["rating", "userId"], "userId"),
        (USER, ["user_id:token", "x"], "user_id:token"),  # RecBole's atomic files
        (ITEM, ["asin", "parent_asin"], "parent_asin"),  # the catalogue's id before the variant's
        (ITEM, ["movieId"], "movieId"),
        (TIMESTAMP, ["unixReviewTime"], "unixReviewTime"),
        (TITLE, ["Product_Title"], "Product_Title"),
        (POSITION, ["pos"], "pos"),
        (TIMESTAMP, ["user", "item"], None),
        (ITEM, ["id"], None),  # the number of a log's row
    ],
)
def test_find(canonical, available, expected):
    assert ColumnNames().find(canonical, available, "log.csv") == expected


def test_an_alias_is_logged_and_the_canonical_name_is_not(caplog):
    with caplog.at_level(logging.INFO, logger="llmrec"):
        ColumnNames().find(ITEM, ["item_id"], "log.csv")
        assert not caplog.records
        ColumnNames().find(ITEM, ["asin"], "log.csv")
    assert "log.csv: column 'asin' is taken as item_id" in caplog.text


def test_a_chosen_column_is_never_replaced_by_an_alias():
    assert ColumnNames(item="sku").find(ITEM, ["item_id", "sku"], "log.csv") == "sku"
    with pytest.raises(DataError, match=r"log\.csv has no column 'skuu'; .*'item_id', 'sku'.*--item-column"):
        ColumnNames(item="skuu").find(ITEM, ["item_id", "sku"], "log.csv")
    with pytest.raises(DataError, match="--timestamp-column"):
        ColumnNames(timestamp="when").find(TIMESTAMP, ["timestamp"], "log.csv")


def test_a_required_column_names_its_flag():
    with pytest.raises(DataError, match=r"no column 'user_id'.*'who', 'what'.*--user-column"):
        ColumnNames().find(USER, ["who", "what"], "log.csv", required=True)


@pytest.mark.parametrize(
    ("canonical", "available", "expected"),
    [
        (RATING, ["overall"], "overall"),
        (RATING, ["stars", "score"], "stars"),
        (ACTION, ["event_type"], "event_type"),
        (ACTION, ["behaviour"], "behaviour"),
        (DOMAIN, ["main_category"], "main_category"),
        (WEIGHT, ["weight"], "weight"),
        (RATING, ["user_id"], None),
    ],
)
def test_optional_columns(canonical, available, expected):
    assert ColumnNames().find(canonical, available, "log.csv") == expected


def test_an_empty_name_passes_a_column_over():
    assert ColumnNames(rating="").find(RATING, ["rating"], "log.csv") is None
    with pytest.raises(DataError, match="--user-column"):
        ColumnNames(user="").find(USER, ["user_id"], "log.csv", required=True)


def test_recboles_types_may_be_named(tmp_path):
    path = tmp_path / "a.inter"
    path.write_text("who:token\titem_id:token\n1\t2\n")
    assert Interactions.read(path, ColumnNames(user="who:token")).histories() == {"1": ["2"]}


def test_arguments_reach_the_readers(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("who,what,when,how,shop,grade,mass,place\na,x,5,view,uk,3,2,1\n,x,5,view,uk,3,2,1\n")
    columns = {"user": "who", "item": "what", "timestamp": "when", "action": "how", "domain": "shop"}
    columns |= {"rating": "grade", "weight": "mass", "position": "place"}
    flags = {f"{name}_column": column for name, column in columns.items()}
    arguments = ColumnArguments(**flags, timestamp_unit="order", invalid_rows="drop")
    log = arguments.read_interactions(path)
    assert log.frame.rows() == [("a", "x", 5, 1, 3, "view", "uk", 2)]
    assert (log.dropped, log.time_unit) == ({"user_id": 1}, "order")
    path.write_text("what,label,words\nx,A,b\nx,A,b\n")
    items = ColumnArguments(item_column="what", title_column="label", text_columns=[], invalid_rows="drop")
    assert items.read_items(path).texts() == ["A."]
    assert items.read_items(path).dropped == {"repeated": 1}


def test_a_header_that_reads_like_a_row_is_said():
    for available in (["u1", "17"], ["1", "2", "5.0", "1369699200"], ["3", "-2e5"]):
        with pytest.raises(DataError, match=r"no column 'user_id'.*seems to have no header: write the names"):
            ColumnNames().find(USER, available, "log.csv", required=True)
    with pytest.raises(DataError) as caught:
        ColumnNames().find(USER, ["who", "column_1", ""], "log.csv", required=True)
    assert "no header" not in str(caught.value)
