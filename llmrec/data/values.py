"""Checking a column's values: what they are as ids, numbers or text, and the rows of which they are none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from llmrec.data.source import Source
from llmrec.exceptions import DataError

EXACT = 2**53  # the first whole number whose successor a float cannot hold
_SHOWN = 100


@dataclass(frozen=True)
class Fault:
    """Rows that cannot be used, for one reason.

    Attributes:
        column: what the file calls the column.
        values: the column as it was read.
        rows: (M,) booleans, True where a row is at fault.
        why: what is wrong, to follow "column is VALUE, ".
        advice: the sentence that says what to do.
    """

    column: str
    values: pl.Series
    rows: pl.Series
    why: str
    advice: str

    def found(self, source: Source) -> str:
        """The first such row, its value, what is wrong with it, and how many there are."""
        row = int(self.rows.arg_max() or 0)
        value = self.values[row]
        shown = "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
        return (
            f"{source.at(row, len(self.rows))}: {self.column} is {shown}, {self.why} ({self.rows.sum()} such row(s))"
        )

    def message(self, source: Source) -> str:
        """What was found, and the sentence that says what to do."""
        return f"{self.found(source)}. {self.advice}"


def refuse(faults: Sequence[Fault], source: Source) -> None:
    """Raises DataError for the first fault, if there is any."""
    for fault in faults:
        raise DataError(fault.message(source))


def check_ids(values: pl.Series, column: str, source: Source) -> tuple[pl.Series, list[Fault]]:
    """A column as strings, digits as they stand, and the faults of those that are no ids: null, empty, fractions.

    Whole floats and decimals are integers: 7.0 is the id 7.

    Raises:
        DataError: if no value of the column's type can be an id.
    """
    faults = []
    raw = values
    if values.dtype.is_float():
        # A column of whole numbers becomes float when a tool met a gap in it: 7.0 is the id 7.
        values = values.cast(pl.Float64).fill_nan(None)
        fractions = (values.is_infinite() | (values != values.floor())).fill_null(False)
        huge = (values.abs() >= EXACT).fill_null(False) & ~fractions
        faults.append(Fault(column, raw, fractions, "which is no id", "Write ids as text or integers."))
        faults.append(Fault(column, raw, huge, "too long for a float", "Write ids as text or integers."))
        values = values.set(fractions | huge, 0.0).cast(pl.Int64)
    elif values.dtype.is_decimal():
        values = decimal_text(values)
        fractions = values.str.contains(".", literal=True).fill_null(False)
        faults.append(Fault(column, raw, fractions, "which is no id", "Write ids as text or integers."))
    elif not (values.dtype.is_integer() or values.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(
            f"{source}: {column} holds {values.dtype}, which is no id. Write ids as text or integers, or remap the "
            "column."
        )
    ids = values.cast(pl.String)
    absent = ids.is_null() | (ids.str.strip_chars() == "").fill_null(True)
    faults.append(Fault(column, raw, absent, "which is no id", "Remove these rows or fill them in."))
    return ids, [fault for fault in faults if fault.rows.any()]


def decimal_text(values: pl.Series) -> pl.Series:
    """Decimals as text, of whatever length, without a fraction that is zero: 7.00 is "7"."""
    return values.cast(pl.String).str.replace(r"\.0*$", "")


def whole_floats(values: pl.Series) -> pl.Series:
    """Floats that are all whole, and exact, as Int64, with NaN as null; any other floats as they are."""
    known = values.fill_nan(None)
    whole = (known == known.floor()) & (known.abs() < EXACT)
    return known.cast(pl.Int64) if whole.fill_null(True).all() else values


def check_numbers(values: pl.Series, column: str, source: Source, advice: str) -> tuple[pl.Series, list[Fault]]:
    """A column as Int64, or Float64 if it holds fractions; an empty value or NaN is null, what is no number a fault.

    Raises:
        DataError: if no value of the column's type can be a number.
    """
    if values.dtype == pl.String:
        text = values.str.strip_chars().replace("", None)
        numbers = text.cast(pl.Int64, strict=False)
        if numbers.null_count() > text.null_count():
            numbers = text.cast(pl.Float64, strict=False)
        wrong = numbers.is_null() & text.is_not_null()
    elif values.dtype.is_numeric() or values.dtype == pl.Null:
        exact = values.dtype.is_integer() or values.dtype == pl.Null
        numbers = values.cast(pl.Int64 if exact else pl.Float64, strict=False)
        wrong = numbers.is_null() & values.is_not_null()
    else:
        raise DataError(f"{source}: {column} holds {values.dtype}, which is no number. {advice}")
    if numbers.dtype.is_float():
        numbers = numbers.fill_nan(None)
        wrong |= numbers.is_infinite().fill_null(False)
        numbers = numbers.set(wrong, None)
        whole = ((numbers == numbers.floor()) & (numbers.abs() < EXACT)).fill_null(True).all()
        numbers = numbers.cast(pl.Int64) if whole else numbers
    faults = [Fault(column, values, wrong, "which is no number", advice)] if wrong.any() else []
    return numbers, faults


def check_words(values: pl.Series, column: str, source: Source) -> pl.Series:
    """A column of categories as strings; an empty one is null.

    Raises:
        DataError: if it holds what has no plain text, such as lists.
    """
    if values.dtype.is_nested() or values.dtype in (pl.Binary, pl.Object):
        raise DataError(
            f"{source}: {column} holds {values.dtype}, which is no plain text. Remap the column to another."
        )
    words = values.cast(pl.String).str.strip_chars()
    return words.set(words == "", None)
