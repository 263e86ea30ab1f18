import json
from collections import Counter

import polars as pl
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llmrec.data import filters
from llmrec.data.cleaning import clean
from llmrec.data.flaws import Flaws, find_flaws
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

COUNTS = ("interactions", "users", "items", "table")

ROW = st.tuples(
    st.integers(0, 3),  # user
    st.sampled_from([0, 1, 2, 4, 6]),  # item
    st.one_of(st.none(), st.integers(0, 3)),  # timestamp
    st.one_of(st.none(), st.integers(1, 5)),  # rating
)
ROWS = st.one_of(st.lists(ROW, min_size=1, max_size=12), st.lists(ROW, min_size=30, max_size=60))
SETTINGS = st.fixed_dictionaries(
    {
        "empty_titles": st.sampled_from(["keep", "drop"]),
        "unknown_items": st.sampled_from(["keep", "drop"]),
        "unrated": st.sampled_from(["keep", "drop"]),
        "min_rating": st.sampled_from([None, 2.0, 3.0]),
        "duplicates": st.sampled_from(["exact", "first", "last", "keep"]),
        "user_core": st.sampled_from([0, 0, 1, 2, 4]),
        "item_core": st.sampled_from([0, 0, 1, 2, 4]),
        "min_length": st.sampled_from([0, 0, 1, 2, 4]),
        "max_length": st.sampled_from([None, None, 1, 3, 5]),
        "unused_items": st.sampled_from(["keep", "drop"]),
    }
)


