import gzip
import subprocess

import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.lines import READING_ERRORS, first_lines, iterate_lines, raise_located, scan_lines
from llmrec.data.table import open_table
from llmrec.exceptions import DataError


@pytest.fixture(params=["", ".gz", ".zst"])
def write(request, tmp_path):
    def written(content):
        path = tmp_path / "log.txt"
        path.write_bytes(content)
        if request.param == ".gz":
            path.write_bytes(gzip.compress(content))
        elif request.param == ".zst":
            subprocess.run(["zstd", "-q", "-f", "--rm", str(path)], check=True)
            path = tmp_path / "log.txt.zst"
        return path

    return written


def test_lines(write):
    path = write(b"\n\xef\xbb\xbfone\r\n  \ntwo, \"x\n'three")
    assert [line.strip('\ufeff"') for line in first_lines(path, 2)] == ["one", 'two, "x']
    assert len(list(iterate_lines(path))) == 5
    assert scan_lines(path).collect()["line"].to_list()[-1] == "'three"
    assert first_lines(write(b" \n\n")) == []


def test_a_torn_file_is_an_error_of_reading(write):
    path = write(b"".join(b"%d\n" % number for number in range(5000)))
    if path.suffix == ".txt" and path.read_bytes()[:2] != b"\x1f\x8b":
        pytest.skip("plain text cannot be torn")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(READING_ERRORS):
        list(iterate_lines(path))
    with pytest.raises(DataError, match=r"cannot be decompressed.*cut short"):
        raise_located(path, ValueError("x"))


def test_the_line_that_is_not_utf8_is_named(write):
    path = write("fine\nalso é fine\n".encode() + b"caf\xe9 here\n")
    with pytest.raises(DataError, match=r"log\.txt.*, line 3: b'caf\\xe9 here\\n' is not UTF-8\. Convert"):
        raise_located(path, ValueError("x"))


def test_latin1(write):
    path = write("café\n".encode("latin-1"))
    assert scan_lines(path, latin1=True).collect()["line"].to_list() == ["café"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named(write, encoding):
    path = write("user_id,item_id\nu,i\n".encode(encoding))
    for call in (first_lines, open_table, Interactions.read):
        with pytest.raises(DataError, match=r"log\.txt.* is not UTF-8: .*reads like UTF-16: convert it with iconv -f"):
            call(path)


def test_bytes_that_are_no_text_are_named(write):
    with pytest.raises(DataError, match=r"log\.txt.* is not UTF-8: its beginning holds b'user_id.*Give parquet, CSV"):
        first_lines(write(b"user_id,item_id\0\nu,i\n"))
    assert first_lines(write(b"user_id,item_id\nu,i\0\n")) == ["user_id,item_id"]
