import gzip
import json

import numpy as np
import polars as pl
import pytest
from ctr_factories import make_rows, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.histories import Histories
from llmrec.ctr.rows import MISSING, LabelledRows, RowColumns
from llmrec.exceptions import DataError

ROWS = [
    {"uid": 7, "iid": 3, "label": 1, "buy": 0, "timestamp": 1_000_000_000, "his": [], "warm": 1},
    {"uid": 7, "iid": 4, "label": 0, "buy": None, "timestamp": 1_000_000_005, "his": [3], "warm": 0},
    {"uid": 12, "iid": 3, "label": 1, "buy": 1, "timestamp": 1_000_000_002, "his": [9, 4], "warm": 1},
]
COLUMNS = RowColumns(labels=("label", "buy"), flags=("warm",))


def write(path, form):
    frame = pl.DataFrame(ROWS)
    if form == "parquet":
        frame.write_parquet(path / "rows.parquet")
        return path / "rows.parquet"
    if form == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        (path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        return path / "rows.jsonl.gz"
    spelt = {"json": lambda one: json.dumps(one), "spaces": lambda one: " ".join(map(str, one))}[form]
    frame = frame.with_columns(pl.Series("his", [spelt(row["his"]) for row in ROWS]))
    frame.write_csv(path / "rows.csv")
    return path / "rows.csv"


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json", "spaces"])
def test_every_format_says_the_same(tmp_path, form):
    rows = LabelledRows.read([write(tmp_path, form)], COLUMNS)
    assert rows.user_ids == ("12", "7")
    assert rows.item_ids == ("3", "4", "9")  # 9 is in a history alone
    assert rows.users.tolist() == [1, 1, 0]
    assert rows.items.tolist() == [0, 1, 0]
    assert rows.labels.tolist() == [[1, 0], [0, MISSING], [1, 1]]
    assert rows.timestamps.tolist() == [1_000_000_000, 1_000_000_005, 1_000_000_002]
    assert rows.given[0].tolist() == [0, 2, 1]
    assert rows.given[1].tolist() == [0, 0, 1, 3]
    assert rows.flags["warm"].tolist() == [True, False, True]
    assert rows.part.tolist() == [0, 0, 0]


def test_files_share_ids_and_keep_their_order(tmp_path):
    for name, row in (("a", {"user": "x", "item": "i", "label": 1}), ("b", {"user": "y", "item": "h", "label": 0})):
        pl.DataFrame([row]).write_csv(tmp_path / f"{name}.csv")
    rows = LabelledRows.read([tmp_path / "b.csv", tmp_path / "a.csv"])
    assert (rows.user_ids, rows.item_ids) == (("x", "y"), ("h", "i"))
    assert (rows.users.tolist(), rows.items.tolist(), rows.part.tolist()) == ([1, 0], [0, 1], [0, 1])
    assert rows.timestamps.tolist() == [UNKNOWN_TIME, UNKNOWN_TIME]
    assert rows.given is None
    assert [name for name, _ in rows.sources] == ["b.csv", "a.csv"]


def test_ratings_become_labels_at_a_threshold(tmp_path):
    pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "rating": [3.9, 4.0, None]}).write_parquet(tmp_path / "r.pq")
    rows = LabelledRows.read([tmp_path / "r.pq"], RowColumns(labels=("rating",), threshold=4))
    assert rows.labels[:, 0].tolist() == [0, 1, MISSING]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [1, 2, 0]}, "neither 0 nor 1"),
        ({"label": ["yes", "no", "1"]}, "no numbers"),
        ({"uid": [1, None, 2]}, "without a 'uid'"),
        ({"his": ["[1, true]", "[]", "[]"]}, "no id"),
        ({"his": ["[1, ", "[]", "[]"]}, "no JSON list"),
        ({"timestamp": ["yesterday", "1", "2"]}, "no time"),
        ({"his": [1.5, 2.0, 3.0]}, "Give lists"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, change, message):
    columns = {"uid": [1, 1, 2], "iid": [1, 2, 3], "label": [0, 1, 1]} | change
    pl.DataFrame(columns).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        LabelledRows.read([tmp_path / "rows.parquet"])