def log_of(rows):
    """A canonical log, every row with a number of its own, so that what is left can be told apart."""
    schema = {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64, "rating": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    ordered = Interactions.from_frame(frame.with_row_index("number").drop("rating").rename({"number": "position"}))
    numbers = ordered.frame["position"].to_list()
    columns = [c for c in ("user_id", "item_id", "timestamp") if c in ordered.frame.columns]
    ratings = pl.Series("rating", [rows[number][3] for number in numbers], dtype=pl.Int64)
    whole = ordered.frame.select(columns).with_columns(ratings, pl.Series("weight", numbers))
    missing = whole["timestamp"].null_count() if "timestamp" in columns else 0
    if ratings.null_count() == len(ratings):
        whole = whole.drop("rating")
    return Interactions(whole, missing)


def table_of(titles):
    frame = pl.DataFrame({"item_id": [str(item) for item in titles], "title": list(titles.values())})
    return Items.from_frame(frame), find_flaws(frame)


TITLES = {0: "a", 1: "", 2: "c", 3: "d &amp; e", 4: None, 5: "f", 12: "never used"}


def counted(log, items):
    frame = log.frame
    return dict(
        zip(COUNTS, (len(frame), len(set(frame["user_id"])), len(set(frame["item_id"])), len(items)), strict=True)
    )


@settings(max_examples=150, deadline=None)
@given(ROWS, SETTINGS)
def test_the_account_adds_up_and_what_is_left_satisfies_everything(rows, chosen):
    log = log_of(rows)
    items, flaws = table_of(TITLES)
    if "rating" not in log.frame.columns:
        chosen = chosen | {"min_rating": None}
    left, ids = expected(log, items, flaws, chosen)
    event(f"left: {bool(left)}")
    if not left:
        with pytest.raises(DataError, match="leaves none of"):
            clean(log, items, flaws=flaws, **chosen)
        return
    cleaned, table, report = clean(log, items, flaws=flaws, **chosen)
    # The account.
    assert report.before == counted(log, items)
    assert report.after == counted(cleaned, table)
    for one, next_one in zip(report.steps, report.steps[1:], strict=False):
        assert one.after == next_one.before
    for part in COUNTS:
        assert sum(step.removed[part] for step in report.steps) == report.before[part] - report.after[part]
    document = report.document()
    assert json.loads(json.dumps(document)) == document
    # What is left is what the definitions leave, in the order that it had.
    assert Counter(cleaned.frame["weight"].to_list()) == Counter(left)
    assert table.ids == ids
    if not any(step.notes.get("moved_users") for step in report.steps):
        assert cleaned.frame["weight"].to_list() == left
    keys = [name for name in ("user_id", "item_id", "timestamp") if name in cleaned.frame.columns]
    assert Interactions.from_frame(cleaned.frame.select(keys)).frame.equals(cleaned.frame.select(keys))
    assert cleaned.rows_without_timestamp == (
        cleaned.frame["timestamp"].null_count() if "timestamp" in cleaned.frame.columns else 0
    )
    assert table.missing_titles == sum(i in {*flaws.untitled, "6"} for i in table.ids)
    # Cleaning what is clean changes nothing.
    if "rating" not in cleaned.frame.columns:
        chosen = chosen | {"min_rating": None}
    again, same, second = clean(cleaned, table, flaws=Flaws(), **chosen)
    assert again.frame.equals(cleaned.frame)
    assert same.frame.equals(table.frame)
    assert set(map(str, second.document()["removed"].values())) == {"0"}


def expected(log, items, flaws, chosen):
    """The numbers of the rows that stay, in order, and the ids of the table, by the definitions, row by row."""
    rows = log.frame.to_dicts()
    ids = list(items.ids)
    if chosen["empty_titles"] == "drop":
        rows = [row for row in rows if row["item_id"] not in flaws.untitled]
        ids = [item for item in ids if item not in flaws.untitled]
    if chosen["unknown_items"] == "drop":
        rows = [row for row in rows if row["item_id"] in ids]
    else:
        ids += [item for item in dict.fromkeys(row["item_id"] for row in rows) if item not in ids]
    if chosen["min_rating"] is not None:
        lowest = chosen["min_rating"]
        rated = {
            "keep": lambda rating: rating is None or rating >= lowest,
            "drop": lambda r: r is not None and r >= lowest,
        }
        rows = [row for row in rows if rated[chosen["unrated"]](row["rating"])]
    seen, unique = set(), []
    for row in reversed(rows) if chosen["duplicates"] == "last" else rows:
        key = (row["user_id"], row["item_id"])
        if chosen["duplicates"] == "exact":
            key += (row.get("timestamp"),)
        absent = chosen["duplicates"] == "exact" and row.get("timestamp") is None
        if chosen["duplicates"] == "keep" or absent or key not in seen:
            unique.append(row)
        seen.add(key)
    rows = unique[::-1] if chosen["duplicates"] == "last" else unique
    before = None
    while before != rows:
        before = rows
        while True:
            users = Counter(row["user_id"] for row in rows)
            of_items = Counter(row["item_id"] for row in rows)
            core = [
                row
                for row in rows
                if users[row["user_id"]] >= chosen["user_core"] and of_items[row["item_id"]] >= chosen["item_core"]
            ]
            if core == rows:
                break
            rows = core
        users = Counter(row["user_id"] for row in rows)
        rows = [row for row in rows if users[row["user_id"]] >= chosen["min_length"]]
        if chosen["max_length"] is not None:
            own = {}
            for row in rows:
                own.setdefault(row["user_id"], []).append(row)
            rows = [row for history in own.values() for row in history[-chosen["max_length"] :]]
    if chosen["unused_items"] == "drop":
        used = {row["item_id"] for row in rows}
        ids = [item for item in ids if item in used]
    return [row["weight"] for row in rows], ids


def simple(pairs, **columns):
    frame = pl.DataFrame({"user_id": [p[0] for p in pairs], "item_id": [p[1] for p in pairs], **columns})
    return Interactions(frame), Items.from_interactions(Interactions(frame))


def items_left(log):
    return log.frame["item_id"].to_list()


def test_filters_that_influence_each_other_are_repeated():
    # Cutting u to the last two makes a rare; without a, v is too short; without v, so is c; and then u.
    pairs = [
        ("u", "a"),
        ("u", "b"),
        ("u", "c"),
        ("v", "a"),
        ("v", "c"),
        ("w", "b"),
        ("w", "d"),
        ("x", "b"),
        ("x", "d"),
    ]
    log, items = simple(pairs)
    cleaned, _, report = clean(log, items, user_core=2, item_core=2, max_length=2)
    assert cleaned.user_ids == ["w", "x"]
    rounds = [(step.name, step.round, step.removed["interactions"]) for step in report.steps[2:]]
    assert rounds == [("k-core", 1, 0), ("max length", 1, 1), ("k-core", 2, 4)]


def test_exact_repeats_share_user_item_time_and_action():
    pairs = [("u", "a")] * 5 + [("v", "a")]
    log, items = simple(pairs, timestamp=[1, 1, 1, None, None, 1], action=["see", "buy", "see", "see", "see", "see"])
    cleaned, _, step = filters.drop_duplicates(log, items, "exact")
    assert cleaned.frame["timestamp"].to_list() == [1, 1, None, None, 1]
    assert step.removed == {"interactions": 1, "users": 0, "items": 0, "table": 0}
    assert step.notes == {"rows_without_timestamp": 2}
    assert step.examples == {"interactions": [{"user_id": "u", "item_id": "a", "timestamp": 1, "action": "see"}]}
    assert len(filters.drop_duplicates(log, items, "keep")[0]) == 6
    untimed = Interactions(log.frame.drop("timestamp"))
    cleaned, _, step = filters.drop_duplicates(untimed, items, "exact")
    assert len(cleaned) == 6
    assert step.notes == {"rows_without_timestamp": 6}


def test_one_row_of_a_pair_is_the_first_or_the_last():
    log, items = simple([("u", "a"), ("u", "b"), ("u", "a"), ("v", "a")], timestamp=[1, 2, 3, 4])
    assert filters.drop_duplicates(log, items, "first")[0].frame["timestamp"].to_list() == [1, 2, 4]
    assert filters.drop_duplicates(log, items, "last")[0].frame["timestamp"].to_list() == [2, 3, 4]


def test_ratings_become_implicit_and_rows_without_are_counted():
    log, items = simple([("u", "a"), ("u", "b"), ("u", "c"), ("v", "d")], rating=[4.0, 3.5, None, 3.0])
    cleaned, _, step = filters.threshold_ratings(log, items, 3.5)
    assert items_left(cleaned) == ["a", "b"]
    assert step.notes == {"rows_without_rating": 1}
    assert step.removed == {"interactions": 2, "users": 1, "items": 2, "table": 0}
    assert step.examples["users"] == ["v"]
    assert step.examples["items"] == ["c", "d"]
    assert items_left(filters.threshold_ratings(log, items, 3.5, "keep")[0]) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"no ratings.*threshold of 4 .*--rating-column"):
        clean(simple([("u", "a")])[0], items, min_rating=4)


