import gzip
import random
import shutil
import subprocess
from collections import Counter
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmrec.data.columns import ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.exceptions import DataError


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def brute_force(rows):
    """Users by first appearance, each ordered by the rule of the docstring; rows are (user, item, time, position)."""
    users = {}
    for place, row in enumerate(rows):
        users.setdefault(row[0], []).append((*row, place))
    histories = {}
    for user, own in users.items():
        timed = all(row[2] is not None for row in own)
        placed = all(row[3] is not None for row in own)
        own.sort(key=lambda row: (row[2] if timed else 0, row[3] if placed else 0, row[4]))
        histories[user] = [row[1] for row in own]
    return histories


@pytest.mark.parametrize("seed", range(25))
def test_order_equals_its_definition(seed):
    rng = random.Random(seed)
    gaps = rng.choice([0.0, 0.05])
    rows = [
        (
            f"u{rng.randrange(12)}",
            f"i{rng.randrange(1000)}",
            None if rng.random() < gaps else rng.randrange(4),
            None if rng.random() < gaps else rng.randrange(3),
        )
        for _ in range(rng.randrange(1, 120))
    ]
    for absent in ((), ("timestamp",), ("position",), ("timestamp", "position")):
        seen = [
            (u, i, None if "timestamp" in absent else t, None if "position" in absent else p) for u, i, t, p in rows
        ]
        schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "position": pl.Int64}
        frame = pl.DataFrame(seen, schema=schema, orient="row").drop(absent)
        interactions = Interactions.from_frame(frame)
        expected = brute_force(seen)
        assert interactions.histories() == expected
        assert list(interactions.histories()) == interactions.user_ids == list(expected)
        again = Interactions.from_frame(interactions.frame)
        assert again.frame.equals(interactions.frame)


def test_rows_without_timestamp_are_counted_and_an_empty_column_is_absent():
    frame = pl.DataFrame({"user_id": ["a", "a", "b"], "item_id": ["x", "y", "z"], "timestamp": [5, None, 1]})
    assert Interactions.from_frame(frame).rows_without_timestamp == 1
    empty = Interactions.from_frame(frame.with_columns(timestamp=pl.lit("")))
    assert empty.rows_without_timestamp == 0
    assert empty.frame.columns == ["user_id", "item_id"]


CSV = "user_id,item_id,timestamp\n007,0012,20\n8,0012,10\n007,3,5\n"
HISTORIES = {"007": ["3", "0012"], "8": ["0012"]}
JSONL = '{"user_id": "007", "item_id": "0012", "timestamp": 20}\n{"user_id": 8, "item_id": "0012", "timestamp": 10}\n{"user_id": "007", "item_id": 3, "timestamp": 5}\n'  # noqa: E501


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.csv", CSV.replace("\n", "\r\n")),
        ("bom.csv", "\ufeff" + CSV),
        ("a.tsv", CSV.replace(",", "\t")),
        ("semicolons.csv", CSV.replace(",", ";")),
        ("a.inter", CSV.replace(",", "\t").replace("_id", "_id:token").replace("stamp", "stamp:float")),
        ("no_extension", CSV),
        ("a.jsonl", JSONL),
        ("no_extension", JSONL),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_text_format_reads_the_same(tmp_path, name, text, compression):
    path = written(tmp_path / name, text)
    if compression == ".gz":
        path = written(tmp_path / f"{name}.gz", gzip.compress(path.read_bytes()))
    elif compression == ".zst":
        if not shutil.which("zstd"):
            pytest.skip("no zstd command to compress with")
        subprocess.run(["zstd", "-q", str(path)], check=True)
        path = tmp_path / f"{name}.zst"
    assert Interactions.read(path).histories() == HISTORIES


def test_the_last_line_of_jsonl_may_bring_another_type_and_another_column(tmp_path):
    first = "".join(f'{{"user_id": 1, "item_id": {n}}}\n' for n in range(2000))
    path = written(tmp_path / "a.jsonl", first + '{"user_id": "x", "item_id": "y", "timestamp": 5}\n')
    interactions = Interactions.read(path)
    assert interactions.histories() == {"1": [str(n) for n in range(2000)], "x": ["y"]}
    assert interactions.rows_without_timestamp == 2000


def test_parquet_of_any_name_keeps_integers_and_floats_that_are_integers(tmp_path):
    frame = pl.DataFrame({"userId": [7, 8, 7], "movieId": [12.0, 12.0, 3.0], "time": [20.5, 10, 5]})
    frame.write_parquet(tmp_path / "log.data")
    interactions = Interactions.read(tmp_path / "log.data")
    assert interactions.histories() == {"7": ["3", "12"], "8": ["12"]}
    assert interactions.frame["timestamp"].to_list() == [5, 20.5, 10]


