import gzip

import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.table import open_table
from llmrec.exceptions import DataError

MOVIES = "1::Toy Story (1995)::Animation|Comedy\n2::Café: the Movie :: Part 2 (1996)::Drama\n\n"
ONE_ITEM = "1|Toy Story (1995)|01-Jan-1995||http://imdb/1|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"


def test_one_million(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\r\n1::661::3::978302109\r\n2::1193::4::978298413\r\n")
    log = Interactions.read(tmp_path / "ratings.dat")
    assert log.histories() == {"1": ["1193", "661"], "2": ["1193"]}
    assert log.frame["rating"].to_list() == [5, 3, 4]
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
    assert open_table(tmp_path / "users.dat").read()[0].columns[0] == "user_id"
    (tmp_path / "tags.dat").write_text("15::4973::excel:: :lent!::1215184630\n")
    assert open_table(tmp_path / "tags.dat").read()[0]["tag"].to_list() == ["excel:: :lent!"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("compressed", [False, True])
def test_titles_in_both_encodings(tmp_path, encoding, compressed):
    content = MOVIES.encode(encoding)
    path = tmp_path / ("movies.dat.gz" if compressed else "movies.dat")
    path.write_bytes(gzip.compress(content) if compressed else content)
    items = Items.read(path)
    assert items.ids == ["1", "2"]
    assert items.titles == ["Toy Story (1995)", "Café: the Movie :: Part 2 (1996)"]
    assert items.frame["genres"].to_list() == ["Animation, Comedy", "Drama"]


def test_the_hundred_thousands_own_files(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    (tmp_path / "u.item").write_bytes((ONE_ITEM + ONE_ITEM.replace("1|Toy", "2|Misérables|Toy", 1)).encode("latin-1"))
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n")
    log = Interactions.read(tmp_path / "u.data")
    assert log.histories() == {"196": ["242"], "186": ["302"]}
    items = Items.read(tmp_path / "u.item")
    assert items.titles == ["Toy Story (1995)", "Misérables|Toy Story (1995)"]
    assert items.frame["genres"].to_list() == ["Animation, Children's, Comedy"] * 2
    assert items.texts()[0] == "Toy Story (1995). release date: 01-Jan-1995. genres: Animation, Children's, Comedy."
    assert open_table(tmp_path / "u.user").read(["user_id", "age"])[0].row(0) == ("1", "24")


def test_a_row_of_other_fields_is_named(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::2::5::978300760\n1::2::5\n")
    with pytest.raises(DataError, match=r"ratings\.dat, row 2 of 2: '1::2::5' has not the 4 fields"):
        Interactions.read(tmp_path / "ratings.dat")


def test_a_csv_that_is_called_like_them_is_read_as_what_it_is(tmp_path):
    (tmp_path / "u.data").write_text("user_id\titem_id\trating\ttimestamp\na\tb\t1\t1400000000\n")
    assert Interactions.read(tmp_path / "u.data").histories() == {"a": ["b"]}
