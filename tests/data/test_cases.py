import json
import random

import polars as pl
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from llmrec.data import cases
from llmrec.data.arguments import SplitArguments
from llmrec.data.cases import case_frame, training_frame, write_split
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

PROTOCOLS = ["leave-one-out", "global-temporal", "by-sample", "cold-users"]


def split_of(seed, protocol):
    rng = random.Random(seed)
    rows = [(f"u{rng.randrange(20)}", f"i{rng.randrange(150)}", rng.randrange(10**9, 10**9 + 50)) for _ in range(300)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    log = Interactions.from_frame(frame)
    return SplitArguments(split=protocol).make(log, Items.from_interactions(log))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [1, 40, 1 << 20])
def test_files_hold_the_split_case_by_case(tmp_path, monkeypatch, seed, protocol, batch):
    monkeypatch.setattr(cases, "_BATCH", batch)
    split = split_of(seed, protocol)
    said = []
    write_split(split, tmp_path, lambda name, done: said.append((name, done)))
    for part in ("valid", "test"):
        written = pl.read_parquet(tmp_path / f"{part}.parquet")
        ids = split.item_ids
        assert written["user_id"].to_list() == split.users(part)
        assert written["history"].to_list() == [[ids[row] for row in h] for h in split.histories(part)]
        assert written["target"].to_list() == [ids[row] for row in split.targets(part)]
        assert written["timestamp"].to_list() == split.timestamps[split.positions[part]].tolist()
        assert written["timestamp"].dtype == pl.Int64
        assert written["counted"].to_list() == split.headline(part).tolist()
    train = Interactions.read(tmp_path / "train.parquet")
    expected = {
        user: [split.item_ids[row] for row in history]
        for user, history in zip(split.all_users, split.train, strict=True)
        if len(history)
    }
    assert train.histories() == expected
    document = json.loads((tmp_path / "split.json").read_text())
    assert document == {
        "protocol": split.protocol,
        "content_hash": split.content_hash,
        "counts": split.summary(),
    }
    assert [name for name, done in said if done == 0] == ["train.parquet", "valid.parquet", "test.parquet"]
    if batch == 1:
        assert len(said) > len(split.positions["test"])
    assert {file.name for file in tmp_path.iterdir()} == {
        "train.parquet", "valid.parquet", "test.parquet", "split.json",
    }  # fmt: skip


def test_unknown_and_fractional_times():
    frame = pl.DataFrame(
        {"user_id": ["u"] * 4, "item_id": list("abcd"), "timestamp": [1.5e9, 1.5e9 + 0.5, None, None]}
    )
    log = Interactions.from_frame(frame)
    split = SplitArguments().make(log, Items.from_interactions(log))
    assert training_frame(split).to_dict(as_series=False) == {
        "user_id": ["u", "u"],
        "item_id": ["a", "b"],
        "timestamp": [1.5e9, 1.5e9 + 0.5],
    }
    assert case_frame(split, "test").to_dicts() == [
        {"user_id": "u", "history": ["a", "b", "c"], "target": "d", "timestamp": None, "counted": True}
    ]


def test_without_times_there_is_no_column_of_times():
    log = Interactions.from_frame(pl.DataFrame({"user_id": ["u"] * 3, "item_id": list("abc")}))
    split = SplitArguments().make(log, Items.from_interactions(log))
    assert case_frame(split, "valid").columns == ["user_id", "history", "target", "counted"]
    assert training_frame(split).columns == ["user_id", "item_id"]


def test_a_first_interaction_is_a_case_with_an_empty_history():
    frame = pl.DataFrame(
        {"user_id": ["u", "u", "u", "v", "w"], "item_id": list("abcab"), "timestamp": [1, 2, 3, 4, 5]}
    ).with_columns(pl.col("timestamp") + 10**9)
    log = Interactions.from_frame(frame)
    arguments = SplitArguments(split="global-temporal", valid_time=str(10**9 + 3), test_time=str(10**9 + 4))
    split = arguments.make(log, Items.from_interactions(log))
    found = case_frame(split, "test")
    assert found["history"].to_list() == [[], []]
    assert found["target"].to_list() == ["a", "b"]
    assert found["counted"].to_list() == [False, False]


def test_a_run_that_breaks_off_leaves_no_split_json(tmp_path, monkeypatch):
    split = split_of(0, "leave-one-out")
    write_split(split, tmp_path)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "case_frame", fail)
    with pytest.raises(KeyboardInterrupt):
        write_split(split, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"train.parquet", "valid.parquet", "test.parquet"}


TIMED = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(0, 9), st.none() | st.integers(1_400_000_000, 1_400_000_005), st.booleans()
    ),
    min_size=4,
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(TIMED, st.sampled_from(PROTOCOLS), st.booleans())
def test_training_reads_back_in_its_order_whatever_times_are_missing(tmp_path_factory, rows, protocol, fractions):
    schema = {"user_id": pl.String, "item_id": pl.Int64, "timestamp": pl.Float64}
    timed = [
        (user, item, None if time is None else time + 0.5 * (half and fractions)) for user, item, time, half in rows
    ]
    log = Interactions.from_frame(pl.DataFrame(timed, schema=schema, orient="row"))
    try:
        split = SplitArguments(split=protocol).make(log, Items.from_interactions(log))
    except DataError:
        reject()  # too few for a split
    path = tmp_path_factory.mktemp("split") / "train.parquet"
    training_frame(split).write_parquet(path)
    expected = {
        user: [split.item_ids[row] for row in history]
        for user, history in zip(split.all_users, split.train, strict=True)
        if len(history)
    }
    read = Interactions.read(path)
    assert read.histories() == expected
    assert read.user_ids == list(expected)


def test_times_that_run_backwards_are_written_as_unknown_and_counted(caplog):
    times = [1_400_000_500, 1_400_000_100, 1_400_000_600, None, 1_400_000_300]
    frame = pl.DataFrame({"user_id": ["a"] * 5, "item_id": list("vwxyz"), "timestamp": times})
    even = frame.with_columns(user_id=pl.lit("b"), timestamp=pl.lit(1_400_000_000, pl.Int64))
    log = Interactions.from_frame(pl.concat([frame, even]))
    train = training_frame(SplitArguments().make(log, Items.from_interactions(log)))
    assert train["timestamp"].to_list() == [1_400_000_500, None, 1_400_000_600, *[1_400_000_000] * 3]
    assert "1 time(s) of training run backwards in a user's order, such as 1400000100 of user 'a'" in caplog.text
