import gzip
import json
import subprocess

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.table import open_table, read_table
from llmrec.exceptions import DataError


def test_a_column_twice_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,user_id,item_id\na,b,c\n")
    with pytest.raises(DataError, match="'user_id' more than once"):
        read_table(tmp_path / "log.csv")


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


# Ids as logs have them; a tab, a line's end or a separator inside would be another test.
IDS = st.text(st.sampled_from("abcXYZ0189-_é"), min_size=1, max_size=4)
LOGS = st.lists(
    st.tuples(IDS, IDS, st.integers(1_400_000_000, 1_400_000_003), st.integers(1, 5)), min_size=1, max_size=20
)


def write_all(folder, rows):
    """The same log in every format; returns the paths."""
    names = ["user_id", "item_id", "timestamp", "rating"]
    frame = pl.DataFrame(rows, schema=names, orient="row")
    frame.write_csv(folder / "log.csv")
    frame.write_csv(folder / "log.tsv", separator="\t")
    frame.write_ndjson(folder / "log.jsonl")
    frame.write_parquet(folder / "log.parquet")
    columns = ["user_id:token", "item_id:token", "timestamp:float", "rating:float"]
    (folder / "log.inter").write_text(
        "".join("\t".join(map(str, row)) + "\n" for row in [columns, *rows]), encoding="utf-8"
    )
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, t, r in rows), encoding="utf-8")
    (folder / "log.dicts").write_text("".join(f"{dict(zip(names, row, strict=True))!r}\n" for row in rows))
    (folder / "log.csv.gz").write_bytes(gzip.compress((folder / "log.csv").read_bytes()))
    subprocess.run(["zstd", "-q", str(folder / "log.jsonl")], check=True)
    (folder / "shards").mkdir()
    third = len(rows) // 3 + 1
    for number in range(0, len(rows), third):
        frame[number : number + third].write_parquet(folder / "shards" / f"part-{number // third}.parquet")
    return sorted(folder.iterdir())


@settings(max_examples=40, deadline=None)
@given(LOGS)
def test_every_format_holds_the_same_log(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    expected = Interactions.from_frame(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    ).frame
    paths = write_all(folder, rows)
    assert len(paths) == 10
    for path in paths:
        assert Interactions.read(path).frame.equals(expected), path.name
    assert expected["user_id"].unique(maintain_order=True).to_list() == list(dict.fromkeys(row[0] for row in rows))


SEEDS = [
    b'user_id,item_id,timestamp,rating\nu1,i1,1400000000,5\nu2,"i,2",1400000001,\n',
    b"user_id\titem_id\tposition\nu1\ti1\t1\n",
    b'{"user_id": "u", "item_id": 3, "timestamp": 1400000000}\n{"user_id": 5, "item_id": ["x"], "title": {"a": 1}}\n',
    b"1::2::5::978300019\n1::3::4::978300020\n",
    b"user_id:token\titem_id:token\trating:float\tv:float_seq\n1\t2\t3\t1 2 3\n",
    b"{'asin': 'a', 'title': \"x\", 'user_id': 'u', 'related': {'b': ['c']}}\n",
    b"A39HTATAQ9V7YF,0205616461,5.0,1369699200\n",
]
PIECES = [
    b"\n",
    b'"',
    b"::",
    b"\xff",
    b"{",
    b"[",
    b"\x00",
    b"\t",
    b"-1",
    b"NaN",
    b"9" * 30,
    b"1e400",
    b"\xef\xbb\xbf",
    b"",
]
NAMES = ["a.csv", "a.tsv", "a.json", "a.inter", "ratings.dat", "movies.dat", "a", "u.data", "u.item", "a.parquet"]


@st.composite
def garbage(draw):
    if draw(st.booleans()):
        return draw(st.binary(min_size=0, max_size=60))
    content = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.sampled_from(PIECES)) + content[place + draw(st.integers(0, 4)) :]
    if draw(st.integers(0, 4)) == 0:
        content = gzip.compress(content, mtime=0)[: draw(st.integers(0, 200))]
    return content


@settings(max_examples=150, deadline=None)
@given(garbage(), st.sampled_from(NAMES), st.sampled_from(["error", "drop"]))
def test_garbage_raises_data_errors_alone(tmp_path_factory, content, name, invalid):
    path = tmp_path_factory.mktemp("garbage") / name
    path.write_bytes(content)
    for reader in (Interactions, Items):
        message = ""
        try:
            assert len(reader.read(path, invalid=invalid))
        except DataError as error:
            message = str(error)
        assert not message or (name in message and message.count(". ") >= 1)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.csv", b"user_id,item_id\na,b\n", "delimited"),
        ("a.gz", gzip.compress(b"user_id,item_id\na,b\n", mtime=0), "delimited"),  # by its bytes, whatever its name
        ("a", b'{"user_id": 1}\n', "json lines"),
        ("a.csv", b'{"user_id","x"\n1,2\n', "delimited"),
        ("a.txt", b"user_id:token\titem_id:token\n1\t2\n", "RecBole"),
        ("a.csv", b"a:token,b\n1,2\n", "delimited"),
        ("x.dat", b"1::2::3::978300019\n", "MovieLens ratings"),
    ],
)
def test_formats_are_known(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert open_table(tmp_path / name).kind == kind


def test_what_is_not_asked_for_may_be_anything(tmp_path):
    rows = [{"user_id": 1, "item_id": 2, "x": {"deep": [1, "a"]}}, {"user_id": "u", "item_id": 2, "x": [[1], "b"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Interactions.read(tmp_path / "a.jsonl").histories() == {"1": ["2"], "u": ["2"]}
