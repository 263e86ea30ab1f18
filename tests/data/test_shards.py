import gzip
import json
import subprocess
from decimal import Decimal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.shards import join_parts
from llmrec.data.source import Source
from llmrec.data.table import open_table, read_table
from llmrec.data.values import check_ids
from llmrec.exceptions import DataError

HEAD = "user_id,item_id\n"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "log"
    path.mkdir()
    return path


def test_parts_come_in_natural_order_and_marks_are_passed_over(folder):
    for number in range(12):
        (folder / f"part-{number}.csv").write_text(f"{HEAD}u,{number}\n")
    (folder / "_SUCCESS").write_text("")
    (folder / ".part-0.csv.crc").write_bytes(b"\x00\xff")
    assert Interactions.read(folder).histories() == {"u": [str(number) for number in range(12)]}


def test_compression_and_the_order_of_columns_may_differ(folder):
    (folder / "0.csv").write_text(HEAD + "a,x\n")
    (folder / "1.csv.gz").write_bytes(gzip.compress(b"item_id,user_id\ny,a\n"))
    (folder / "2.csv").write_text(HEAD + "a,z\n")
    subprocess.run(["zstd", "-q", "--rm", str(folder / "2.csv")], check=True)
    assert Interactions.read(str(folder)).histories() == {"a": ["x", "y", "z"]}


