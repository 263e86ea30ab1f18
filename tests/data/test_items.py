import polars as pl
import pytest

from llmrec.data.columns import ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.items import MAX_TEXT, Items
from llmrec.exceptions import DataError


def items_of(**columns):
    return Items.from_frame(pl.DataFrame(columns, strict=False))


def test_ids_and_titles_stand_in_file_order(tmp_path):
    (tmp_path / "items.csv").write_text("asin,name,price\n007,B,1\n1,A,2\n")
    items = Items.read(tmp_path / "items.csv")
    assert items.ids == ["007", "1"]
    assert items.titles == ["B", "A"]
    assert items.frame.columns == ["item_id", "title", "price"]
    assert len(items) == 2


def test_an_items_own_id_column_may_be_called_id():
    assert items_of(id=[3, 4], title=["x", "y"]).ids == ["3", "4"]


def test_text_is_cleaned():
    items = items_of(item_id=["a"], title=[" Salt &amp;\n\tPepper &#39;n&#39; Oil "], about=["<b>x  y"])
    assert items.titles == ["Salt & Pepper 'n' Oil"]
    assert items.frame["about"].to_list() == ["<b>x y"]


def test_lists_are_joined(tmp_path):
    (tmp_path / "items.jsonl").write_text(
        '{"item_id": "a", "title": "T", "tags": ["x", null, "y"], "tree": [["p", "q"], ["r"]]}\n'
        '{"item_id": "b", "title": "U", "tags": [], "tree": null}\n'
    )
    items = Items.read(tmp_path / "items.jsonl")
    assert items.frame["tags"].to_list() == ["x, y", None]
    assert items.frame["tree"].to_list() == ["p, q, r", None]
    assert items.texts() == ["T. tags: x, y. tree: p, q, r.", "U."]


def test_a_missing_title_is_the_first_text_and_else_the_id():
    items = items_of(
        item_id=["a", "b", "c", "d"],
        title=["", None, "  ", "Known"],
        image_url=["http://x/1"] * 4,
        brand=["Acme", None, ".", "B"],
        about=["long", "some words " * 30, None, "x"],
    )
    assert items.titles[0] == "Acme"
    assert items.titles[1] == ("some words " * 11)[:-1]  # whole words, at most 120 characters
    assert items.titles[2:] == ["c", "Known"]
    assert items.missing_titles == 3


def test_a_table_without_titles_has_those_it_can_make():
    items = items_of(item_id=["a", "b"], keywords=["tent pole", None])
    assert items.titles == ["tent pole", "b"]
    assert items.texts() == ["tent pole.", "b."]


def test_texts_leave_out_ids_links_and_numbers():
    items = items_of(
        item_id=["a", "b"],
        title=["Lamp.", "Desk"],
        parent_asin=["B0", "B1"],
        brand_id=["n1", "n2"],
        cover=["https://x/a.jpg", "https://x/b.jpg"],
        image_link=["a.jpg", "b.jpg"],
        price=["$1,299.00", "7.5"],
        weight=[1.5, 2.0],
        in_stock=[True, False],
        main_category=["Home", None],
        year_text=["1990s", "2001"],
        description=["Lamp", "?!"],
    )
    assert items.texts() == ["Lamp. main category: Home. year text: 1990s.", "Desk. year text: 2001."]


def test_chosen_columns_are_used_whatever_they_hold():
    items = items_of(item_id=["a"], title=["Lamp"], price=[7.5], brand=["Acme"], extra=["z"])
    assert items.texts(["brand", "price"]) == ["Lamp. brand: Acme. price: 7.5."]
    assert items.texts([]) == ["Lamp."]
    with pytest.raises(DataError, match=r"no column 'colour'"):
        items.texts(["colour"])


def test_columns_chosen_on_reading_hold_for_texts_and_survive_with_missing():
    frame = pl.DataFrame({"sku": ["a"], "label": ["Lamp"], "brand": ["Acme"], "extra": ["z"]})
    items = Items.from_frame(frame, ColumnNames(item="sku", title="label", text=("label", "brand")))
    assert items.texts() == ["Lamp. brand: Acme."]
    log = Interactions.from_frame(pl.DataFrame({"user_id": ["u"], "item_id": ["new"]}))
    assert items.with_missing(log).texts() == ["Lamp. brand: Acme.", "new."]
    with pytest.raises(DataError, match=r"no column 'colour'.*--text-columns"):
        Items.from_frame(frame, ColumnNames(item="sku", text=("colour",)))


