"""Every protocol against its definition, by loops over random logs."""

import math
import random
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from llmrec.data.arguments import SplitArguments
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import by_sample, cold_users, global_temporal
from llmrec.exceptions import DataError

BASE = 1_400_000_000


def random_log(seed, users=30, missing=False, moments=40):
    """Rows (user, item, time), users' rows interleaved, with many ties in time."""
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        for _ in range(rng.randrange(1, 9)):
            time = BASE + 86_400 * rng.randrange(moments)
            rows.append((f"u{user}", f"i{rng.randrange(20)}", time))
    rng.shuffle(rows)
    if missing:
        rows = [(user, item, None if rng.random() < 0.05 else time) for user, item, time in rows]
    frame = pl.DataFrame(
        rows, schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}, orient="row"
    )
    items = Items.from_frame(pl.DataFrame({"item_id": [f"i{n}" for n in range(20)]}))
    return Interactions.from_frame(frame), items


def sequences(interactions):
    """user -> [(item, time)] in the log's own order, a missing time being that of the row before."""
    found = {}
    for user, item, time in interactions.frame.select("user_id", "item_id", "timestamp").rows():
        row = found.setdefault(user, [])
        last = row[-1][1] if row else -math.inf
        row.append((item, last if time is None else max(last, time)))
    return found


def cases(split, part):
    """(user, history, target) of every case, as ids."""
    ids = split.item_ids
    return [
        (user, [ids[row] for row in history], ids[target])
        for user, history, target in zip(split.users(part), split.histories(part), split.targets(part), strict=True)
    ]


