import gzip
import json
import subprocess

import polars as pl
import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.table import open_table, read_table
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