def test_lengths():
    log, items = simple([("u", "a"), ("u", "b"), ("u", "c"), ("v", "a"), ("w", "a"), ("w", "d")])
    assert items_left(filters.keep_recent(log, items, 2)[0]) == ["b", "c", "a", "a", "d"]
    assert filters.drop_short(log, items, 2)[0].user_ids == ["u", "w"]
    with pytest.raises(DataError, match=r"longest history is 0.*Give 1 or more"):
        filters.keep_recent(log, items, 0)


def test_unknown_items():
    log, _ = simple([("u", "a"), ("u", "x"), ("v", "x")])
    items = Items.from_frame(pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]}))
    kept, table, step = filters.settle_unknown(log, items, "keep")
    assert (len(kept), table.ids, table.titles) == (3, ["a", "b", "x"], ["A", "B", "x"])
    assert step.removed["table"] == -1
    assert step.examples == {"added": ["x"]}
    dropped, table, step = filters.settle_unknown(log, items, "drop")
    assert (items_left(dropped), table.ids) == (["a"], ["a", "b"])
    assert step.notes == {"unknown_items": 1, "interactions_of_unknown_items": 2}
    with pytest.raises(DataError, match=r"1 item\(s\) of 2 interaction\(s\).*'x'.*--unknown-items"):
        filters.settle_unknown(log, items, "error")
    assert filters.settle_unknown(*filters.settle_unknown(log, items, "keep")[:2], "error")[2].changes is False