def test_a_text_is_capped_between_words():
    text = items_of(item_id=["a"], title=["T"], about=["word " * 1000]).texts()[0]
    assert MAX_TEXT - 5 < len(text) <= MAX_TEXT
    assert text.endswith("word")
    assert len(items_of(item_id=["a"], title=["x" * 3000]).texts()[0]) == MAX_TEXT


def test_repeated_ids_are_located():
    with pytest.raises(DataError, match=r"item '2' stands in rows 2, 4 \(1 item\(s\) repeat\)"):
        items_of(item_id=[1, 2, 3, 2], title=list("abcd"))


def test_an_item_without_id_is_located(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\na,x\n,y\n")
    with pytest.raises(DataError, match=r"items\.csv, row 2 of 2: item_id is None"):
        Items.read(tmp_path / "items.csv")


def test_items_of_interactions_alone_and_those_missing_from_the_table():
    log = Interactions.from_frame(pl.DataFrame({"user_id": list("uuvv"), "item_id": ["c", "a", "d", "c"]}))
    alone = Items.from_interactions(log)
    assert alone.ids == alone.titles == ["c", "a", "d"]
    items = items_of(item_id=["a", "b"], title=["A", "B"], price=[1.0, 2.0])
    whole = items.with_missing(log)
    assert whole.ids == ["a", "b", "c", "d"]
    assert whole.titles == ["A", "B", "c", "d"]
    assert (whole.appended, whole.missing_titles, items.appended) == (2, 2, 0)
    assert whole.frame["price"].to_list() == [1.0, 2.0, None, None]
    assert whole.with_missing(log) is whole


def test_write_and_read(tmp_path):
    items = items_of(item_id=["007", "b"], title=["A", None], tags=[["x"], ["y", "z"]], price=[1.0, None])
    items.write(tmp_path / "items.parquet")
    again = Items.read(tmp_path / "items.parquet")
    assert again.frame.equals(items.frame)
    assert again.texts() == items.texts() == ["A. tags: x.", "y, z."]


def test_cleaning_what_is_clean_changes_nothing(tmp_path):
    items = Items.from_frame(pl.DataFrame({"item_id": ["a"], "title": ["AT&amp;amp;T &lt;b&gt;"]}))
    assert items.titles == ["AT&T <b>"]
    items.write(tmp_path / "items.parquet")
    assert Items.read(tmp_path / "items.parquet").titles == items.titles


def test_odd_title_columns(tmp_path):
    assert Items.from_frame(pl.DataFrame({"item_id": ["a"], "title": [["x", "y"]]})).titles == ["x, y"]
    assert Items.from_frame(pl.DataFrame({"item_id": ["a"], "title": [7]})).titles == ["7"]
    for value in (b"bytes", {"x": "y"}):
        with pytest.raises(DataError, match="--title-column"):
            Items.from_frame(pl.DataFrame({"item_id": ["a"], "title": [value]}))


def test_columns_of_bytes_are_left_out():
    items = Items.from_frame(pl.DataFrame({"item_id": ["a"], "title": ["t"], "image": [b"\x00\xff"]}))
    assert "image" not in items.frame.columns


def test_vectors_are_passed_through(tmp_path):
    vectors = pl.Series([[0.5, 1.0], [2.0, 3.0]])
    frame = pl.DataFrame(
        {"item_id": ["a", "b"], "title": ["A", "B"], "list": vectors, "array": vectors.cast(pl.Array(pl.Float32, 2))}
    )
    items = Items.from_frame(frame)
    assert items.frame["list"].to_list() == items.frame["array"].to_list() == vectors.to_list()
    assert items.frame["array"].dtype == pl.Array(pl.Float32, 2)
    assert items.texts() == ["A.", "B."]
    (tmp_path / "items.csv").write_text('item_id,title,vector\na,A,"[0.5, 1]"\nb,B,\n')
    assert Items.read(tmp_path / "items.csv").frame["vector"].to_list() == [[0.5, 1], None]
    (tmp_path / "items.csv").write_text('item_id,title,vector\na,A,"[0.5, -]"\n')
    assert Items.read(tmp_path / "items.csv").frame["vector"].to_list() == ["[0.5, -]"]


def test_objects_read_well():
    items = Items.from_frame(
        pl.DataFrame(
            {
                "item_id": ["a", "b"],
                "title": ["[1] A", "{b}"],
                "details": [{"Brand": "X &amp; Y", "Size": None}, {"Brand": None, "Size": 3}],
                "json": ['{"k": ["v", "w"]}', "plain"],
            }
        )
    )
    assert items.titles == ["[1] A", "{b}"]
    assert items.frame["details"].to_list() == ["Brand: X & Y", "Size: 3"]
    assert items.frame["json"].to_list() == ["k: v, w", "plain"]


def test_bytes_inside_are_left_out(caplog):
    image = [{"bytes": b"\xff", "path": "x"}]
    items = Items.from_frame(pl.DataFrame({"item_id": ["a"], "title": ["t"], "image": image, "raw": [[b"x"]]}))
    assert items.frame.columns == ["item_id", "title"]
    assert "columns of bytes are left out: image, raw" in caplog.text


def test_invalid_rows_are_dropped_and_counted(tmp_path, caplog):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\na,A\n,B\na,C\nb,D\n ,E\na,F\n")
    items = Items.read(path, invalid="drop")
    assert (items.ids, items.titles) == (["a", "b"], ["A", "D"])
    assert items.dropped == {"item_id": 2, "repeated": 2}
    assert "items.csv, row 2 of 6: item_id is None, which is no id (2 such row(s))" in caplog.text
    assert "2 row(s) repeat an item, such as" in caplog.text
    assert "items.csv, row 3 of 6 ('a')" in caplog.text
    with pytest.raises(DataError, match="row 2 of 6"):
        Items.read(path)
    path.write_text("item_id,title\n,A\n")
    with pytest.raises(DataError, match=r"All 1 rows of .*items\.csv are invalid"):
        Items.read(path, invalid="drop")


def test_columns_of_products_and_links_are_no_text():
    items = items_of(
        item_id=["a", "b", "c"],
        title=["A", "B", "C"],
        also_buy=["B00JHONN1S, B002BZX8Z6", "B00JHONN1S", None],
        pictures=["https://x/1.jpg, https://x/2.jpg", "https://x/3.jpg", None],
        note=["see B00JHONN1S", "fine", "see https://x for more"],
    )
    assert items.texts() == ["A. note: see B00JHONN1S.", "B. note: fine.", "C. note: see https://x for more."]


def test_a_title_that_is_nan_is_none():
    items = items_of(item_id=["a", "b"], title=[float("nan"), 2.0], price=[float("nan"), 1.0])
    assert (items.titles, items.missing_titles) == (["a", "2.0"], 1)
    assert items.texts(["price"]) == ["a.", "2.0. price: 1.0."]


def test_missing_titles_are_counted_with_the_first_row_and_what_to_do(tmp_path, caplog):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\na,A\n,B\nb,\nc,[]\n")
    Items.read(path, invalid="drop")
    said = next(record.getMessage() for record in caplog.records if "no title" in record.getMessage())
    assert said == (
        f"2 item(s) have no title, such as {path}, row 3 of 4 (item 'b'); their first other text, or else their id, "
        "stands in: fill them in, or clean with --empty-titles drop"
    )
    caplog.clear()
    Items.from_frame(pl.DataFrame({"item_id": ["a"], "about": ["x"]}))
    assert "1 item(s) have no title, such as the items, row 1 of 1" in caplog.text
    assert "--title-column" in caplog.text
    caplog.clear()
    items_of(item_id=["a"], title=["A"])
    assert not caplog.records


def test_unknown_items_are_counted_with_the_first_row_of_the_file(tmp_path, caplog):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,a,1400000009\n,a,1\nv,d,1400000000\nu,c,1400000001\nu,a,\n")
    log = Interactions.read(path, invalid="drop")
    assert items_of(item_id=["a"], title=["A"]).with_missing(log).ids == ["a", "c", "d"]
    assert caplog.records[-1].getMessage() == (
        f"2 item(s) of the interactions are not in the item table, such as 'd' ({path}, row 3 of 5); they are kept "
        "with their id as title: add them to the table, or clean with --unknown-items drop"
    )
    items_of(item_id=["a"], title=["A"]).with_missing(Interactions(log.frame))
    assert "such as 'c'; they are kept" in caplog.records[-1].getMessage()


def test_a_table_of_ids_alone_is_no_flaw(caplog):
    with caplog.at_level("WARNING"):
        assert Items.from_frame(pl.DataFrame({"item_id": ["a", "b"]})).missing_titles == 2
        assert not caplog.records
        Items.from_frame(pl.DataFrame({"item_id": ["a", "b"], "brand": ["x", "y"]}))
        assert "have no title" in caplog.text
