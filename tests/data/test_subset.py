"""Shares of the training users: nested, and nothing but training changes."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import cold_users, global_temporal, leave_one_out
from llmrec.data.split import Split
from llmrec.data.subset import learnt_events, learnt_split, training_users
from llmrec.exceptions import DataError


def split_of(lengths: list[int], protocol: str = "leave-one-out", seed: int = 0) -> Split:
    """Users with so many interactions each, of twelve items, at random times."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{rng.integers(12)}", 1_500_000_000 + int(rng.integers(10**6)))
        for user, length in enumerate(lengths)
        for _ in range(length)
    ]
    log = Interactions.from_frame(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))
    items = Items.from_frame(pl.DataFrame({"item_id": [f"i{item}" for item in range(12)]}))
    if protocol == "global-temporal":
        return global_temporal(log, items)
    return cold_users(log, items, seed=seed) if protocol == "cold-users" else leave_one_out(log, items)


LENGTHS = [3, 9, 5, 1, 7, 12, 4, 2, 6, 8] * 3
PROTOCOLS = ["leave-one-out", "global-temporal", "cold-users"]


@given(
    lengths=st.lists(st.integers(1, 8), min_size=4, max_size=30).filter(lambda found: max(found) > 3),
    shares=st.lists(st.floats(0.001, 1), min_size=2, max_size=5),
    seed=st.integers(0, 9),
)
def test_smaller_shares_are_parts_of_larger_ones(lengths, shares, seed):
    split = split_of(lengths)
    before = np.zeros(len(lengths), dtype=bool)
    trained = split.train_ends > split.offsets[:-1]
    for share in sorted(shares):
        chosen = training_users(split, share, seed)
        assert chosen.dtype == bool
        assert chosen[before].all()
        assert trained[chosen].all()
        assert abs(chosen.sum() - share * trained.sum()) <= 0.5 or chosen.sum() == 1
        assert chosen.any()
        before = chosen
    assert np.array_equal(training_users(split, 1.0, seed), trained)


def test_the_draw_is_the_seed_s_and_not_the_first_users():
    split = split_of([5] * 200)
    drawn = [training_users(split, 0.5, seed) for seed in range(3)]
    assert [users.sum() for users in drawn] == [100] * 3
    assert len({users.tobytes() for users in drawn}) == 3
    assert np.array_equal(drawn[1], training_users(split, 0.5, 1))
    # Not the first ones, nor any run of them: in each half of the users about half are drawn.
    assert all(30 <= users[:100].sum() <= 70 for users in drawn)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_training_changes(protocol):
    split = split_of(LENGTHS, protocol)
    learnt = learnt_split(split, 0.4, seed=3)
    chosen = training_users(split, 0.4, seed=3)
    for user, (whole, kept) in enumerate(zip(split.train, learnt.train, strict=True)):
        assert kept.tolist() == (whole.tolist() if chosen[user] else [])
    counts = np.zeros(12, dtype=int)
    for kept in learnt.train:
        for item in kept.tolist():
            counts[item] += 1
    assert learnt.train_counts.tolist() == counts.tolist()
    assert learnt.in_training.sum() == counts.sum() < split.in_training.sum()
    for part in ("valid", "test"):
        assert learnt.users(part) == split.users(part)
        assert learnt.targets(part).tolist() == split.targets(part).tolist()
        assert [one.tolist() for one in learnt.histories(part)] == [one.tolist() for one in split.histories(part)]
    assert learnt.item_ids == split.item_ids
    assert np.array_equal(learnt.timestamps, split.timestamps)
    assert learnt.protocol == split.protocol
    # A checkpoint of another share must not be continued.
    assert learnt.content_hash != split.content_hash
    assert learnt_split(split, 1.0) is split


@given(
    lengths=st.lists(st.integers(1, 9), min_size=4, max_size=12).filter(lambda found: max(found) > 3),
    longest=st.one_of(st.none(), st.integers(2, 6)),
    share=st.sampled_from([0.3, 1.0]),
)
def test_the_events_that_are_learnt_from(lengths, longest, share):
    learnt = learnt_split(split_of(lengths), share)
    expected = set()
    for begin, end in zip(learnt.offsets[:-1].tolist(), learnt.train_ends.tolist(), strict=True):
        places = list(range(begin, end))
        if len(places) >= 2:
            expected |= set(places if longest is None else places[-longest:])
    assert set(np.flatnonzero(learnt_events(learnt, longest)).tolist()) == expected


@pytest.mark.parametrize("take", ["all", "last"])
@pytest.mark.parametrize("stride", [0, 1])
def test_they_are_those_in_the_windows_of_a_training(take, stride):
    from llmrec.sequence.events import EventConfig
    from llmrec.sequence.histories import LoggedHistories
    from llmrec.sequence.windows import TrainingWindows

    learnt = learnt_split(split_of(LENGTHS), 0.5)
    windows = TrainingWindows(LoggedHistories(learnt, EventConfig()), 4, take, stride if take == "all" else 0)
    inside = np.zeros(len(learnt.rows), dtype=bool)
    for window in windows.windows:
        inside[window.begin : window.end] = True
    assert np.array_equal(learnt_events(learnt, 5 if take == "last" else None), inside)
    # What negatives are drawn by is counted over these alone.
    assert windows.target_counts()[learnt.train_counts == 0].sum() == 0


@pytest.mark.parametrize(
    ("share", "seed", "said"),
    [(0.0, 0, "is 0.0"), (1.01, 0, "is 1.01"), (float("nan"), 0, "is nan"), (0.5, -1, "is -1")],
    ids=["none", "more", "nan", "seed"],
)
def test_shares_and_seeds_that_are_none_are_refused(share, seed, said):
    split = split_of([5] * 4)
    for function in (training_users, learnt_split):
        with pytest.raises(DataError, match=said):
            function(split, share, seed)


def test_the_trainings_flags_are_checked_before_anything_is_read():
    from llmrec.sequence.arguments import SequenceArguments
    from llmrec.tasks.arguments import DataArguments

    with pytest.raises(DataError, match="--train_share is 2"):
        SequenceArguments(interactions="x", artefact="y", train_share=2).check()
    with pytest.raises(DataError, match="--train_share_seed is -1"):
        SequenceArguments(interactions="x", artefact="y", train_share_seed=-1).check()
    with pytest.raises(DataError, match="--train_share is 0"):
        DataArguments(interactions="x", artefact="y", items="z", train_share=0).check(-1)
    with pytest.raises(DataError, match="--test_users is -2"):
        DataArguments(interactions="x", artefact="y", items="z", test_users=-2).check(-1)