def test_columns_that_are_not_there_are_refused(tmp_path):
    path = write(tmp_path, "parquet")
    for columns in (RowColumns(labels=("like",)), RowColumns(history="past"), RowColumns(labels=())):
        with pytest.raises(DataError):
            LabelledRows.read([path], columns)
    with pytest.raises(DataError, match="No file"):
        LabelledRows.read([])


def test_the_latest_rows_become_another_part():
    rows = make_rows([0] * 5, range(5), [1] * 5, timestamps=[5, 1, 9, 5, 2])
    assert rows.with_latest_as(1, 0.4).part.tolist() == [0, 0, 1, 1, 0]  # of equal times the later row
    with pytest.raises(DataError, match="no time"):
        make_rows([0], [0], [1], timestamps=[UNKNOWN_TIME]).with_latest_as(1, 0.5)


def brute_force(rows, source, simultaneous):
    """Each row's history by looking at all rows."""
    found = []
    unknown = (rows.timestamps == UNKNOWN_TIME).any()
    keys = [(int(rows.part[row]), 0 if unknown else int(rows.timestamps[row]), row) for row in range(len(rows))]
    for row in range(len(rows)):
        before = []
        for other in sorted(range(len(rows)), key=keys.__getitem__):
            if rows.users[other] != rows.users[row] or keys[other] >= keys[row]:
                continue
            same = rows.timestamps[other] == rows.timestamps[row] and rows.part[other] == rows.part[row]
            if same and simultaneous == "unknown" and not unknown:
                continue
            if source == "liked" and not (rows.labels[other] == 1).any():
                continue
            before.append(other)
        found.append(before)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["labelled", "liked"]),
    st.sampled_from(["known", "unknown"]),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_histories_are_what_came_before(seed, source, simultaneous, num_labels, untimed):
    rows = random_rows(seed, count=30, num_labels=num_labels, missing=True, tied=True)
    rng = np.random.default_rng(seed)
    rows.part[:] = rng.integers(0, 2, size=30)
    if untimed:
        rows.timestamps[rng.integers(0, 30, size=3)] = UNKNOWN_TIME
    histories = Histories.of(rows, source, simultaneous)
    for row, before in enumerate(brute_force(rows, source, simultaneous)):
        events = histories.before(row, 4)
        assert events.items.tolist() == rows.items[before][-4:].tolist()
        assert events.timestamps.tolist() == rows.timestamps[before][-4:].tolist()
        assert histories.lengths()[row] == len(before)
        codes = [
            0 if (labels < 0).all() else 1 + sum(2**place for place, label in enumerate(labels) if label == 1)
            for labels in rows.labels[before][-4:]
        ]
        assert events.actions.tolist() == codes


def test_histories_of_the_file_are_all_liked():
    given_items = (np.array([2, 1, 0]), np.array([0, 0, 2, 3]))
    rows = make_rows([0, 0, 1], [0, 1, 2], [[1, 0], [0, 0], [1, 1]], given=given_items)
    histories = Histories.of(rows, "given")
    assert [histories.before(row, 5).items.tolist() for row in range(3)] == [[], [2, 1], [0]]
    assert histories.before(1, 1).items.tolist() == [1]
    assert histories.before(1, 5).actions.tolist() == [4, 4]
    assert (histories.before(1, 5).timestamps == UNKNOWN_TIME).all()
    with pytest.raises(DataError, match="no column of histories"):
        Histories.of(random_rows(), "given")
    with pytest.raises(DataError, match="Choose labelled"):
        Histories.of(random_rows(), "all")


def test_the_published_histories_are_those_of_liked_rows(shared_data):
    folder = shared_data / "movielens-1m-ctr"
    rows = LabelledRows.read([folder / "train.jsonl.gz", folder / "valid.jsonl.gz"])
    assert len(rows) == 33_891 + 10_401
    liked, given_ones = Histories.of(rows, "liked", "known"), Histories.of(rows, "given")
    for row in range(0, len(rows), 97):
        assert liked.before(row, 400).items.tolist() == given_ones.before(row, 400).items.tolist()
