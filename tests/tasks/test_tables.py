"""Tables of queries and preferences, and what of them may be learnt."""

import polars as pl
import pytest
from logs_with_events import BEGIN, DAY, data_of, items_of

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.exceptions import DataError
from llmrec.tasks.item_text import cut_text
from llmrec.tasks.tables import Preferences, Queries

LOG = pl.DataFrame({"user_id": ["a"] * 5, "item_id": ["i0", "i1", "i2", "i3", "i1"]})
SPLIT = leave_one_out(Interactions.from_frame(LOG), Items.from_frame(items_of()))


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_queries_are_read(tmp_path, kind):
    frame = pl.DataFrame({"item_id": ["i3", "i0", "zzz", "i0"], "query": ["red  cup", " blue\tcup ", "lost", ""]})
    path = tmp_path / f"queries.{kind}"
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[kind](path)
    queries = Queries.read(path, SPLIT)
    assert (list(queries.rows), list(queries.texts)) == ([3, 0], ["red cup", "blue cup"])


def test_queries_of_held_out_interactions_are_left_out(tmp_path):
    # The split holds i3 and the second i1 of user a; the first i1 is training, so i1 is nothing new.
    frame = pl.DataFrame(
        {"user_id": ["a", "a", "b", "a", None], "item_id": ["i3", "i1", "i3", "i0", "i3"], "query": list("vwxyz")}
    )
    frame.write_parquet(tmp_path / "queries.parquet")
    queries = Queries.read(tmp_path / "queries.parquet", SPLIT)
    assert list(queries.texts) == ["w", "x", "y", "z"]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"item_id": ["i0"], "text": ["x"]}, "has no column 'query'"),
        ({"thing": ["i0"], "query": ["x"]}, "has no column 'item_id'"),
        ({"item_id": ["zzz"], "query": ["x"]}, "no query for an item of the catalog"),
        ({"item_id": ["i0"], "query": [3]}, "query holds Int64, which is no text"),
    ],
)
def test_tables_of_queries_that_cannot_be_used(tmp_path, frame, message):
    pl.DataFrame(frame).write_parquet(tmp_path / "queries.parquet")
    with pytest.raises(DataError, match=message):
        Queries.read(tmp_path / "queries.parquet", SPLIT)


def test_preferences_are_read_in_order_of_time(tmp_path):
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 2],
            "preference": ["second", "first", "second too", "never", ""],
            "timestamp": [BEGIN + DAY, BEGIN, BEGIN + DAY, None, BEGIN],
        }
    )
    frame.write_parquet(tmp_path / "said.parquet")
    said = Preferences.read(tmp_path / "said.parquet")
    assert said.timed
    assert said.said == {"1": [(BEGIN, "first"), (BEGIN + DAY, "second"), (BEGIN + DAY, "second too")]}
    assert said.known("1", BEGIN) is None
    assert said.known("1", BEGIN + 1) == "first"
    assert said.known("1", BEGIN + DAY) == "first"
    assert said.known("1", BEGIN + DAY + 1) == "second too"
    assert said.known("1", None) is None
    assert said.known("1", float("nan")) is None
    assert said.known("2", BEGIN + DAY) is None


def test_preferences_without_times_are_known_always(tmp_path):
    pl.DataFrame({"user_id": ["a", "a"], "preference": ["x", "y"]}).write_csv(tmp_path / "said.csv")
    said = Preferences.read(tmp_path / "said.csv")
    assert not said.timed
    assert said.known("a", None) == said.known("a", 0.0) == "y"


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user_id": ["a"], "text": ["x"]}, "has no column 'preference'"),
        ({"user_id": ["a"], "preference": ["x"], "timestamp": [5]}, "are no clock"),
        ({"user_id": ["a"], "preference": [None]}, "no preference|no text"),
    ],
)
def test_tables_of_preferences_that_cannot_be_used(tmp_path, frame, message):
    pl.DataFrame(frame).write_parquet(tmp_path / "said.parquet")
    with pytest.raises(DataError, match=message):
        Preferences.read(tmp_path / "said.parquet")


@pytest.mark.parametrize("limit", [8, 13, 20])
def test_texts_are_cut_between_words_to_as_many_tokens_as_allowed(limit):
    text = data_of().text
    for words in (["alpha"] * 30, ["né"] * 30, ["a", "customer", "took", "items"] * 9, ["x" * 60], ["日本語" * 20]):
        whole = " ".join(words)
        cut = cut_text("  ".join(words), text, limit)
        assert cut
        assert whole.startswith(cut)
        assert len(text.encode(f" {cut}")) <= limit
        count = len(cut.split())
        if cut.split() == words[:count]:
            assert len(text.encode(" " + " ".join(words[: count + 1]))) > limit
        else:
            assert count == 1
            assert len(text.encode(f" {whole[: len(cut) + 1]}")) > limit
    assert cut_text(" a  customer ", text, limit) == "a customer"


def test_text_columns_are_those_of_words():
    items = items_of().with_columns(
        asin=pl.lit("ABC"),
        image_url=pl.lit("photo of it"),
        page=pl.lit("https://x.y/z"),
        price=pl.lit(3.5),
        size=pl.lit("7"),
    )
    assert data_of(items=items).item_text.columns == ("title", "description", "brand", "categories")
    assert data_of(items=items, text_columns=("size",)).item_text.columns == ("title", "size")
    assert data_of(items=items, text_columns=("size",)).item_text.attributes(0) == "size: 7"
    with pytest.raises(DataError, match="no column 'colour'"):
        data_of(items=items, text_columns=("colour",)).item_text  # noqa: B018
    with pytest.raises(DataError, match="max_text_tokens is 7"):
        data_of(max_text_tokens=7).item_text  # noqa: B018
