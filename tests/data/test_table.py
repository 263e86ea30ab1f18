import gzip

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


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.csv.gz", "log.jsonl", "log.jsonl.gz"])
@pytest.mark.parametrize("odd", ["a[b]*", "a["])  # a pattern, and what is not even one
def test_a_path_is_a_name_and_no_pattern(tmp_path, name, odd):
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"]})
    folder = tmp_path / odd
    folder.mkdir()
    # Where the pattern would match: another file, that must not be read.
    (tmp_path / "ab").mkdir()
    for place, content in ((folder, frame), (tmp_path / "ab", pl.concat([frame, frame]))):
        plain = place / name.removesuffix(".gz")
        write = {".parquet": content.write_parquet, ".csv": content.write_csv, ".jsonl": content.write_ndjson}
        write[plain.suffix](plain)
        if name.endswith(".gz"):
            (place / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert read_table(folder / name).equals(frame)
