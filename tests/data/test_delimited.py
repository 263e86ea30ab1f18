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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n\n1,2,3\n1,2,3,4\n", r"log\.csv, line 4: '1,2,3' has 3 fields, but the first line has 2"),
        ('a,b\n"1\n1","2\n2"\n1,2,3\n', r"line 5: '1,2,3' has 3 fields"),
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', r"line 3: '3,\"4' has a quote that does not close"),
        ('a,b\n1,2\n3,"4\n' + "5,6\n" * 50_000, r"line 3: '3,\"4' has a quote that does not close"),
        ("a,b\n" + "1,2\n" * 5000 + "1,2,3\n", r"line 5002: '1,2,3' has 3 fields"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_record_of_the_wrong_shape_is_located(tmp_path, content, message, compressed):
    path = tmp_path / "log.csv"
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_delimited(path, ",").read()
    assert str(caught.value).count(". ") >= 1


def test_carriage_returns_alone_are_named(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"a,b\r1,2\r1,3\r")
    with pytest.raises(DataError, match=r"log\.csv has lines that end with a carriage return alone"):
        open_delimited(tmp_path / "log.csv", ",")
    (tmp_path / "log.csv").write_bytes(b"a,b\r\n1,2\r\n")
    assert open_delimited(tmp_path / "log.csv", ",").columns == ["a", "b"]


def test_a_file_without_a_header_is_said_to_have_none(tmp_path):
    (tmp_path / "log.csv").write_text("0,0\n0,1\n")
    with pytest.raises(DataError, match=r"'0' more than once\. It seems to have no header: write the names"):
        open_delimited(tmp_path / "log.csv", ",")
    (tmp_path / "log.csv").write_text("1;2\n1;2;3\n")
    with pytest.raises(DataError, match=r"line 2: '1;2;3' has 3 fields, but the first line has 2"):
        open_delimited(tmp_path / "log.csv", ";", ["x", "y"]).read()
