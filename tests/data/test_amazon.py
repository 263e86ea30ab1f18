import gzip
import json
import logging

import pytest

from llmrec.data.columns import ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

USERS = ["A39HTATAQ9V7YF", "A3JM6GV9MNOF9X", "A1Z513UWSAAO0F"]
ITEMS = ["0205616461", "B00004U9JO", "B0000530IU"]
TIMES = [1369699200, 1355443200, 1404691200]


def ratings(order):
    rows = zip(USERS, ITEMS, TIMES, strict=True)
    return "".join(f"{(u, i)[order]},{(i, u)[order]},5.0,{t}\n" for u, i, t in rows)


@pytest.mark.parametrize(("order", "said"), [(0, "user_id, item_id"), (1, "item_id, user_id")])
@pytest.mark.parametrize("compressed", [False, True])
def test_ratings_only_in_both_orders(tmp_path, caplog, order, said, compressed):
    path = tmp_path / ("ratings.csv.gz" if compressed else "ratings.csv")
    content = ratings(order).encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    with caplog.at_level(logging.INFO, logger="llmrec"):
        log = Interactions.read(path)
    assert log.frame["user_id"].to_list() == USERS
    assert log.frame["item_id"].to_list() == ITEMS
    assert log.frame["timestamp"].to_list() == TIMES
    assert log.frame["rating"].to_list() == [5, 5, 5]
    assert f"its columns are taken as {said}, rating, timestamp" in caplog.text


def test_ratings_only_whose_order_does_not_show(tmp_path, caplog):
    path = tmp_path / "ratings.csv"
    path.write_text("17,4,5.0,1369699200\n18,4,5.0,1369699201\n")
    with pytest.raises(DataError, match=r"no column 'user_id'; its columns are 'column_1', 'column_2'.*--user-column"):
        Interactions.read(path)
    assert "--user-column column_1 --item-column column_2, or the reverse" in caplog.text
    log = Interactions.read(path, ColumnNames(user="column_2", item="column_1"))
    assert log.histories() == {"4": ["17", "18"]}


