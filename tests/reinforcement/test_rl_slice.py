"""The temporal slice: the latest cases, and where their targets stand."""

import logging

import numpy as np
import polars as pl
import pytest
import torch

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import global_temporal, leave_one_out
from llmrec.exceptions import DataError
from llmrec.reinforcement.slice import SliceRanking, temporal_slice

BEGIN = 1_500_000_000


def split_of(times, protocol=leave_one_out, items=12):
    """A user for each list of times, who walks through the items."""
    rows = [
        (f"u{user}", f"i{place % items}", time) for user, own in enumerate(times) for place, time in enumerate(own)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    table = Items.from_frame(pl.DataFrame({"item_id": [f"i{row}" for row in range(items)]}))
    return protocol(Interactions.from_frame(frame), table)


@pytest.mark.parametrize("seed", range(5))
def test_the_latest_targets_are_taken(seed):
    rng = np.random.default_rng(seed)
    split = split_of([sorted((BEGIN + rng.integers(0, 40, 5) * 86_400).tolist()) for _ in range(30)])
    times = split.timestamps[split.positions["valid"]]
    for size in (1, 7, 29):
        chosen = temporal_slice(split, size)
        assert len(chosen) == size
        assert (np.diff(chosen) > 0).all()
        # By definition: ordered by (time, place), the last ones.
        expected = sorted(range(30), key=lambda case: (times[case], case))[-size:]
        assert chosen.tolist() == sorted(expected)
    assert temporal_slice(split, 0).tolist() == temporal_slice(split, 99).tolist() == list(range(30))


def test_without_a_clock_cases_are_drawn_and_it_is_said(caplog):
    split = split_of([list(range(6)) for _ in range(30)])
    with caplog.at_level(logging.INFO, "llmrec"):
        chosen = temporal_slice(split, 10, seed=4)
    assert "no clock" in caplog.text
    assert len(set(chosen.tolist())) == 10
    assert chosen.tolist() == temporal_slice(split, 10, seed=4).tolist()
    assert chosen.tolist() != temporal_slice(split, 10, seed=5).tolist()


def test_cases_kept_apart_are_no_part_of_it():
    # The last user begins after training has ended: nothing is known of them.
    times = [[BEGIN + 10 * step + user for step in range(10)] for user in range(8)]
    times.append([BEGIN + 85, BEGIN + 86, BEGIN + 99])
    split = split_of(times, lambda log, items: global_temporal(log, items, 0.2, 0.2))
    counted = split.headline("valid")
    assert 0 < counted.sum() < len(counted)
    assert temporal_slice(split, 0).tolist() == np.flatnonzero(counted).tolist()
    assert counted[temporal_slice(split, 3)].all()


def test_bad_sizes_and_nothing_to_watch():
    split = split_of([[BEGIN, BEGIN + 1, BEGIN + 2, BEGIN + 3]] * 3)
    with pytest.raises(DataError, match="-1"):
        temporal_slice(split, -1)
    cut = {**split.positions, "valid": split.positions["valid"][:0]}
    object.__setattr__(split, "positions", cut)
    with pytest.raises(DataError, match="no validation case"):
        temporal_slice(split, 5)


def test_places_are_of_the_lists_and_the_mode_is_given_back():
    model = torch.nn.Dropout()
    seen = []

    def recommend(asked):
        def lists(users, k):
            seen.append((asked.training, list(users), k))
            return [[user, user + 1, user + 2][:k] for user in users]

        return lists

    ranking = SliceRanking(recommend, np.array([0, 3, 4, 9]), 50)
    assert ranking.places(model).tolist() == [0, 2, 2, -1]
    assert seen == [(False, [0, 1, 2, 3], 50)]
    assert model.training
