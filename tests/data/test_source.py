import polars as pl
import pytest

from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError


def test_rows_are_named_in_the_file_that_holds_them():
    joined = Source.joined("log", [(Source("log/a"), 2), (Source("log/b"), 1), (Source("log/c"), 3)])
    named = [joined.at(row, 6) for row in range(6)]
    assert named[:3] == ["log/a, row 1 of 2", "log/a, row 2 of 2", "log/b, row 1 of 1"]
    assert named[3:] == ["log/c, row 1 of 3", "log/c, row 2 of 3", "log/c, row 3 of 3"]
    assert str(joined) == "log"


def test_a_table_without_rows_is_refused():
    table = Table("a.csv", "delimited", ["x"], lambda columns: (pl.DataFrame({"x": []}), Source("a.csv")))
    with pytest.raises(DataError, match=r"a\.csv has no rows"):
        table.read()