def test_parquet_and_json_lines(folder):
    pl.DataFrame({"user_id": [1], "item_id": ["x"]}).write_parquet(folder / "a.parquet")
    pl.DataFrame({"user_id": ["one"], "item_id": ["y"]}).write_parquet(folder / "b.parquet")
    assert Interactions.read(folder).histories() == {"1": ["x"], "one": ["y"]}
    for file in folder.iterdir():
        file.unlink()
    rows = [{"user_id": 1, "item_id": 2, "timestamp": 1_400_000_000}, {"user_id": "u", "item_id": "v"}, {"other": 1}]
    for number, row in enumerate(rows[:2]):
        (folder / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    log = Interactions.read(folder)
    assert (log.histories(), log.rows_without_timestamp) == ({"1": ["2"], "u": ["v"]}, 1)
    (folder / "2.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(DataError, match=r"2\.jsonl, row 1 of 1: user_id is None"):
        Interactions.read(folder)
    assert Interactions.read(folder, invalid="drop").dropped == {"user_id": 1}


def test_a_fault_is_named_in_its_file(folder):
    (folder / "0.csv").write_text(HEAD + "a,x\nb,y\n")
    (folder / "1.csv").write_text(HEAD + "a,x\n,y\n")
    with pytest.raises(DataError, match=r"log/1\.csv, row 2 of 2: user_id is None"):
        Interactions.read(folder)
    (folder / "1.csv").write_bytes(b"user_id,item_id\na,\xff\n")
    with pytest.raises(DataError, match=r"log/1\.csv, line 2: .*not UTF-8"):
        Interactions.read(folder)
    (folder / "1.csv").unlink()
    (folder / "1.csv.gz").write_bytes(gzip.compress((HEAD + "a,x\n" * 1000).encode())[:40])
    with pytest.raises(DataError, match=r"log/1\.csv\.gz cannot be"):
        Interactions.read(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1.csv", b"user_id,thing\na,x\n", r"1\.csv and .*0\.csv differ in the column\(s\) 'item_id', 'thing'"),
        ("1.jsonl", b'{"user_id": 1, "item_id": 2}\n', r"1\.jsonl is json lines, but .*0\.csv is delimited"),
        ("1.parquet", b"PAR1 torn", r"1\.parquet cannot be read"),
    ],
)
def test_parts_of_another_kind_are_refused(folder, name, content, message):
    (folder / "0.csv").write_text(HEAD + "a,x\n")
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Interactions.read(folder)


def test_empty_parts_are_counted(folder, caplog):
    (folder / "0.csv").write_text("")
    (folder / "1.csv").write_text(HEAD)
    with pytest.raises(DataError, match="log has no rows"):
        Interactions.read(folder)
    (folder / "2.csv").write_text(HEAD + "a,x\n")
    assert Interactions.read(folder).histories() == {"a": ["x"]}
    assert "2 file(s) hold no rows, such as " in caplog.text
    (folder / "1.csv").unlink()
    (folder / "2.csv").unlink()
    with pytest.raises(DataError, match=r"All 1 file\(s\) of .* are empty"):
        Interactions.read(folder)


def test_a_folder_inside_and_a_folder_of_nothing(folder):
    with pytest.raises(DataError, match="no file in the folder"):
        open_table(folder)
    (folder / "deep").mkdir()
    with pytest.raises(DataError, match="holds deep, which is no file"):
        open_table(folder)


def test_items_in_parts(folder):
    (folder / "a.jsonl").write_text('{"item_id": 1, "title": "A", "details": {"x": 1}}\n')
    (folder / "b.jsonl").write_text('{"item_id": 2, "title": "B", "details": {"y": "z"}}\n')
    assert Items.read(folder).frame["details"].to_list() == ["x: 1", "y: z"]
    (folder / "b.jsonl").write_text('{"item_id": 2, "title": ["B"], "details": "text"}\n')
    with pytest.raises(DataError, match=r"types that do not join"):
        read_table(folder)


def test_floats_of_whole_numbers_are_the_ids_that_other_parts_write_as_text(folder):
    pl.DataFrame({"user_id": [7.0, 8.0], "item_id": [1, 2]}).write_parquet(folder / "a.parquet")
    pl.DataFrame({"user_id": ["7", "x"], "item_id": ["2", "1"]}).write_parquet(folder / "b.parquet")
    assert Interactions.read(folder).histories() == {"7": ["1", "2"], "8": ["2"], "x": ["1"]}
    for file in folder.iterdir():
        file.unlink()
    (folder / "0.jsonl").write_text('{"user_id": 7.0, "item_id": 1}\n{"user_id": null, "item_id": 1}\n')
    (folder / "1.jsonl").write_text('{"user_id": "7", "item_id": 2.0}\n')
    with pytest.raises(DataError, match=r"0\.jsonl, row 2 of 2: user_id is None"):
        Interactions.read(folder)
    assert Interactions.read(folder, invalid="drop").histories() == {"7": ["1", "2"]}


KINDS = {
    "text": (pl.String, str),
    "category": (pl.Categorical, str),
    "integer": (pl.Int64, int),
    "float": (pl.Float64, float),
    "short float": (pl.Float32, float),
    "decimal": (pl.Decimal(20, 2), Decimal),
}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.lists(st.integers(-999, 999), min_size=1)), min_size=1))
def test_an_id_is_one_whatever_type_its_part_has(parts):
    frames = [
        pl.DataFrame({"id": pl.Series([KINDS[k][1](v) for v in values], dtype=KINDS[k][0])}) for k, values in parts
    ]
    joined = join_parts(frames, ["part"] * len(frames), "all")
    ids, faults = check_ids(joined["id"], "id", Source("all"))
    assert not faults
    assert ids.to_list() == [str(value) for _, values in parts for value in values]


def test_floats_that_are_no_ids_stay_what_they_are_beside_text():
    odd = [7.0, 7.5, None, float("nan"), -0.0, float("inf")]
    joined = join_parts([pl.DataFrame({"x": odd}), pl.DataFrame({"x": ["7.0"]})], ["a", "b"], "all")
    assert joined["x"].to_list() == ["7", "7.5", None, None, "0", "inf", "7.0"]
    long = [pl.DataFrame({"x": [1.0, 1.2e19]}), pl.DataFrame({"x": ["7"]})]
    with pytest.raises(DataError, match=r"a\.parquet, row 2 of 2: x is 1\.2e\+19, too long for a float"):
        join_parts(long, ["a.parquet", "b.parquet"], "all")


def test_long_integers_do_not_become_floats_beside_a_part_with_a_gap():
    joined = join_parts([pl.DataFrame({"x": [2**60 + 1]}), pl.DataFrame({"x": [7.0, None]})], ["a", "b"], "all")
    assert joined["x"].to_list() == [2**60 + 1, 7, None]
    fractions = join_parts([pl.DataFrame({"x": [2]}), pl.DataFrame({"x": [7.5]})], ["a", "b"], "all")
    assert fractions["x"].to_list() == [2, 7.5]
