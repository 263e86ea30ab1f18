import random

import numpy as np
import polars as pl
import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.exceptions import DataError


def log_of(histories, times=None):
    rows = [(user, item) for user, items in histories.items() for item in items]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    return Interactions.from_frame(frame if times is None else frame.with_columns(timestamp=pl.Series(times)))


def table_of(ids):
    return Items.from_frame(pl.DataFrame({"item_id": list(ids)}))


def as_ids(rows, items):
    return [items.ids[row] for row in rows]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("min_history", [3, 5])
def test_parts_equal_their_definition(seed, min_history):
    rng = random.Random(seed)
    catalog = [f"i{n}" for n in range(30)]
    rng.shuffle(catalog)
    histories = {f"u{n}": [rng.choice(catalog) for _ in range(rng.randrange(1, 9))] for n in range(40)}
    histories["long"] = [rng.choice(catalog) for _ in range(9)]
    items = table_of(catalog)
    split = leave_one_out(log_of(histories), items, min_history)
    long = [user for user in histories if len(histories[user]) >= min_history]
    assert split.users("test") == split.users("valid") == long
    assert split.all_users == list(histories)
    expected = [history[:-2] if user in long else history for user, history in histories.items()]
    assert [as_ids(rows, items) for rows in split.train] == expected
    assert [as_ids(rows, items) for rows in split.histories("valid")] == [histories[user][:-2] for user in long]
    assert [as_ids(rows, items) for rows in split.histories("test")] == [histories[user][:-1] for user in long]
    assert as_ids(split.targets("valid"), items) == [histories[user][-2] for user in long]
    assert as_ids(split.targets("test"), items) == [histories[user][-1] for user in long]
    assert {rows.dtype for rows in split.train + split.histories("test")} == {np.dtype(np.int32)}
    summary = split.summary()
    assert summary["interactions"] == sum(map(len, histories.values()))
    assert summary["users"] == len(histories)
    assert summary["evaluated_users"] == len(long)
    assert summary["items"] == split.num_items == 30
    repeated = [histories[user][-1] in histories[user][:-1] for user in long]
    assert summary["repeated_test_share"] == pytest.approx(sum(repeated) / len(long))


def test_ties_of_the_test_item():
    histories = {"a": ["1", "2", "3"], "b": ["1", "2", "3"], "c": ["1", "2", "3"], "d": ["1"]}
    split = leave_one_out(log_of(histories, [1, 2, 2, 1, 1, 9, 1, None, 3, 0]), table_of("123"))
    assert split.gaps("test").tolist() == pytest.approx([0, 8, float("nan")], nan_ok=True)
    assert split.summary()["tied_test_share"] == pytest.approx(1 / 3)
    untimed = leave_one_out(log_of(histories), table_of("123"))
    assert untimed.gaps("test") is None
    assert untimed.later_days("test") is None
    assert "tied_test_share" not in untimed.summary()


def test_what_times_are_taken_for_is_known_or_guessed():
    histories = {"a": ["1", "2", "3"]}
    table = table_of("123")

    def made(times, unit="auto", forget=False):
        log = log_of(histories).frame.with_columns(timestamp=pl.Series(times))
        log = Interactions.from_frame(log, timestamp_unit=unit)
        return leave_one_out(Interactions(log.frame) if forget else log, table)

    day = 86_400
    seconds = [day * 15_000, day * 15_001, day * 15_002]
    thousands = [1000 * time for time in seconds]
    assert leave_one_out(log_of(histories), table).clock is False
    assert made(seconds).clock is made(seconds, forget=True).clock is made(thousands, "ms").clock is True
    assert made([1, 2, 3]).clock is made([1, 2, 3], forget=True).clock is made(thousands, "order").clock is False
    assert made(seconds, "order").clock is False
    assert made(thousands, "order").later_days("test") is None
    assert made(thousands, "order", forget=True).clock is False  # the year 43000 is none
    archive = made(["1974-01-01", "1974-01-02", "1974-01-02"])
    assert archive.clock is True
    assert archive.later_days("valid").tolist() == [True]
    assert {made(seconds, unit).content_hash for unit in ("s", "order")} == {made(thousands, "ms").content_hash}