def test_2014(tmp_path):
    review = {
        "reviewerID": "A30TL5EWN6DFXT",
        "asin": "120401325X",
        "reviewerName": "christina",
        "helpful": [0, 0],
        "reviewText": "They look good",
        "overall": 4.0,
        "unixReviewTime": 1400630400,
        "reviewTime": "05 21, 2014",
    }
    (tmp_path / "reviews.json.gz").write_bytes(gzip.compress(json.dumps(review).encode()))
    log = Interactions.read(tmp_path / "reviews.json.gz")
    assert log.frame.rows() == [("A30TL5EWN6DFXT", "120401325X", 1400630400, 4)]
    rows = [
        {
            "asin": "0000031852",
            "title": 'Girl\'s "Ballet" Tutu',
            "price": 3.17,
            "imUrl": "http://a/b.jpg",
            "related": {"also_bought": ["B00JHONN1S", "B002BZX8Z6"]},
            "salesRank": {"Toys & Games": 211836},
            "brand": "Coxlures",
            "categories": [["Sports & Outdoors", "Other Sports", "Dance"]],
        },
        {
            "asin": "2",
            "description": "Ünïcode\\n",
            "related": {"also_viewed": ["B002BZX8Z6"]},
            "price": None,
            "categories": [["A"], ["B"]],
        },
    ]
    content = "".join(f"{row!r}\n" for row in rows).encode()
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(content))
    items = Items.read(tmp_path / "meta.json.gz")
    assert items.ids == ["0000031852", "2"]
    assert items.titles[0] == 'Girl\'s "Ballet" Tutu'
    assert items.frame["categories"].to_list() == ["Sports & Outdoors, Other Sports, Dance", "A, B"]
    assert "also_bought: B00JHONN1S, B002BZX8Z6" in items.frame["related"][0]
    text = items.texts()[0]
    assert "brand: Coxlures." in text
    assert "B00JHONN1S" not in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("__import__('os').system('exit 1')", r"meta\.json, line 2: .*neither JSON nor a Python literal"),
        ("{'asin': open('x')}", r"line 2: .*neither JSON nor a Python literal"),
        ("{'asin': ", r"line 2: "),
        ("['asin']", r"line 2: .*no dict"),
        ("{'asin': b'x'}", r"line 2: .*what JSON cannot"),
        ("(" * 500, r"line 2: "),
    ],
)
def test_a_literal_is_never_run(tmp_path, line, message):
    (tmp_path / "meta.json").write_text("{'asin': 'a', 'title': 'b'}\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        Items.read(tmp_path / "meta.json")


def test_2018(tmp_path):
    reviews = [
        {
            "overall": 5.0,
            "vote": "3",
            "verified": True,
            "reviewTime": "06 3, 2015",
            "reviewerID": "A2TYZ821XXK2YZ",
            "asin": "3426958910",
            "style": {"Format:": " Audio CD"},
            "image": ["https://x/1.jpg"],
            "unixReviewTime": 1433289600,
        },
        {
            "overall": 4.0,
            "verified": False,
            "reviewerID": "A3OFSREZADFUDY",
            "asin": "3426958910",
            "style": {"Size:": " Large", "Color:": " Red"},
            "unixReviewTime": 1433289601,
        },
    ]
    (tmp_path / "reviews.json").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    assert Interactions.read(tmp_path / "reviews.json").histories() == {
        "A2TYZ821XXK2YZ": ["3426958910"],
        "A3OFSREZADFUDY": ["3426958910"],
    }
    # Types that change from line to line, as they do there.
    meta = [
        {
            "asin": "a",
            "title": "Lamp",
            "description": ["Bright", "light"],
            "rank": "12 in Home",
            "price": "$3",
            "also_buy": ["B00JHONN1S"],
            "imageURL": ["https://x/1.jpg", "https://x/2.jpg"],
            "details": {"ASIN: ": "a"},
        },
        {
            "asin": "b",
            "title": "Desk",
            "description": "Wooden",
            "rank": [">#1 in Desks"],
            "price": 4.5,
            "also_buy": "B00JHONN1S",
            "imageURL": [],
            "details": "none",
        },
        {"asin": "c", "title": "Chair", "description": None, "rank": {"Home": 3}, "price": [], "details": {}},
    ]
    (tmp_path / "meta.json").write_text("".join(json.dumps(row) + "\n" for row in meta))
    items = Items.read(tmp_path / "meta.json")
    assert items.titles == ["Lamp", "Desk", "Chair"]
    assert items.frame["description"].to_list() == ["Bright, light", "Wooden", None]
    assert items.frame["rank"].to_list() == ["12 in Home", ">#1 in Desks", "Home: 3"]
    texts = items.texts()
    assert texts[1].startswith("Desk. description: Wooden.")
    assert not any("B00JHONN1S" in text or "http" in text for text in texts)


def test_2023(tmp_path):
    review = {
        "rating": 5.0,
        "title": "Good",
        "text": "…",
        "images": [],
        "asin": "B01",
        "parent_asin": "B02",
        "user_id": "AEYORY2AVPMCPDV57CE337YU5LXA",
        "timestamp": 1634275259292,
        "verified_purchase": True,
    }
    (tmp_path / "All_Beauty.jsonl").write_text(json.dumps(review) + "\n")
    log = Interactions.read(tmp_path / "All_Beauty.jsonl")
    assert log.frame.rows() == [("AEYORY2AVPMCPDV57CE337YU5LXA", "B02", 1634275259.292, 5)]
    assert log.time_unit == "ms"
    meta = {
        "main_category": "All Beauty",
        "title": "Spray",
        "average_rating": 4.8,
        "features": ["Soft", "Light"],
        "description": ["If given &amp; taken"],
        "price": None,
        "images": [{"thumb": "https://x", "hi_res": None}],
        "store": "Howard",
        "details": {"Brand": "Howard", "Item Form": "Spray", "UPC": "617390882781"},
        "parent_asin": "B02",
        "bought_together": None,
    }
    other = meta | {"parent_asin": "B03", "details": {"Colour": "Red"}, "images": []}
    (tmp_path / "meta.jsonl").write_text(json.dumps(meta) + "\n" + json.dumps(other) + "\n")
    items = Items.read(tmp_path / "meta.jsonl")
    assert items.texts()[0] == (
        "Spray. main category: All Beauty. features: Soft, Light. description: If given & taken. store: Howard. "
        "details: Brand: Howard, Item Form: Spray, UPC: 617390882781."
    )
    assert items.frame["details"][1] == "Colour: Red"
    (tmp_path / "5core.csv").write_text(
        "user_id,parent_asin,rating,timestamp,history\nAEYORY,B02,5.0,1634275259292,B01 B03\n"
    )
    assert Interactions.read(tmp_path / "5core.csv").frame.rows() == [("AEYORY", "B02", 1634275259.292, 5)]
