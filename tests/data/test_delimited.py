import gzip

import pytest

from llmrec.data.delimited import open_delimited, separator_of
from llmrec.exceptions import DataError


def test_separators():
    assert [separator_of(line) for line in ("a,b;c", "a;b|c", "a|b", "a\tb", "a")] == [",", ";", "|", "\t", ","]
    assert separator_of("a,b\tc", prefer_tab=True) == "\t"


@pytest.mark.parametrize("compressed", [False, True])
def test_only_the_columns_asked_for_are_read(tmp_path, compressed):
    content = b'a,b,c\n007,"x\ny",1\n8,"q""q",\n'
    path = tmp_path / "log.csv"
    path.write_bytes(gzip.compress(content) if compressed else content)
    table = open_delimited(path, ",")
    assert table.columns == ["a", "b", "c"]
    assert table.read(["c", "a"])[0].rows() == [("1", "007"), (None, "8")]
    assert table.read()[0]["b"].to_list() == ["x\ny", 'q"q']


def test_a_file_without_header(tmp_path):
    (tmp_path / "log.csv").write_text("1;2\n3;4\n")
    frame, source = open_delimited(tmp_path / "log.csv", ";", ["x", "y"]).read(["y"])
    assert frame["y"].to_list() == ["2", "4"]
    assert source.at(1, 2).endswith("log.csv, row 2 of 2")


def test_a_name_that_looks_like_a_duplicate_is_none(tmp_path):
    (tmp_path / "log.csv").write_text("a,b_duplicated_0\n1,2\n")
    assert open_delimited(tmp_path / "log.csv", ",").columns == ["a", "b_duplicated_0"]
    (tmp_path / "log.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="'a' more than once"):
        open_delimited(tmp_path / "log.csv", ",")