def test_positions_decide_if_they_order_every_tie():
    def decide(times, positions):
        rows = {"user_id": ["a", "a", "a", "b"], "item_id": ["1", "2", "3", "1"], "timestamp": times}
        log = pl.DataFrame(rows | ({"position": positions} if positions else {}))
        return leave_one_out(Interactions.from_frame(log), table_of("123")).positions_decide

    assert decide([5, 5, 6, 6], [0, 1, 2, 0])
    assert decide([5, 5, 5, 6], [7, 3, 5, 0])
    assert not decide([5, 5, 6, 6], None)
    assert not decide([5, 5, 6, 6], [1, 1, 2, 0])
    assert not decide([5, 5, 6, 6], [0, 1, None, 0])
    assert not decide([4, 5, 6, 6], [0, 1, 2, 0])  # no tie to decide


def test_the_hash_is_of_the_content_alone(tmp_path):
    histories = {"a": ["1", "2", "3"], "b": ["2", "3"]}
    log = log_of(histories, [1, 2, 3, 4, 5])
    log.write(tmp_path / "log.parquet")
    log.frame.rename({"item_id": "asin"}).write_csv(tmp_path / "log.csv")
    pl.DataFrame({"item_id": [1, 2, 3]}).write_parquet(tmp_path / "items.parquet")
    hashes = {
        leave_one_out(Interactions.read(tmp_path / name), table).content_hash
        for name in ("log.parquet", "log.csv")
        for table in (table_of("123"), Items.read(tmp_path / "items.parquet"))
    }
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


def test_any_change_of_content_changes_the_hash():
    base = {"a": ["1", "2", "3"], "b": ["2", "3", "1", "2"]}
    variants = [
        (base, "123"),
        (base, "132"),  # item order, which is what rows mean
        (base, "1234"),
        ({"c": base["a"], "b": base["b"]}, "123"),
        ({"b": base["b"], "a": base["a"]}, "123"),
        (base | {"a": ["2", "1", "3"]}, "123"),
        (base | {"a": ["1", "3", "2"]}, "123"),
        (base | {"d": ["1"]}, "123"),
    ]
    hashes = [leave_one_out(log_of(histories), table_of(ids)).content_hash for histories, ids in variants]
    assert len(set(hashes)) == len(variants)
    # A user who counts as too short has the same items, but in other parts.
    assert leave_one_out(log_of(base), table_of("123"), min_history=4).content_hash not in hashes


def test_lengths_keep_ids_apart_that_read_alike():
    one = leave_one_out(log_of({"u": ["ab", "c", "ab", "c"]}), table_of(["ab", "c"]))
    other = leave_one_out(log_of({"u": ["a", "bc", "a", "bc"]}), table_of(["a", "bc"]))
    assert one.content_hash != other.content_hash


def test_bad_inputs():
    log = log_of({"u": ["1", "2", "3"]})
    with pytest.raises(DataError, match=r"2 item\(s\).* not in the item table, such as '2'.*with_missing"):
        leave_one_out(log, table_of("14"))
    with pytest.raises(DataError, match="min_history is 2"):
        leave_one_out(log, table_of("123"), min_history=2)
    with pytest.raises(DataError, match=r"None of the 1 users has 4 .*most are 3"):
        leave_one_out(log, table_of("123"), min_history=4)


def test_published_ties_of_beauty(shared_data):
    folder = shared_data / "amazon-beauty"
    interactions = Interactions.read(folder / "interactions.csv.gz")
    split = leave_one_out(interactions, Items.read(folder / "items.jsonl.gz"))
    assert interactions.rows_without_timestamp == 287
    assert int(split.later_days("test").sum()) == int((split.gaps("test") > 0).sum()) == 12_612
    assert split.summary() == {
        "users": 22_363,
        "evaluated_users": 22_363,
        "items": 12_101,
        "interactions": 198_502,
        "training_interactions": 198_502 - 2 * 22_363,
        "validation_cases": 22_363,
        "test_cases": 22_363,
        "test_items_unseen_in_training": len(set(split.targets("test")) - set(np.concatenate(split.train))),
        "test_cases_of_unseen_items": int((~np.isin(split.targets("test"), np.concatenate(split.train))).sum()),
        "test_users_unseen_in_training": 0,
        "repeated_test_share": 0.0,
        "tied_test_share": pytest.approx(0.435, abs=0.002),
    }
