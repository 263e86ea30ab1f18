"""Limits: their ranges and their way into a server's process."""

import json
from dataclasses import asdict, fields

import pytest

from llmrec.exceptions import RequestError
from llmrec.service.limits import Limits
from llmrec.service.settings import SERVICE, ServiceSettings


def test_every_limit_is_explained_and_its_default_is_legal():
    for each in fields(Limits):
        assert each.metadata["help"].endswith(".")
        assert each.metadata["lowest"] <= each.default <= each.metadata["highest"]
    assert (Limits().max_k, Limits().max_beams, Limits().max_body_bytes) == (1000, 512, 1_000_000)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_k": 0},
        {"max_k": 1001},
        {"max_beams": 513},
        {"max_depth": 0},
        {"deadline_ms": 0},
        {"max_rows_waiting": -1},
        {"read_seconds": float("nan")},
        {"canary_interval": 0.0},
        {"max_body_bytes": -5},
    ],
    ids=str,
)
def test_limits_out_of_range_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(RequestError, match=f"The limit {name} is "):
        Limits(**bad)


def test_a_queue_that_no_wide_search_could_leave_is_refused():
    with pytest.raises(RequestError, match="max_rows_running is 999, and one request may have 1000"):
        Limits(max_rows_running=999)
    assert Limits(max_rows_running=512, max_k=20).max_rows_running == 512


def test_settings_travel_in_one_variable():
    made = ServiceSettings(
        model="m",
        catalogs={"b": "/x", "a": "/y"},
        history_store="redis://:secret@host/0",
        adapters={"red": "/z"},
        drain_seconds=3.5,
        launch="abc",
        limits=Limits(max_k=7, read_seconds=1.5),
    )
    environment = made.environment()
    assert list(environment) == [SERVICE]
    found = ServiceSettings.from_environment(environment)
    assert found == made
    assert list(found.catalogs) == ["b", "a"]  # the first is the default one
    assert ServiceSettings.from_environment({}) == ServiceSettings()
    assert found.named("n", "l") == ServiceSettings(**{**vars(made), "model": "n", "launch": "l"})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "7",
        json.dumps({"nonsense": 1}),
        json.dumps({"limits": {"max_k": "many"}}),
        '{"limits": [1]}',
        json.dumps({"limits": {**asdict(Limits()), "max_k": -1}}),
    ],
)
def test_settings_that_cannot_be_read_are_refused(text):
    with pytest.raises(RequestError):
        ServiceSettings.from_environment({SERVICE: text})
