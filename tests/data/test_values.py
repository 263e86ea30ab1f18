import math
from decimal import Decimal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.source import Source
from llmrec.data.values import check_ids, check_numbers, check_words, refuse, whole_floats
from llmrec.exceptions import DataError

LOG = Source("the log")


def test_ids_of_every_type():
    for values in (["7", "08"], pl.Series(["7", "08"], dtype=pl.Categorical)):
        ids, faults = check_ids(pl.Series(values), "id", LOG)
        assert (ids.to_list(), faults) == (["7", "08"], [])
    for dtype in (pl.Int64, pl.UInt8, pl.Float32, pl.Float64):
        ids, faults = check_ids(pl.Series([7, 8], dtype=dtype), "id", LOG)
        assert (ids.to_list(), faults) == (["7", "8"], [])
    with pytest.raises(DataError, match=r"the log: id holds List.*Write ids"):
        check_ids(pl.Series([["a"]]), "id", LOG)


@settings(deadline=None)
@given(
    st.lists(
        st.none() | st.floats() | st.integers(-(10**6), 10**6).map(float) | st.sampled_from([2.0**53 - 1, 2.0**53]),
        min_size=1,
    )
)
def test_float_ids_equal_their_definition(values):
    ids, faults = check_ids(pl.Series(values, dtype=pl.Float64), "id", LOG)
    wrong = [any(fault.rows[row] for fault in faults) for row in range(len(values))]
    for value, found, is_wrong in zip(values, ids.to_list(), wrong, strict=True):
        sound = value is not None and math.isfinite(value) and value == int(value) and abs(value) < 2**53
        assert is_wrong == (not sound)
        if sound:
            assert found == str(int(value))


@settings(deadline=None)
@given(st.lists(st.none() | st.text(" \tab", max_size=3), min_size=1))
def test_absent_ids_are_counted(values):
    _, faults = check_ids(pl.Series(values, dtype=pl.String), "id", LOG)
    absent = [row for row, value in enumerate(values) if value is None or not value.strip()]
    assert [fault.rows.arg_true().to_list() for fault in faults] == ([absent] if absent else [])
    if absent:
        message = f"the log, row {absent[0] + 1} of {len(values)}: id is "
        with pytest.raises(DataError) as caught:
            refuse(faults, LOG)
        assert str(caught.value).startswith(message)
        assert f"({len(absent)} such row(s)). Remove" in str(caught.value)


def test_ids_too_long_for_a_float():
    _, faults = check_ids(pl.Series([1.0, 1.2e19, float("nan")]), "id", LOG)
    assert [fault.found(LOG) for fault in faults] == [
        "the log, row 2 of 3: id is 1.2e+19, too long for a float (1 such row(s))",
        "the log, row 3 of 3: id is NaN, which is no id (1 such row(s))",
    ]


def test_numbers_stay_exact_where_they_can():
    numbers, faults = check_numbers(pl.Series(["1", " 2 ", "", None, str(2**62 + 1)]), "n", LOG, "Advice.")
    assert (numbers.to_list(), faults) == ([1, 2, None, None, 2**62 + 1], [])
    numbers, _ = check_numbers(pl.Series([1.0, float("nan"), 3.0]), "n", LOG, "Advice.")
    assert (numbers.dtype, numbers.to_list()) == (pl.Int64, [1, None, 3])
    numbers, faults = check_numbers(pl.Series(["1.5", "x", "inf", "nan"]), "n", LOG, "Advice.")
    assert numbers.to_list() == [1.5, None, None, None]
    assert [fault.message(LOG) for fault in faults] == [
        "the log, row 2 of 4: n is 'x', which is no number (2 such row(s)). Advice."
    ]
    _, faults = check_numbers(pl.Series([1, 2**64 - 1], dtype=pl.UInt64), "n", LOG, "Advice.")
    assert faults[0].rows.to_list() == [False, True]


def test_words():
    assert check_words(pl.Series([" view ", "", None]), "a", LOG).to_list() == ["view", None, None]
    assert check_words(pl.Series([1, 2]), "a", LOG).to_list() == ["1", "2"]
    with pytest.raises(DataError, match="a holds List"):
        check_words(pl.Series([["view"]]), "a", LOG)


def test_a_long_value_is_cut_in_messages():
    _, faults = check_numbers(pl.Series(["x" * 5000]), "n", LOG, "Advice.")
    assert len(faults[0].message(LOG)) < 300


@settings(deadline=None)
@given(st.lists(st.none() | st.decimals(-(10**30), 10**30, places=2) | st.integers(-(10**30), 10**30), min_size=1))
def test_decimal_ids_equal_their_definition(values):
    column = pl.Series([None if value is None else Decimal(value) for value in values], dtype=pl.Decimal(38, 2))
    ids, faults = check_ids(column, "id", LOG)
    wrong = [any(fault.rows[row] for fault in faults) for row in range(len(values))]
    for value, found, is_wrong in zip(values, ids.to_list(), wrong, strict=True):
        sound = value is not None and value == int(value)
        assert is_wrong == (not sound)
        if sound:
            assert found == str(int(value))


def test_decimals_that_are_no_ids_are_shown():
    assert check_ids(pl.Series([7, 10]).cast(pl.Decimal(20, 0)), "id", LOG)[0].to_list() == ["7", "10"]
    _, faults = check_ids(pl.Series(["7.00", "7.50"]).cast(pl.Decimal(20, 2)), "id", LOG)
    assert [fault.found(LOG) for fault in faults] == [
        "the log, row 2 of 2: id is Decimal('7.50'), which is no id (1 such row(s))"
    ]


def test_nan_and_null_are_told_apart():
    for values, shown in (([1.0, float("nan")], "NaN"), ([1.0, None], "None")):
        _, faults = check_ids(pl.Series(values), "id", LOG)
        assert faults[0].found(LOG) == f"the log, row 2 of 2: id is {shown}, which is no id (1 such row(s))"


@settings(deadline=None)
@given(st.lists(st.none() | st.floats() | st.integers(-9, 9).map(float), min_size=1, max_size=4))
def test_floats_become_integers_where_all_are_whole(values):
    found = whole_floats(pl.Series(values, dtype=pl.Float64))
    known = [None if value is None or math.isnan(value) else value for value in values]
    if all(value is None or (math.isfinite(value) and value == int(value) and abs(value) < 2**53) for value in known):
        assert (found.dtype, found.to_list()) == (pl.Int64, known)
    else:
        assert found.equals(pl.Series(values, dtype=pl.Float64))
