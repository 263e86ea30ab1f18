"""Logs of several domains as one, against the definition, user by user."""

import json
import logging
import sys
from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.cli.main import main
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.merging import merge
from llmrec.data.protocols import leave_one_out
from llmrec.exceptions import DataError

START = 1_400_000_000
NAMES = ("books", "films", "games")


def log_of(rows, timed=True):
    """Interactions of (user, item, time or None) rows."""
    frame = pl.DataFrame({"user_id": [row[0] for row in rows], "item_id": [row[1] for row in rows]})
    if timed:
        frame = frame.with_columns(pl.Series("timestamp", [row[2] for row in rows], dtype=pl.Int64))
    return Interactions.from_frame(frame.with_columns(pl.int_range(pl.len()).over("user_id").alias("position")))


@st.composite
def random_logs(draw, timed=None):
    """Two or three logs: every event has an item of its own, so that it can be told apart wherever it is."""
    found = {}
    for name in NAMES[: draw(st.integers(2, 3))]:
        has_times = draw(st.booleans()) if timed is None else timed
        rows = []
        for user in range(draw(st.integers(1, 4))):
            times = sorted(draw(st.lists(st.integers(0, 9), max_size=6)))
            for number, time in enumerate(times):
                known = timed or draw(st.integers(0, 19)) > 0
                rows.append((f"u{user}", f"{name}-{user}-{number}", START + 86_400 * time if known else None))
        rows.append((f"only-{name}", f"{name}-last", START))
        found[name] = log_of(rows, has_times)
    return found


def expected(logs):
    """The definition: every sequence, by user, as (item, domain) pairs; and which users are several."""
    histories = {name: log.histories() for name, log in logs.items()}
    sequences, apart = {}, set()
    for user in dict.fromkeys(user for own in histories.values() for user in own):
        parts = {name: own[user] for name, own in histories.items() if user in own}
        events = []
        for place, name in enumerate(logs):
            if name in parts:
                rows = logs[name].frame.filter(pl.col("user_id") == user)
                has_times = "timestamp" in rows.columns
                times = rows["timestamp"].to_list() if has_times else [None] * len(rows)
                events += [
                    (time, place, at, item, name)
                    for at, (time, item) in enumerate(zip(times, parts[name], strict=True))
                ]
        if len(parts) == 1:
            sequences[user] = [(event[3], event[4]) for event in events]
        elif all(event[0] is not None for event in events):
            sequences[user] = [(event[3], event[4]) for event in sorted(events)]
        else:
            apart.add(user)
            asked = [name for name in parts if len(parts[name]) >= 3]
            for own in asked or parts:
                before = [
                    (item, name)
                    for name in parts
                    if name != own and asked
                    for item in (parts[name][:-2] if name in asked else parts[name])
                ]
                sequences[f"{user}@{own}"] = before + [(item, own) for item in parts[own]]
    return sequences, apart


def sequences_of(interactions):
    grouped = interactions.frame.group_by("user_id", maintain_order=True).agg("item_id", "domain", "position")
    found = {}
    for user, items, domains, positions in grouped.iter_rows():
        assert positions == list(range(len(items)))
        found[user] = list(zip(items, domains, strict=True))
    return found


@settings(max_examples=150, deadline=None)
@given(random_logs())
def test_sequences_are_those_of_the_definition(tmp_path_factory, logs):
    merged, items, report = merge(logs)
    wanted, apart = expected(logs)
    found = sequences_of(merged)
    assert found == wanted
    path = tmp_path_factory.mktemp("merged") / "log.parquet"
    merged.write(path)
    assert sequences_of(Interactions.read(path)) == wanted
    assert report.separated_users == len(apart)
    assert report.rows == sum(map(len, wanted.values())) == len(merged)
    assert sorted(items.ids) == sorted({item for own in wanted.values() for item, _ in own} | set(items.ids))
    assert report.users == {name: len(log.user_ids) for name, log in logs.items()}


