import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.table import open_table
from llmrec.exceptions import DataError


def test_types_are_read_and_leave_the_names(tmp_path):
    path = tmp_path / "shop.item"
    path.write_text(
        "item_id:token\ttitle:token_seq\tprice:float\tvector:float_seq\tyear:float\n"
        "007\tToy Story\t1.5\t0.5 1  2\t1995\n8\tHeat\t\t\t1996\n"
    )
    table = open_table(path)
    assert (table.kind, table.columns) == ("RecBole", ["item_id", "title", "price", "vector", "year"])
    frame, _ = table.read()
    assert frame.rows() == [("007", "Toy Story", 1.5, [0.5, 1, 2], 1995), ("8", "Heat", None, None, 1996)]
    items = Items.read(path)
    assert items.texts() == ["Toy Story.", "Heat."]
    assert items.frame["vector"].to_list() == [[0.5, 1, 2], None]
    assert table.read(["vector"])[0].columns == ["vector"]


def test_interactions_of_an_atomic_file(tmp_path):
    (tmp_path / "shop.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t007\t4.5\t1400000001\n1\t8\t3\t1400000000\n"
    )
    log = Interactions.read(tmp_path / "shop.inter")
    assert log.histories() == {"1": ["8", "007"]}
    assert log.frame["rating"].to_list() == [3, 4.5]


def test_faults(tmp_path):
    path = tmp_path / "shop.item"
    path.write_text("item_id:token\tv:float_seq\na\t1 2\nb\t1 x\n")
    with pytest.raises(DataError, match=r"shop\.item, row 2 of 2: v is '1 x', which is no sequence of numbers"):
        Items.read(path)
    path.write_text("item_id:token\titem_id:float\na\t1\n")
    with pytest.raises(DataError, match="'item_id' more than once"):
        Items.read(path)
    (tmp_path / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n1\t2\tsoon\n")
    with pytest.raises(DataError, match=r"row 1 of 1: timestamp is 'soon'"):
        Interactions.read(tmp_path / "shop.inter")


def test_the_hundred_thousand(shared_data):
    log = Interactions.read(shared_data / "movielens-100k" / "ml-100k.inter")
    items = Items.read(shared_data / "movielens-100k" / "ml-100k.item")
    assert (len(log), len(log.user_ids), len(items)) == (100_000, 943, 1682)
    assert log.frame.columns == ["user_id", "item_id", "timestamp", "rating"]
    assert log.time_unit == "s"
    assert items.texts()[0] == "Toy Story. release year: 1995. class: Animation Children's Comedy."
