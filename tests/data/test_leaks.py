"""Leaks: every figure by its definition on random logs, and plants that are found one by one."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from logs import START, logged, random_split, shop, split_of

from llmrec.data.copies import first_places
from llmrec.data.interactions import Interactions
from llmrec.data.leaks import (
    history_overlap,
    look_ahead,
    overlap,
    repeats,
    seen_overlap,
    unseen,
)
from llmrec.data.split import Split


def sequence(split: Split, user: int) -> list[int]:
    return split.rows[split.offsets[user] : split.offsets[user + 1]].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_repeats_are_those_of_the_definition(seed: int) -> None:
    split = random_split(seed)
    again, immediate, pairs, copies, first = [], [], {}, 0, []
    assert split.timestamps is not None
    known: set[tuple[int, int, float]] = set()
    for user in range(len(split.all_users)):
        own = sequence(split, user)
        for place, item in enumerate(own):
            first.append(int(split.offsets[user]) + own.index(item))
            pairs[user, item] = pairs.get((user, item), 0) + 1
            time = split.timestamps[split.offsets[user] + place]
            copies += (user, item, time) in known
            if not np.isnan(time):
                known.add((user, item, time))
            if place:
                again.append(item in own[:place])
                immediate.append(item == own[place - 1])
    found = repeats(split)
    assert first_places(split).tolist() == first
    assert found["repeated_share"] == pytest.approx(np.mean(again))
    assert found["immediate_share"] == pytest.approx(np.mean(immediate))
    assert found["repeated_pairs"] == sum(count > 1 for count in pairs.values())
    assert found["repeated_pair_share"] == pytest.approx(found["repeated_pairs"] / len(pairs))
    assert found["exact_copies"] == copies
    histories = zip(split.histories("test"), split.targets("test"), strict=True)
    assert found["test_in_history_share"] == pytest.approx(
        np.mean([target in history for history, target in histories])
    )


@pytest.mark.parametrize("part", ["test", "valid"])
@pytest.mark.parametrize("seed", range(4))
def test_overlap_is_that_of_the_definition(seed: int, part: Any) -> None:
    split = random_split(seed)
    train = split.train
    leaked = [
        (split.all_users[user], split.item_ids[target])
        for user, target in zip(split.case_users(part).tolist(), split.targets(part).tolist(), strict=True)
        if target in train[user]
    ]
    found = overlap(split, part)
    assert found["in_training"] == len(leaked) > 0
    assert found["share"] == pytest.approx(len(leaked) / len(split.targets(part)))
    assert [(example["user"], example["item"]) for example in found["examples"]] == leaked[:5]
    json.dumps(found, allow_nan=False)


def test_overlap_is_set_against_the_rest_of_the_log() -> None:
    """Where a third of all interactions repeat, as many test items do; where none does, one test item stands out."""
    generator = np.random.default_rng(1)
    natural = overlap(split_of([generator.integers(0, 8, 9).tolist() for _ in range(300)]))
    assert natural["in_training"] > 100
    assert natural["p_value"] > 1e-3
    planted = [list(range(user, user + 6)) for user in range(200)]
    clean = overlap(split_of(planted))
    assert (clean["in_training"], clean["expected_share"]) == (0, 0)
    planted[77][2] = planted[77][-1]
    found = overlap(split_of(planted))
    assert found["in_training"] == 1
    assert found["p_value"] == 0
    assert found["examples"] == [{"user": "u77", "item": "i82", "time": None}]


def test_seen_pairs_are_those_of_the_definition() -> None:
    split = random_split(3)
    generator = np.random.default_rng(9)
    drawn = generator.random(len(split.rows)) < 0.4
    pairs = {
        (split.all_users[u], split.item_ids[i]) for u, i in zip(split.owner[drawn], split.rows[drawn], strict=True)
    }
    frame = pl.DataFrame([*pairs, ("stranger", "i1")], schema=["user_id", "item_id"], orient="row")
    found = seen_overlap(split, Interactions.from_frame(frame))
    hits = unexplained = 0
    examples = []
    for user, history, target in zip(split.users("test"), split.histories("test"), split.targets("test"), strict=True):
        if (user, split.item_ids[target]) in pairs:
            hits += 1
            if target not in history:
                unexplained += 1
                examples.append((user, split.item_ids[target]))
    assert found["in_seen"] == hits > unexplained > 0
    assert found["unexplained"] == unexplained
    assert found["share"] == pytest.approx(unexplained / len(split.targets("test")))
    assert [(example["user"], example["item"]) for example in found["examples"]] == examples[:5]
    assert found["users_in_common"] == len({user for user, _ in pairs})
    assert found["interactions"] == len(pairs) + 1


def test_seen_training_is_no_leak_and_another_users_test_item_is_none() -> None:
    interactions, _, split = logged(shop(1))
    training = Interactions(interactions.frame.filter(pl.Series(split.in_training)))
    assert seen_overlap(split, training)["unexplained"] == 0
    assert seen_overlap(split, training, "valid")["unexplained"] == 0
    assert seen_overlap(split, interactions)["unexplained"] == len(split.targets("test"))
    strangers = Interactions(interactions.frame.with_columns(pl.col("user_id") + "x"))
    found = seen_overlap(split, strangers)
    assert (found["users_in_common"], found["in_seen"]) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_look_ahead_is_that_of_the_definition(seed: int) -> None:
    split = random_split(seed, users=25)
    times = split.timestamps
    assert times is not None
    training = [place for place in np.flatnonzero(split.in_training).tolist() if not np.isnan(times[place])]
    shares, late = [], []
    for case, user in zip(split.positions["test"].tolist(), split.case_users("test").tolist(), strict=True):
        if np.isnan(times[case]):
            continue
        others = [times[place] > times[case] for place in training if split.owner[place] != user]
        shares.append(np.mean(others))
        own = [times[place] for place in training if split.rows[place] == split.rows[case]]
        if own:
            late.append(min(own) > times[case])
    found = look_ahead(split)
    assert found is not None
    assert found["cases"] == len(shares)
    assert found["later_share_mean"] == pytest.approx(np.mean(shares))
    assert found["later_share_median"] == pytest.approx(np.median(shares))
    assert found["later_item_share"] == pytest.approx(np.mean(late))
    assert look_ahead(split_of([[0, 1, 2]])) is None
    assert look_ahead(split_of([[0, 1, 2]], [[None, None, None]])) is None


def test_a_users_own_training_is_no_look_ahead() -> None:
    """A user of whom times are missing is in order of position, so that own training may be later than the test."""
    split = split_of([[0, 1, 2, 3, 4], [5, 1, 2, 3]], [[START + 90.0, None, START, START, START], [START + 90.0] * 4])
    found = look_ahead(split)
    assert found is not None
    # u0: both of u1's two training interactions are later; u1: of u0's two known ones, none is.
    assert found["later_share_mean"] == pytest.approx((1 + 0) / 2)


def test_after_a_temporal_cut_there_is_no_future() -> None:
    split = split_of([[0, 1, 2, 3]] * 5, [[START, START + 10.0, START + 100.0, START + 200.0]] * 5)
    found = look_ahead(split)
    assert found is not None
    assert found["later_share_mean"] == found["later_item_share"] == 0


@pytest.mark.parametrize("part", ["test", "valid"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_usual_is_told_by_no_target(seed: int, part: Any) -> None:
    """Against the definition, with several targets a user as a cut in time gives them, and users without training."""
    generator = np.random.default_rng(seed)
    split = random_split(seed, users=60)
    ends = split.train_ends.copy()
    for user in range(60):
        ends[user] = generator.integers(split.offsets[user], split.offsets[user + 1] + 1)
    outside = np.flatnonzero(np.arange(len(split.rows)) >= ends[split.owner])
    chosen = generator.integers(0, 3, len(outside))  # some of them are no targets
    positions: Any = {"valid": outside[chosen == 0], "test": outside[chosen == 1]}
    split = replace(split, train_ends=ends, positions=positions)
    targets = set(positions["valid"].tolist()) | set(positions["test"].tolist())
    again, just = [], []
    elsewhere, before, near, before_near = [], [], [], []
    for place, user in enumerate(split.owner.tolist()):
        own = split.rows[split.offsets[user] : place].tolist()
        again.append(split.rows[place] in own)
        just.append(bool(own) and own[-1] == split.rows[place])
        if own and place not in targets:
            elsewhere.append(place)
    for place in positions[part].tolist():
        free = max((p for p in range(place) if p not in targets), default=-1)
        usable = [free] * int(free > split.offsets[split.owner[place]])
        before += usable
        if place - free <= 2:
            near.append(place)
            before_near += usable
    expected = max(np.mean(np.array(again)[elsewhere]), np.mean(np.array(again)[before]))
    assert overlap(split, part)["expected_share"] == pytest.approx(expected)
    found = history_overlap(split, part)
    assert found["cases"] == len(near) > 5
    for name, mask in (("in_history", np.array(again)), ("just_before", np.array(just))):
        rate = max(np.mean(mask[elsewhere]), np.mean(mask[before_near]) if before_near else 0)
        assert found[name]["targets"] == int(mask[near].sum())
        assert found[name]["expected_share"] == pytest.approx(rate)
    assert len(found["examples"]) == min(5, found["in_history"]["targets"])
    json.dumps(found, allow_nan=False)


def test_numbers_that_begin_anew_with_every_user_tell_no_future() -> None:
    sequences = [[k % 7 for k in range(u, u + 6)] for u in range(30)]
    own = split_of(sequences, [[float(k) for k in range(1, 7)] for _ in sequences])
    assert not own.clock
    assert look_ahead(own) is None
    common = split_of(sequences, [[float(30 * k + u) for k in range(6)] for u in range(30)])
    assert look_ahead(common) is not None


@pytest.mark.parametrize("seed", range(4))
def test_unseen_items_and_users_are_those_of_the_definition(seed: int) -> None:
    split = random_split(seed, users=12, items=30)
    split.train_ends[3] = split.offsets[3]  # a user without training
    known = {item for own in split.train for item in own.tolist()}
    test, valid = set(split.targets("test").tolist()), set(split.targets("valid").tolist())
    everything = [
        set(split.rows.tolist()),
        {int(r) for k, r in enumerate(split.rows) if k not in split.positions["test"]},
    ]
    found = unseen(split)
    assert found["items_only_in_valid_or_test"] == len(everything[0] - known)
    assert found["items_only_in_test"] == len(everything[0] - everything[1])
    assert found["test_cases_of_unseen_items"] == sum(item not in known for item in split.targets("test").tolist())
    empty = {user for user in range(12) if not len(split.train[user])}
    asked = set(split.case_users("test").tolist()) | set(split.case_users("valid").tolist())
    assert found["cold_users"] == len(empty & asked)
    assert found["test_cases_of_cold_users"] == sum(u in empty for u in split.case_users("test").tolist())
    assert test | valid <= everything[0]
