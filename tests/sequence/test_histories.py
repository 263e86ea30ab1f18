"""Histories as tensors, against loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sequence_logs import ACTIONS, DOMAINS, random_split

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import History, LoggedHistories, collate


def events():
    return EventConfig(actions=list(ACTIONS), domains=list(DOMAINS), action_tokens="added")


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_case_is_all_before_its_target_and_the_event_asked_for(part):
    split = random_split()
    cases = LoggedHistories(split, events()).cases(part)
    number = {None: 0} | {name: place + 1 for place, name in enumerate(ACTIONS)}
    assert len(cases) == len(split.positions[part])
    for case, history, target in zip(cases, split.histories(part), split.positions[part].tolist(), strict=True):
        begin = target - len(history)
        assert case.rows.tolist() == history.tolist()
        assert case.timestamps.tolist() == split.timestamps[begin:target].tolist()
        assert case.actions.tolist() == [number[split.actions[place]] for place in range(begin, target)]
        assert case.next_timestamp == split.timestamps[target]
        assert case.next_action == number[split.actions[target]]
    some = LoggedHistories(split, events()).cases(part, [5, 2])
    assert [one.rows.tolist() for one in some] == [split.histories(part)[case].tolist() for case in (5, 2)]


def test_times_of_an_order_are_no_times_and_unknown_ones_are_marked():
    split = random_split()
    ordered = replace(split, timestamps=np.arange(len(split.rows), dtype=float), clock=None)
    assert "timestamps" not in LoggedHistories(ordered, events()).columns
    times = split.timestamps.copy()
    times[7] = np.nan
    column = LoggedHistories(replace(split, timestamps=times), events()).columns["timestamps"]
    assert column[7] == UNKNOWN_TIME
    assert column[8] == split.timestamps[8]


def test_names_are_those_of_training_in_order():
    split = random_split()
    assert LoggedHistories.names(split) == (list(ACTIONS), list(DOMAINS))
    assert LoggedHistories.names(replace(split, actions=None, domains=None)) == ([], [])
    late = split.actions.to_list()
    for place in split.positions["test"].tolist():
        late[place] = "returned"
    import polars as pl

    assert LoggedHistories.names(replace(split, actions=pl.Series(late)))[0] == list(ACTIONS)


def test_collating_keeps_the_last_items_and_says_what_follows():
    rows = [np.arange(7), np.array([3]), np.zeros(0, dtype=np.int64)]
    times = [np.arange(100, 107), np.array([50]), None]
    histories = [
        History(rows[0], times[0], np.array([1, 1, 2, 2, 0, 1, 2]), next_timestamp=120, next_action=3),
        History(rows[1], times[1]),
        History(rows[2]),
    ]
    batch = collate(histories, 4)
    assert batch["items"].tolist() == [[3, 4, 5, 6], [3, 0, 0, 0], [0] * 4]
    assert batch["mask"].tolist() == [[True] * 4, [True, False, False, False], [False] * 4]
    assert batch["timestamps"][0].tolist() == [103, 104, 105, 106]
    assert batch["timestamps"][1].tolist() == [50] + [UNKNOWN_TIME] * 3
    assert batch["next_timestamps"][0].tolist() == [104, 105, 106, 120]
    assert batch["next_timestamps"][1, 0] == 50
    assert batch["actions"].tolist() == [[2, 0, 1, 2], [0] * 4, [0] * 4]
    assert batch["next_actions"][0].tolist() == [0, 1, 2, 3]
    assert batch["next_actions"][1, 0] == -1
    assert "domains" not in batch


def test_collating_nothing_but_empty_histories():
    batch = collate([History(np.zeros(0, dtype=np.int64))] * 2, 5)
    assert batch["items"].shape == (2, 1)
    assert not batch["mask"].any()
    assert set(batch) == {"items", "mask"}
    assert batch["items"].dtype == torch.int64
