import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.json_lines import open_json_lines, open_literals
from llmrec.exceptions import DataError

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=5)
VALUES = st.recursive(
    SCALARS | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), min_size=1, max_size=8))
def test_lines_of_any_types_are_read_and_texts_survive(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("".join(json.dumps({"id": str(n)} | row) + "\n" for n, row in enumerate(rows)))
    table = open_json_lines(path)
    frame, _ = table.read()
    assert frame["id"].to_list() == [str(n) for n in range(len(rows))]
    assert set(table.columns) == {"id"}.union(*rows)
    for name in set(table.columns) - {"id"}:
        for found, row in zip(frame[name].to_list(), rows, strict=True):
            if isinstance(row.get(name), str):
                assert found == row[name]
            elif row.get(name) is None:
                assert found is None
            elif isinstance(row.get(name), dict):
                assert isinstance(found, str)


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": {"x": 1}}\n{"b": {"y": [2]}, "c": "z"}\n')
    table = open_json_lines(path)
    assert table.columns == ["a", "b", "c"]
    assert table.read(["c", "a"])[0].to_dicts() == [{"a": 1, "c": None}, {"a": None, "c": "z"}]
    assert json.loads(table.read()[0]["b"][1]) == {"y": [2]}


def test_lists_of_numbers_stay_lists_where_types_are_mixed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"v": [1, 2.5], "x": 1, "y": ["a"]}\n{"v": [], "x": [1], "y": []}\n{"v": null, "x": {"k": 1}}\n')
    frame, _ = open_json_lines(path).read()
    assert frame["v"].to_list() == [[1, 2.5], [], None]
    assert frame["x"].to_list() == ["1", "[1]", '{"k": 1}']
    assert frame["y"].to_list() == [["a"], [], None]


def test_literals_read_as_json_does(tmp_path):
    rows = [{"a": "x'\"", "b": [1, 2], "c": None, "d": {"e": True}}, {"a": "é", "d": {"f": 1.5}}]
    (tmp_path / "a.json").write_text("".join(f"{row!r}\n" for row in rows))
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    literal, plain = open_literals(tmp_path / "a.json"), open_json_lines(tmp_path / "b.json")
    assert literal.read()[0].equals(plain.read()[0])
    assert literal.read(["a"])[0].equals(pl.DataFrame({"a": ["x'\"", "é"]}))
    assert literal.name.endswith("a.json")


def test_a_torn_line_of_mixed_types_is_located(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": [1]}\n{"x": {"y": 1}}\n{"x": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: .*is not JSON"):
        open_json_lines(path).read()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("NaN", "NaN, infinity"),
        ("-Infinity", "NaN, infinity"),
        ("1e999", "NaN, infinity"),
        ("nan", "Expecting value"),
    ],
)
def test_what_json_has_not_is_located(tmp_path, value, why):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n' * 3 + f'{{"x": {value}}}\n' + '{"x": 1}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line 4: .*is not JSON \(.*{why}.*\)\. Write one object a line"):
        open_json_lines(path).read()


def test_a_literal_that_json_cannot_hold_is_located(tmp_path):
    (tmp_path / "a.json").write_text("{'x': 1}\n{'x': 1e999}\n")
    with pytest.raises(DataError, match=r"a\.json, line 2: the literal holds what JSON cannot"):
        open_literals(tmp_path / "a.json")