def test_dates_become_unix_seconds():
    moments = [datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)]
    frame = pl.DataFrame({"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": moments})
    expected = [1704067200, 1704153600]
    assert Interactions.from_frame(frame).frame["timestamp"].to_list() == expected
    dates = frame.with_columns(pl.col("timestamp").dt.date())
    assert Interactions.from_frame(dates).frame["timestamp"].to_list() == expected


def test_long_integers_keep_their_last_digit():
    frame = pl.DataFrame({"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [10**18 + 1, 10**18]})
    for read in (frame, frame.with_columns(pl.col("timestamp").cast(pl.String))):
        assert Interactions.from_frame(read).histories() == {"a": ["y", "x"]}


def test_write_and_read(tmp_path):
    interactions = Interactions.read(written(tmp_path / "a.csv", CSV))
    interactions.write(tmp_path / "deep" / "log.parquet")
    again = Interactions.read(tmp_path / "deep" / "log.parquet")
    assert again.frame.equals(interactions.frame)
    assert again.user_ids == ["007", "8"]


def test_columns_are_remapped(tmp_path):
    path = written(tmp_path / "a.csv", "who,item_id,what,when\na,0,x,2\na,0,y,1\n")
    columns = ColumnNames(user="who", item="what", timestamp="when")
    assert Interactions.read(path, columns).histories() == {"a": ["y", "x"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "user_id,item_id\n", r"a\.csv has no rows"),
        ("a.jsonl", "\n", r"a\.jsonl.*no rows|a\.jsonl cannot be read"),
        ("a.csv", "user_id,item_id\nu,i\n,j\n", r"a\.csv, row 2 of 2: user_id is None"),
        ("a.csv", 'user_id,item_id\nu,i\nu,"  "\nu,\n', r"a\.csv, row 2 of 3: item_id is '  '.*2 such row"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i"}\n{"user_id": "u"}\n', r"row 2 of 2: item_id is None"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i"}\n{"user_id": "u",\n', r"a\.jsonl, line 2: .*is not JSON"),
        ("a.jsonl", '{"user_id": "u", "item_id": "i"}\n["u", "i"]\n', r"line 2: .*no JSON object"),
        ("a.jsonl", '{"user_id": "u", "item_id": 1.5}\n', r"row 1 of 1: item_id is 1\.5"),
        ("a.jsonl", '{"user_id": "u", "item_id": ["i"]}\n', r"item_id holds List"),
        ("a.csv", b"user_id,item_id\nu,i\nu,caf\xe9\n", r"a\.csv, line 3: .*xe9.*not UTF-8"),
        ("a.csv", "user_id,item_id,timestamp\nu,i,1\nu,j,monday\n", r"row 2 of 2: timestamp is 'monday'"),
        ("a.csv", "user_id,item_id,timestamp\nu,i,1\nu,j,inf\n", r"row 2 of 2: timestamp is 'inf'"),
        ("a.csv", "user_id,item_id,position\nu,i,first\n", r"row 1 of 1: position is 'first'"),
        ("a.csv", "user_id,item_id\nu,i\nu,j,k,l\n", r"a\.csv, line 3: 'u,j,k,l' has 4 fields, but .*has 2"),
        ("a.csv", "user_id,thing\nu,i\n", r"a\.csv has no column 'item_id'.*'user_id', 'thing'.*--item-column"),
        ("a.csv.gz", gzip.compress(CSV.encode() * 500)[:-30], r"a\.csv\.gz cannot be"),
        ("a.parquet", b"PAR1 cut short", r"a\.parquet cannot be read"),
    ],
)
def test_faults_are_located(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message) as caught:
        Interactions.read(written(tmp_path / name, text))
    assert str(caught.value).count(". ") >= 1  # what is wrong, and what to do


def test_bytes_that_are_not_utf8_are_found_inside_gzip(tmp_path):
    path = written(tmp_path / "a.csv.gz", gzip.compress(b"user_id,item_id\nu,\xff\n"))
    with pytest.raises(DataError, match=r"line 2: .*not UTF-8"):
        Interactions.read(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*nowhere\.csv"):
        Interactions.read(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="no file"):
        Interactions.read(tmp_path)


def test_a_gap_in_parquet_ids_is_found(tmp_path):
    pl.DataFrame({"user_id": ["a", "b"], "item_id": [1.0, float("nan")]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2 of 2: item_id is NaN"):
        Interactions.read(tmp_path / "a.parquet")


def test_optional_columns_stand_where_they_are(tmp_path):
    text = "event,user,item,ts,stars,market,weight,other\nview,a,x,2,4.5,uk,1,q\n,a,y,1,,us,2,q\n"
    log = Interactions.read(written(tmp_path / "a.csv", text))
    assert log.frame.rows(named=True) == [
        {"user_id": "a", "item_id": "y", "timestamp": 1, "rating": None, "action": None, "domain": "us", "weight": 2},
        {"user_id": "a", "item_id": "x", "timestamp": 2, "rating": 4.5, "action": "view", "domain": "uk", "weight": 1},
    ]
    assert log.frame.columns == ["user_id", "item_id", "timestamp", "rating", "action", "domain", "weight"]
    log.write(tmp_path / "a.parquet")
    assert Interactions.read(tmp_path / "a.parquet").frame.equals(log.frame)
    named = ColumnNames(user="user", item="item", action="other", rating="", weight="weight")
    assert Interactions.read(tmp_path / "a.csv", named).frame.columns == [
        *("user_id", "item_id", "timestamp", "action", "domain", "weight")
    ]
    with pytest.raises(DataError, match=r"row 1 of 1: score is 'A\+', which is no number.*empty name of the rating"):
        Interactions.read(written(tmp_path / "b.csv", "user,item,score\na,x,A+\n"))


BAD = """user_id,item_id,timestamp,rating
a,x,1400000000,5
,y,1400000001,5
a,,1400000002,5
a,z,-5,5
,,0,5
b,x,1400000003,bad
a,w,,5
b,y,1400000001,1
"""


def test_invalid_rows_are_dropped_and_counted(tmp_path, caplog):
    path = written(tmp_path / "a.csv", BAD)
    with pytest.raises(DataError, match=r"row 2 of 8: user_id is None, which is no id \(2 such row\(s\)\)"):
        Interactions.read(path)
    log = Interactions.read(path, invalid="drop")
    assert log.histories() == {"a": ["x", "w"], "b": ["y"]}
    # A row of several faults counts once, for the first of its columns.
    assert log.dropped == {"user_id": 2, "item_id": 1, "timestamp": 1, "rating": 1}
    assert sum(log.dropped.values()) == 8 - len(log)
    assert log.rows_without_timestamp == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("row 4 of 8: timestamp is '-5', which is negative" in warning for warning in warnings)
    assert any("row 6 of 8: rating is 'bad', which is no number (1 such row(s))" in warning for warning in warnings)
    with pytest.raises(DataError, match=r"All 1 rows of .*a\.csv are invalid"):
        Interactions.read(written(path, "user_id,item_id\n,x\n"), invalid="drop")
    with pytest.raises(DataError, match="'ignore'"):
        Interactions.read(written(path, "user_id,item_id\n,x\n"), invalid="ignore")


def test_a_unit_may_be_forced(tmp_path):
    path = written(tmp_path / "a.csv", "user_id,item_id,timestamp\na,x,1400000000000\na,y,1300000000500\n")
    assert Interactions.read(path).frame["timestamp"].to_list() == [1300000000.5, 1400000000]
    order = Interactions.read(path, timestamp_unit="order")
    assert (order.time_unit, order.frame["timestamp"].to_list()) == ("order", [1300000000500, 1400000000000])
    with pytest.raises(DataError, match="in s, but a time in ms: the units are mixed"):
        Interactions.read(path, timestamp_unit="s")


LOGS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(0, 99),
        st.none() | st.sampled_from([1_400_000_000, 1_400_086_400, 1_500_000_000]),
    ),
    min_size=1,
    max_size=40,
)


def log_of(rows, timed=True):
    schema = {"user_id": pl.String, "item_id": pl.Int64, "timestamp": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return Interactions.from_frame(frame if timed else frame.drop("timestamp"))


@settings(deadline=None)
@given(LOGS, st.integers(0, 2**32))
def test_shuffled_ties(rows, seed):
    log = log_of(rows)
    shuffled = log.shuffled_ties(seed)
    assert shuffled.frame.equals(log.shuffled_ties(seed).frame)
    assert shuffled.frame.columns == log.frame.columns
    before, after = log.frame.rows(), shuffled.frame.rows()
    # The same users and times in the same places, and in each run of a user's equal times the same items.
    start = 0
    for end in range(1, len(before) + 1):
        one, other = before[start], before[end] if end < len(before) else None
        if other is None or len(one) == 2 or other[0] != one[0] or other[2] != one[2] or one[2] is None:
            assert sorted(before[start:end]) == sorted(after[start:end])
            start = end
    groups = log.tie_groups().tolist()
    for left in range(len(before) - 1):
        tied = len(before[left]) > 2 and before[left][2] is not None and before[left][::2] == before[left + 1][::2]
        assert (groups[left] == groups[left + 1]) == tied


def test_every_order_of_a_tie_is_as_likely():
    log = log_of([("a", item, 1_400_000_000) for item in range(3)] + [("a", 9, 1_500_000_000)])
    orders = Counter(tuple(log.shuffled_ties(seed).histories()["a"]) for seed in range(600))
    assert len(orders) == 6
    assert {order[-1] for order in orders} == {"9"}
    assert min(orders.values()) > 60  # 100 expected, a standard deviation of 9


def test_shuffled_ties_survive_writing_where_there_are_positions(tmp_path):
    rows = [("a", item, 1_400_000_000, item) for item in range(50)]
    log = Interactions.from_frame(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "position"], orient="row")
    )
    shuffled = log.shuffled_ties(3)
    assert shuffled.histories() != log.histories()
    shuffled.write(tmp_path / "a.parquet")
    assert Interactions.read(tmp_path / "a.parquet").histories() == shuffled.histories()


def test_nothing_to_shuffle_is_said(caplog):
    log = log_of([("a", 1, None), ("a", 2, None)], timed=False)
    assert log.shuffled_ties(0).frame.equals(log.frame)
    assert log.tie_groups().tolist() == [0, 1]
    assert "nothing to shuffle" in caplog.text


def test_keys_that_no_integer_holds_sort_as_well():
    big = 2**61
    frame = pl.DataFrame(
        {
            "user_id": ["b", "a", "b", "a", "b"],
            "item_id": [1, 2, 3, 4, 5],
            "timestamp": [big, -big, -big, big, -big],
            "position": [0, big, big, -big, 1],
        }
    )
    log = Interactions.from_frame(frame, timestamp_unit="order")
    assert log.histories() == {"b": ["5", "3", "1"], "a": ["2", "4"]}
    assert log.user_ids == ["b", "a"]
    # Just too much for one integer: users, whose numbers are 0 and 1, times a range of times of 2^62.
    wide = pl.DataFrame(
        {"user_id": ["b", "a", "b", "a"], "item_id": [1, 2, 3, 4], "timestamp": [big, big, -big, -big]}
    )
    log = Interactions.from_frame(wide, timestamp_unit="order")
    assert log.frame["item_id"].to_list() == ["3", "1", "4", "2"]


def test_real_logs_read_as_they_are(shared_data):
    beauty = Interactions.read(shared_data / "amazon-beauty" / "interactions.csv.gz")
    assert (len(beauty), len(beauty.user_ids), beauty.rows_without_timestamp) == (198_502, 22_363, 287)
    assert beauty.time_unit == "s"
    million = Interactions.read(shared_data / "movielens-1m" / "interactions.csv.gz")
    assert (len(million), len(million.user_ids)) == (999_611, 6040)
    scientific = Interactions.read(shared_data / "amazon-scientific" / "interactions.csv.gz")
    assert (len(scientific), scientific.frame.columns) == (58_492, ["user_id", "item_id", "position"])
    clicks = Interactions.read(shared_data / "movielens-1m-ctr" / "train.jsonl.gz")
    assert (len(clicks), clicks.frame.columns) == (33_891, ["user_id", "item_id", "timestamp"])


@settings(deadline=None)
@given(LOGS, st.booleans())
def test_every_row_is_known_by_where_it_stood(rows, gaps):
    users = [None if gaps and item % 5 == 0 else user for user, item, _ in rows]
    values = {"user_id": users, "item_id": range(len(rows)), "timestamp": [time for *_, time in rows]}
    frame = pl.DataFrame(values, schema_overrides={"user_id": pl.String, "timestamp": pl.Int64})
    assume(any(user is not None for user in users))
    log = Interactions.from_frame(frame, invalid="drop")
    ids = log.frame["item_id"]
    for rest in range(3):
        chosen = ids.cast(pl.Int64) % 3 == rest
        if chosen.any():
            first = min(int(item) for item in ids.filter(chosen))
            place, where = log.first_read(chosen)
            assert (int(ids[place]), where) == (first, f"the interactions, row {first + 1} of {len(rows)}")


def test_one_column_is_not_taken_twice(tmp_path):
    path = written(tmp_path / "a.csv", "item_id,weight,time,position\nx,2,1,7\n")
    for columns, message in [
        (ColumnNames(user="item_id"), r"'item_id' is taken for user_id and for item_id.*--user-column or --item-col"),
        (ColumnNames(user="weight", rating="weight"), r"for user_id and for rating.*--user-column or --rating-column"),
        (ColumnNames(user="weight", timestamp="time", position="time"), "for timestamp and for position"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            Interactions.read(path, columns)
        assert "a.csv: the column" in str(caught.value)
        with pytest.raises(DataError, match=message):
            Interactions.from_frame(pl.read_csv(path), columns)
    # What was chosen for one part is found for no other.
    log = Interactions.read(path, ColumnNames(user="weight", timestamp="position"))
    assert log.frame.columns == ["user_id", "item_id", "timestamp"]
    log = Interactions.read(path, ColumnNames(user="time", rating="weight"))
    assert log.frame.columns == ["user_id", "item_id", "position", "rating"]
