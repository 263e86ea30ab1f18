import logging

import pytest

from llmrec.data.columns import ITEM, POSITION, TIMESTAMP, TITLE, USER, ColumnNames
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