@settings(max_examples=150, deadline=None)
@given(random_logs())
def test_no_sequence_knows_what_another_is_asked_for(logs):
    merged, items, _ = merge(logs)
    found = sequences_of(merged)
    held = {}  # what leave-one-out asks each sequence for
    for user, own in found.items():
        if len(own) >= 3:
            held[user] = {item for item, _ in own[-2:]}
    for user, asked in held.items():
        for other, own in found.items():
            if other != user:
                assert not asked & {item for item, _ in own}
    # And it asks in each domain for what it would ask for in that domain alone, of users that are now apart.
    for name, log in logs.items():
        alone = {user: set(own[-2:]) for user, own in log.histories().items() if len(own) >= 3}
        for user, asked in alone.items():
            if f"{user}@{name}" in found:
                assert held[f"{user}@{name}"] == asked
    if held:
        split = leave_one_out(merged, items)
        domains = split.domains.gather(pl.Series(split.positions["test"])).to_list()
        for user, domain in zip(split.users("test"), domains, strict=True):
            assert "@" not in user or user.endswith(f"@{domain}")


@settings(max_examples=60, deadline=None)
@given(random_logs(timed=True))
def test_with_clocks_all_is_one_sequence_by_time(logs):
    merged, _, report = merge(logs)
    assert report.separated_users == 0
    assert report.untimed == []
    assert len(merged) == sum(len(log) for log in logs.values())
    times = merged.frame.group_by("user_id", maintain_order=True).agg("timestamp")["timestamp"].to_list()
    assert all(own == sorted(own) for own in times)
    events = Counter(item for log in logs.values() for item in log.frame["item_id"])
    assert Counter(merged.frame["item_id"]) == events


def test_equal_times_go_by_the_order_of_the_domains():
    logs = {"b": log_of([("u", "x", START), ("u", "y", START)]), "a": log_of([("u", "z", START)])}
    assert sequences_of(merge(logs)[0]) == {"u": [("x", "b"), ("y", "b"), ("z", "a")]}


def test_numbers_of_an_order_are_no_clock(caplog):
    ordered = Interactions.from_frame(
        pl.DataFrame({"user_id": ["u"] * 3, "item_id": list("abc"), "timestamp": [3, 1, 2]})
    )
    assert ordered.time_unit == "order"
    timed = log_of([("u", item, START + place) for place, item in enumerate("pqr")])
    with caplog.at_level(logging.WARNING, "llmrec"):
        merged, _, report = merge({"a": ordered, "b": timed})
    assert report.untimed == ["a"]
    assert any("no clock in a" in record.message for record in caplog.records)
    assert [item for item, _ in sequences_of(merged)["u@a"]] == ["p", "b", "c", "a"]
    assert [item for item, _ in sequences_of(merged)["u@b"]] == ["b", "p", "q", "r"]
    # Times of another domain would be compared with the own ones.
    own = merged.frame.filter(pl.col("user_id") == "u@b")
    assert own["timestamp"].to_list() == [None, START, START + 1, START + 2]


def test_other_columns_stay_with_their_events():
    first = Interactions.from_frame(
        pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [START, START + 9], "rating": [1, 2]})
    )
    second = Interactions.from_frame(
        pl.DataFrame({"user_id": ["u"], "item_id": ["c"], "timestamp": [START + 5], "action": ["view"]})
    )
    frame = merge({"x": first, "y": second})[0].frame
    assert frame.select("item_id", "rating", "action", "domain").rows() == [
        ("a", 1, None, "x"),
        ("c", None, "view", "y"),
        ("b", 2, None, "x"),
    ]