def training(split):
    return {u: [split.item_ids[row] for row in rows] for u, rows in zip(split.all_users, split.train, strict=True)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("targets", ["all", "first"])
def test_global_temporal(seed, targets):
    interactions, items = random_log(seed, missing=seed % 2 == 1)
    valid_time, test_time = BASE + 86_400 * 25, BASE + 86_400 * 33
    split = global_temporal(interactions, items, valid_time=valid_time, test_time=test_time, targets=targets)
    log = sequences(interactions)
    assert training(split) == {u: [i for i, t in rows if t < valid_time] for u, rows in log.items()}
    for part, low, high in (("valid", valid_time, test_time), ("test", test_time, math.inf)):
        expected = []
        for user, rows in log.items():
            inside = [place for place, (_, time) in enumerate(rows) if low <= time < high]
            for place in inside[: None if targets == "all" else 1]:
                expected.append((user, [i for i, _ in rows[:place]], rows[place][0]))
        assert cases(split, part) == expected
        learnt = {item for rows in training(split).values() for item in rows}
        warm = [bool(training(split)[user]) and target in learnt for user, _, target in expected]
        assert split.headline(part).tolist() == warm
        assert (split.unseen_users(part) | split.unseen_items(part)).tolist() == [not w for w in warm]
    summary = split.summary()
    assert summary["test_users_unseen_in_training"] == len(
        {user for user, _, _ in cases(split, "test") if not training(split)[user]}
    )
    assert summary["test_items_unseen_in_training"] == len({t for _, _, t in cases(split, "test")} - learnt)
    assert summary["training_interactions"] == sum(map(len, training(split).values()))


@pytest.mark.parametrize("seed", range(6))
def test_global_temporal_by_share_never_cuts_a_moment(seed):
    interactions, items = random_log(seed, users=80)
    split = global_temporal(interactions, items, valid_share=0.15, test_share=0.2)
    times = sorted(time for rows in sequences(interactions).values() for _, time in rows)
    test_time, valid_time = split.protocol["test_time"], split.protocol["valid_time"]
    assert test_time == times[math.floor(len(times) * 0.8 + 1e-9)]
    before = [time for time in times if time < test_time]
    assert valid_time == before[math.floor(len(before) * (1 - 0.15 / 0.8) + 1e-9)]
    flat = split.timestamps
    assert flat[split.positions["valid"]].min() == valid_time > flat[split.in_training].max()
    assert flat[split.positions["test"]].min() == test_time > flat[split.positions["valid"]].max()
    # The shares are met up to the largest moment.
    largest = max(times.count(time) for time in set(times))
    assert abs(len(split.positions["test"]) - 0.2 * len(times)) <= largest
    assert abs(len(split.positions["valid"]) - 0.15 * len(times)) <= 2 * largest


@pytest.mark.parametrize("seed", range(8))
def test_by_sample(seed):
    interactions, items = random_log(seed, missing=seed % 2 == 1)
    split = by_sample(interactions, items)
    log = sequences(interactions)
    samples = [
        (time, user, [i for i, _ in rows[:place]], item)
        for user, rows in log.items()
        for place, (item, time) in enumerate(rows)
        if place
    ]
    samples.sort(key=lambda sample: sample[0])
    first, second = math.floor(len(samples) * 0.8 + 1e-9), math.floor(len(samples) * 0.9 + 1e-9)
    for part, chosen in (("valid", samples[first:second]), ("test", samples[second:])):
        assert sorted(cases(split, part)) == sorted((user, history, item) for _, user, history, item in chosen)
        assert split.headline(part).all()
    learnt = {}
    for _, user, history, item in samples[:first]:
        learnt[user] = [*history, item]
    assert training(split) == {user: learnt.get(user, []) for user in log}


@pytest.mark.parametrize("seed", range(6))
def test_cold_users(seed):
    interactions, items = random_log(seed, users=40)
    split = cold_users(interactions, items, valid_share=0.1, test_share=0.2, seed=seed)
    log = {user: [item for item, _ in rows] for user, rows in sequences(interactions).items()}
    held = {part: split.users(part) for part in ("valid", "test")}
    assert (len(held["valid"]), len(held["test"])) == (4, 8)
    assert not set(held["valid"]) & set(held["test"])
    outside = {*held["valid"], *held["test"]}
    assert training(split) == {user: [] if user in outside else rows for user, rows in log.items()}
    for part in ("valid", "test"):
        assert cases(split, part) == [(user, log[user][:-1], log[user][-1]) for user in held[part]]
        assert all(len(log[user]) > 1 for user in held[part])
        assert split.unseen_users(part).all()
    assert cold_users(interactions, items, 0.1, 0.2, seed).content_hash == split.content_hash
    assert cold_users(interactions, items, 0.1, 0.2, seed + 100).content_hash != split.content_hash


def test_days_and_gaps():
    frame = pl.DataFrame(
        {
            "user_id": ["a"] * 4 + ["b"] * 3 + ["c"] * 3,
            "item_id": [str(n) for n in range(10)],
            "timestamp": [
                *(BASE, BASE + 1, BASE + 2, 86_400 * (BASE // 86_400 + 1)),  # a few seconds to midnight and beyond
                *(BASE, BASE + 1, BASE + 90_000),
                *(BASE, BASE, BASE),
            ],
        }
    )
    items = Items.from_frame(pl.DataFrame({"item_id": [str(n) for n in range(10)]}))
    split = SplitArguments().make(Interactions.from_frame(frame), items)
    assert split.later_days("test").tolist() == [True, True, False]
    assert split.later_days("valid").tolist() == [False, False, False]
    assert split.gaps("valid").tolist() == [1, 1, 0]
    # A clock that starts at nought has no days.
    order = frame.with_columns(pl.col("timestamp") - BASE)
    assert SplitArguments().make(Interactions.from_frame(order), items).later_days("test") is None


def test_action_and_domain_stay_with_their_interaction():
    frame = pl.DataFrame(
        {
            "user_id": ["b", "a", "b", "a", "b", "a"],
            "item_id": ["1", "2", "3", "4", "5", "6"],
            "timestamp": [3, 1, 2, 2, 1, 3],
            "domain": ["three", "x", "two", "y", "one", "z"],
        }
    )
    split = SplitArguments().make(Interactions.from_frame(frame), Items.from_frame(frame.select("item_id")))
    assert split.actions is None
    assert split.domains.to_list() == ["one", "two", "three", "x", "y", "z"]
    assert split.domains.gather(split.positions["test"]).to_list() == ["three", "z"]


@pytest.mark.parametrize(
    "arguments",
    [
        SplitArguments(),
        SplitArguments(min_history=4),
        SplitArguments("global-temporal"),
        SplitArguments("global-temporal", test_time="2014-06-12", valid_time=str(BASE + 86_400 * 20), targets="first"),
        SplitArguments("by-sample", valid_share=0.2),
        SplitArguments("cold-users", split_seed=3),
        SplitArguments(ties="shuffle", tie_seed=5),
    ],
)
def test_a_recorded_protocol_makes_the_split_again(arguments):
    interactions, items = random_log(1, users=60)
    split = arguments.make(interactions, items)
    again = SplitArguments.from_protocol(split.protocol).make(interactions, items)
    assert again.content_hash == split.content_hash
    assert again.protocol == split.protocol


def test_all_protocols_differ_in_their_hash():
    interactions, items = random_log(2, users=60)
    names = ("leave-one-out", "global-temporal", "by-sample", "cold-users")
    assert len({SplitArguments(name).make(interactions, items).content_hash for name in names}) == 4


def test_bad_inputs():
    interactions, items = random_log(3)
    with pytest.raises(DataError, match=r"no split 'last'.*leave-one-out"):
        SplitArguments("last").make(interactions, items)
    for name in ("global-temporal", "by-sample", "cold-users"):
        for shares in ((0.5, 0.5), (0, 0.1), (0.1, 1.2), (-0.1, 0.1)):
            with pytest.raises(DataError, match="shares"):
                SplitArguments(name, *shares).make(interactions, items)
    untimed = Interactions.from_frame(interactions.frame.drop("timestamp"))
    for name in ("global-temporal", "by-sample"):
        with pytest.raises(DataError, match=r"no timestamps.*--timestamp-column"):
            SplitArguments(name).make(untimed, items)
    with pytest.raises(DataError, match="The training part is empty"):
        SplitArguments("global-temporal", valid_time="100", test_time="2014-06-01").make(interactions, items)
    with pytest.raises(DataError, match="The test part is empty"):
        SplitArguments("global-temporal", valid_time="2014-06-01", test_time="2024-06-01").make(interactions, items)
    with pytest.raises(DataError, match=r"'soon' is neither unix seconds nor"):
        SplitArguments("global-temporal", test_time="soon").make(interactions, items)
    few = Interactions.from_frame(pl.DataFrame({"user_id": ["a", "b"], "item_id": ["i1", "i2"], "timestamp": [1, 2]}))
    with pytest.raises(DataError, match="0 samples make"):
        SplitArguments("by-sample").make(few, items)
    with pytest.raises(DataError, match="0 of 2 users have two interactions"):
        SplitArguments("cold-users").make(few, items)


def test_a_catalog_of_one_item_is_refused():
    one = Interactions.from_frame(pl.DataFrame({"user_id": ["a"] * 4, "item_id": ["i1"] * 4}))
    for name in ("leave-one-out", "cold-users"):
        with pytest.raises(DataError, match=r"has 1 item, 'i1', so there is nothing to choose from\. Check"):
            SplitArguments(name).make(one, Items.from_interactions(one))


def test_movielens_by_time(shared_data):
    folder = shared_data / "movielens-1m"
    interactions = Interactions.read(folder / "interactions.csv.gz")
    items = Items.read(folder / "items.csv.gz")
    split = global_temporal(interactions, items)
    flat = split.timestamps
    assert flat[split.in_training].max() < flat[split.positions["valid"]].min()
    assert flat[split.positions["valid"]].max() < flat[split.positions["test"]].min()
    assert split.in_training.mean() == pytest.approx(0.8, abs=1e-3)
    assert np.mean(split.headline("test")) < 1


def test_a_case_without_a_history_has_no_gap_and_no_day():
    frame = pl.DataFrame(
        {
            "user_id": ["a", "a", "b", "b", "c"],
            "item_id": ["i1", "i2", "i1", "i2", "i3"],
            "timestamp": [BASE, BASE + 86_400, BASE + 2 * 86_400, BASE + 3 * 86_400, BASE + 4 * 86_400],
        }
    )
    items = Items.from_frame(pl.DataFrame({"item_id": ["i1", "i2", "i3"]}))
    split = global_temporal(
        Interactions.from_frame(frame), items, valid_time=BASE + 86_400, test_time=BASE + 2 * 86_400
    )
    assert [history.tolist() for history in split.histories("test")] == [[], [0], []]
    assert split.gaps("test").tolist() == pytest.approx([math.nan, 86_400, math.nan], nan_ok=True)
    assert split.later_days("test").tolist() == [False, True, False]


def test_the_hash_holds_every_part():
    interactions, items = random_log(4, users=60)
    split = global_temporal(interactions, items)
    both = np.concatenate([split.positions["valid"], split.positions["test"]])
    moved = {"valid": both[: len(split.positions["valid"]) + 1], "test": both[len(split.positions["valid"]) + 1 :]}
    variants = [
        split,
        replace(split, positions=moved),
        replace(split, train_ends=np.maximum(split.train_ends - 1, split.offsets[:-1])),
        replace(split, rows=split.rows[::-1]),
    ]
    assert len({variant.content_hash for variant in variants}) == len(variants)