def test_items_without_a_title_go_with_their_interactions_or_not_at_all():
    frame = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["A", " ", None], "brand": ["x", "Acme", None]})
    items, flaws = Items.from_frame(frame), find_flaws(frame)
    log, _ = simple([("u", "a"), ("u", "b"), ("v", "c"), ("v", "z")])
    kept, table, step = filters.settle_titles(log, items, flaws, "keep")
    assert (len(kept), table.titles, step.changes) == (4, ["A", "Acme", "c"], False)
    assert step.notes == {"items_without_title": 2}
    dropped, table, report = clean(log, items, flaws=flaws, empty_titles="drop")
    assert items_left(dropped) == ["a", "z"]  # z is unknown, which is another matter
    assert (table.ids, table.missing_titles, table.appended) == (["a", "z"], 1, 1)
    assert report.steps[1].examples["table"] == ["b", "c"]
    with pytest.raises(DataError, match=r"2 item\(s\) have no title, such as 'b'.*--empty-titles"):
        clean(log, items, flaws=flaws, empty_titles="error")
    with pytest.raises(DataError, match=r"2 item\(s\) came without a title.*find_flaws"):
        clean(log, items, empty_titles="drop")


def test_unused_items_go_when_asked_for():
    log, _ = simple([("u", "b")])
    items = Items.from_frame(pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]}))
    assert clean(log, items)[1].ids == ["a", "b"]
    assert clean(log, items, unused_items="drop")[1].ids == ["b"]


def test_a_user_whose_untimed_row_has_gone_is_ordered_by_time():
    frame = pl.DataFrame(
        {"user_id": ["u"] * 3, "item_id": list("abc"), "timestamp": [5, None, 3], "rating": [5, 1, 5]}
    )
    log = Interactions(frame, 1)
    cleaned, _, report = clean(log, Items.from_interactions(log), min_rating=3)
    assert items_left(cleaned) == ["c", "a"]
    assert report.steps[-1].name == "order"
    assert report.steps[-1].notes == {"moved_users": 1}
    assert report.steps[-1].examples == {"moved_users": ["u"]}
    assert items_left(Interactions.from_frame(cleaned.frame)) == ["c", "a"]


def test_when_nothing_is_left_the_step_is_named():
    log, items = simple([("u", "a"), ("v", "b")])
    with pytest.raises(DataError, match=r"step 'k-core' \(user_core 2, item_core 0\) leaves none of 2 inter.*2 user"):
        clean(log, items, user_core=2)
    with pytest.raises(DataError, match="'min length'"):
        clean(log, items, min_length=2)


@pytest.mark.parametrize("setting", ["user_core", "item_core", "min_length"])
def test_no_count_is_negative(setting):
    log, items = simple([("u", "a")])
    with pytest.raises(DataError, match=r"-1 of .*cannot be negative\. Give 0 or more"):
        clean(log, items, **{setting: -1})


def test_steps_are_announced_as_they_begin():
    log, items = simple([("u", "a"), ("v", "a")])
    said = []
    clean(log, items, flaws=Flaws(), item_core=2, announce=said.append)
    assert said == ["tell entities", "settle titles", "settle unknown", "drop duplicates", "keep core"]


def test_beauty_is_a_5_core_already_and_its_counts_are_the_published_ones(shared_data):
    log = Interactions.read(shared_data / "amazon-beauty" / "interactions.csv.gz")
    items = Items.from_interactions(log)
    cleaned, _, report = clean(log, items, user_core=5, item_core=5, duplicates="first")
    assert report.before == {"interactions": 198_502, "users": 22_363, "items": 12_101, "table": 12_101}
    assert report.after == report.before
    assert cleaned.frame.equals(log.frame)
