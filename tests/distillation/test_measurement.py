"""Sizes by hand, and who is asked what when times are taken; no time itself is judged."""

import pytest
import torch
from small_teachers import language_recommender, sequence_recommender
from torch import nn

from llmrec.distillation.measurement import WARM_UPS, latencies, size_of, this_machine
from llmrec.exceptions import DataError


class Asked:
    """A recommender that notes what it is asked."""

    def __init__(self, name, log, items=9, max_history=4):
        self.name, self.log, self.catalog = name, log, range(items)
        self.settings = type("S", (), {"max_history": max_history})

    def recommend_rows(self, histories, k):
        self.log.append((self.name, len(histories), k, [tuple(one) for one in histories]))


def test_parameters_count_once_and_buffers_are_memory():
    model = nn.Module()
    model.one, model.two = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    model.two.weight = model.one.weight
    model.register_buffer("table", torch.zeros(5, dtype=torch.float64))
    assert size_of(model) == {"parameters": 16, "bytes": 16 * 4 + 5 * 8}


def test_models_take_turns_and_are_asked_the_same():
    log = []
    told = []
    names = ("a", "b", "c")
    found = latencies(
        {name: Asked(name, log) for name in names}, None, (1, 4), 3, k=7, announce=lambda *one: told.append(one)
    )
    rounds = 3 + WARM_UPS
    assert len(log) == 2 * rounds * 3
    for turn in range(2 * rounds):
        asked = log[3 * turn : 3 * turn + 3]
        assert {entry[3] == asked[0][3] for entry in asked} == {True}
        assert [entry[0] for entry in asked] == [names[(turn % rounds + place) % 3] for place in range(3)]
        assert {(entry[1], entry[2]) for entry in asked} == {(1 if turn < rounds else 4, 7)}
        assert {len(history) for history in asked[0][3]} == {4}
    assert log[0][3] != log[3][3]
    assert told[-1] == ("timing batches of 4", 1.0)
    for name in names:
        for size in ("1", "4"):
            one = found[name][size]
            assert 0 <= one["low"] <= one["median"] <= one["high"]
            assert one["per_history"] == one["median"] / int(size)
            assert one["repetitions"] == 3


def test_given_histories_are_asked_and_a_seed_decides_which():
    logs = []
    for seed in (0, 0, 1):
        log = []
        latencies({"a": Asked("a", log)}, [[1], [2, 3], [4], [5], [6]], (3,), 2, seed=seed)
        logs.append([entry[3] for entry in log])
    assert logs[0] == logs[1] != logs[2]
    assert {history for asked in logs[0] for history in asked} <= {(1,), (2, 3), (4,), (5,), (6,)}


def test_real_recommenders_are_timed():
    found = latencies({"l": language_recommender(layers=1), "s": sequence_recommender(layers=1)}, None, (2,), 1)
    assert all(found[name]["2"]["median"] > 0 for name in ("l", "s"))


@pytest.mark.parametrize(
    "wrong", [{"repetitions": 0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}, {"histories": []}], ids=str
)
def test_nothing_to_measure_is_refused(wrong):
    with pytest.raises(DataError, match="measure nothing"):
        latencies({"a": Asked("a", [])}, **wrong)


def test_the_machine_is_named_without_its_paths():
    found = this_machine()
    assert {"processor", "cores", "threads", "gpu", "load", "versions"} <= set(found)
    assert found["threads"] == torch.get_num_threads()
    assert "/" not in str(found["processor"]).replace("w/", "")
