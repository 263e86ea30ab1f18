import polars as pl
import pytest

from llmrec.data.table import read_ids, read_table
from llmrec.exceptions import DataError


def test_a_column_twice_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,user_id,item_id\na,b,c\n")
    with pytest.raises(DataError, match="'user_id' more than once"):
        read_table(tmp_path / "log.csv")


def test_ids_too_long_for_a_float():
    with pytest.raises(DataError, match=r"row 2.*float"):
        read_ids(pl.DataFrame({"id": [1.0, 1.2e19]}), "id", "the log")