def test_ids_of_two_domains_are_told_apart(caplog):
    logs = {
        "a": log_of([("u", "1", START), ("u", "2", START + 1)]),
        "b": log_of([("v", "2", START), ("v", "3", START + 1)]),
    }
    tables = {
        "a": Items.from_frame(pl.DataFrame({"item_id": ["1", "2", "3"], "title": ["One", "Two", "Three"]})),
        "b": Items.from_frame(pl.DataFrame({"item_id": ["2", "3"], "title": ["Zwei", "Drei"], "brand": ["X", "Y"]})),
    }
    with caplog.at_level(logging.WARNING, "llmrec"):
        merged, items, report = merge(logs, tables)
    assert report.renamed_items == 2
    assert "2 item id(s) are in more than one domain" in caplog.text
    assert items.frame.select("item_id", "title", "brand", "domain").rows() == [
        ("1", "One", None, "a"),
        ("a:2", "Two", None, "a"),
        ("a:3", "Three", None, "a"),
        ("b:2", "Zwei", "X", "b"),
        ("b:3", "Drei", "Y", "b"),
    ]
    assert merged.frame["item_id"].to_list() == ["1", "a:2", "b:2", "b:3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "There are 1 logs"),
        ({"c@": log_of([("u", "1", START)])}, "cannot be a domain's name"),
        ({"tables": {"c": None}}, r"items of 'c' and no log"),
        ({"b": log_of([("u", "1", None), ("u@a", "2", None)], timed=False)}, "user id 'u@a' is in a log already"),
        ({"b": log_of([("u", "1", START), ("u", "a:1", START)])}, "item id 'a:1' is there already"),
    ],
    ids=["one-log", "name", "items-of-nothing", "user-taken", "item-taken"],
)
def test_what_does_not_fit_is_refused(change, message):
    tables = change.pop("tables", {})
    logs = {"a": log_of([("u", "1", START)] * 3), "b": log_of([("v", "9", START)])} | change
    with pytest.raises(DataError, match=message):
        merge({name: log for name, log in logs.items() if log is not None}, tables)


def test_tables_of_different_kinds_are_refused():
    logs = {"a": log_of([("u", "1", START)]), "b": log_of([("u", "2", START)])}
    tables = {
        "a": Items.from_frame(pl.DataFrame({"item_id": ["1"], "size": [[1.0, 2.0]]})),
        "b": Items.from_frame(pl.DataFrame({"item_id": ["2"], "size": ["large"]})),
    }
    with pytest.raises(DataError, match="columns of one name and different kinds"):
        merge(logs, tables)


def test_the_command_writes_the_log_the_items_and_the_account(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_text("who,what,time\n" + "".join(f"u,a{n},{START + n}\n" for n in range(4)))
    (tmp_path / "b.csv").write_text("who,what,position\n" + "".join(f"u,b{n},{n}\n" for n in range(3)))
    (tmp_path / "items.jsonl").write_text(json.dumps({"what": "a0", "title": "First"}) + "\n")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["llmrec", "data", "merge", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    sources = [f"a={tmp_path}/a.csv", f"b={tmp_path}/b.csv"]
    flags = ["--user-column", "who", "--item-column", "what", "--out", tmp_path / "out"]
    code, text, errors = call(*sources, *flags, "--items", f"a={tmp_path}/items.jsonl")
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "merging.json").read_text())
    assert report["untimed"] == ["b"]
    assert report["separated_users"] == 1
    assert "1 users of several domains: 0 in one sequence by time, 1 as one user per domain" in text
    assert "no clock in b" in errors
    log = Interactions.read(tmp_path / "out" / "interactions.parquet")
    assert log.histories() == {"u@a": ["b0", "a0", "a1", "a2", "a3"], "u@b": ["a0", "a1", "b0", "b1", "b2"]}
    items = Items.read(tmp_path / "out" / "items.parquet")
    assert items.titles[:2] == ["First", "a1"]
    assert items.frame["domain"].to_list() == ["a"] * 4 + ["b"] * 3
    for wrong, message in (("a.csv", "is no NAME=SOURCE"), (sources[0], "'a' is given twice")):
        code, _, errors = call(wrong, *sources, *flags)
        assert code == 2
        assert message in " ".join(errors.split())
