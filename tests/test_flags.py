"""Flags out of range and flags that nobody reads are named with their values; all others pass."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.exceptions import DataError
from llmrec.flags import check_ranges, check_read

NUMBERS = st.integers(-5, 5) | st.floats(allow_nan=True, allow_infinity=True)


@given(value=NUMBERS, lowest=st.integers(-2, 2), width=st.integers(0, 3) | st.just(math.inf))
def test_a_number_passes_just_in_its_range(value: float, lowest: int, width: float) -> None:
    legal = math.isfinite(value) and value >= lowest and value <= lowest + width
    for given_value in (value, [lowest, value]):
        if legal:
            check_ranges({"a_b": given_value}, {"a_b": (lowest, lowest + width)})
        else:
            with pytest.raises(DataError) as raised:
                check_ranges({"a_b": given_value}, {"a_b": (lowest, lowest + width)})
            assert str(raised.value).startswith(f"--a-b is {given_value}, which is out of range. Give a number ")


def test_what_is_not_given_passes_and_an_empty_list_does_not() -> None:
    check_ranges({"a": None, "b": [2, 3], "c": 0}, {"a": (1, 2), "b": (1, 3)})
    with pytest.raises(DataError, match=r"^--b is \[\], which is out of range"):
        check_ranges({"b": []}, {"b": (1, math.inf)})
    for value in (math.inf, math.nan):
        with pytest.raises(DataError, match=f"^--b is {value}, which is out of range"):
            check_ranges({"b": value}, {"b": (1, math.inf)})


@given(
    value=st.integers(0, 2),
    default=st.integers(0, 2),
    chosen=st.sampled_from([None, "x", "y", "z"]),
    names=st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=2, unique=True),
)
def test_a_flag_passes_at_its_default_or_where_it_is_read(value, default, chosen, names) -> None:
    arguments = ({"a_b": value}, {"a_b": default}, {"a_b": ("--kind", names)}, {"--kind": chosen, "--other": "x"})
    if value == default or chosen in names:
        check_read(*arguments)
    else:
        message = f"--a-b {value} belongs to --kind {' or '.join(names)}, which here is {chosen or 'none'}. Leave it"
        with pytest.raises(DataError) as raised:
            check_read(*arguments)
        assert str(raised.value).startswith(message)
