"""Times of a log in any unit, as unix seconds: the unit is found or given, and what is no time is told apart."""

import logging
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import polars as pl

from llmrec.data.source import Source
from llmrec.data.values import Fault, check_numbers
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

TimestampUnit = Literal["auto", "s", "ms", "us", "ns", "iso", "order"]

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_NAMES = {
    "s": "seconds since 1970",
    "ms": "milliseconds since 1970",
    "us": "microseconds since 1970",
    "ns": "nanoseconds since 1970",
    "iso": "dates (UTC where no zone is written)",
}
_YEAR = 31_536_000
_DAY = 86_400
_FIRST_REAL = 315_532_800  # 1980-01-01: smaller numbers alone are no clock, but an order
_FIRST_USUAL = 631_152_000  # 1990-01-01: no log of a shop or a site is older
_ADVICE = "Write unix seconds or ISO 8601, name the unit with --timestamp-unit, or drop them with --invalid-rows drop."
_OFFSET = r"(?:[zZ]|[+-]\d{2}:?\d{2})$"
# What ISO 8601 and databases write beside the forms that polars reads, and those forms.
_FORMS = (
    (r"\s*(?:UTC|GMT)$", "Z"),
    (r"^(\d{4})(\d{2})(\d{2})[T\s]", "${1}-${2}-${3}T"),
    (r"T(\d{2})(\d{2})(\d{2})", "T${1}:${2}:${3}"),
    (r"T(\d{2})(\d{2})([zZ+\-\s]|$)", "T${1}:${2}${3}"),
    (r"T(\d{2})([zZ+\-\s]|$)", "T${1}:00${2}"),
    (r"(T\d{2}:\d{2}:\d{2}),(\d)", "${1}.${2}"),
    (r"^(\S+T\S+)\s+([zZ+\-])", "${1}${2}"),
    (r"(T.*[+-]\d{2})$", "${1}:00"),
)


@dataclass(frozen=True)
class Times:
    """A column of times.

    Attributes:
        seconds: (M,) unix seconds, Int64 or, with fractions, Float64; null where unknown. For "order" the raw numbers.
        order: (M,) the raw numbers, by which rows are sorted: a float of seconds would lose nanoseconds.
        unit: "s", "ms", "us", "ns", "iso" or "order".
    """

    seconds: pl.Series
    order: pl.Series
    unit: str


def check_times(
    values: pl.Series, column: str, source: Source, unit: TimestampUnit = "auto", now: float | None = None
) -> tuple[Times, list[Fault]]:
    """Reads a column of times, says in one sentence (INFO) what they were taken for, and finds those that are none.

    Dates and text in ISO 8601 are recognised by type and form, and whole columns of YYYYMMDD; numbers by size. Numbers
    that all lie below 1980 as seconds are no clock: they are an order, kept as they are. Else the median of the others
    tells the unit: real times of two units are never of one size.

    An empty value is an unknown time, and allowed. Faults are:

    * text that is neither a number nor ISO 8601, and infinity;
    * negative numbers;
    * times in 1970, if the log has real ones: an empty field that became 0, or a value of a larger unit among smaller;
    * times later than a year from tomorrow: a clock gone wrong, or a value of a smaller unit among larger.

    Times from 1971 to 1989 are odd, but may be true (an archive). They are kept, and counted in a warning.

    Args:
        values: numbers, text, or dates.
        column: what the file calls them.
        source: where they come from, for messages.
        unit: the unit, if it is known. "order" takes any numbers, as they are.
        now: unix seconds of the present; by default the clock's.

    Raises:
        DataError: if no value of the column's type can be a time, or none has the unit that was given.
    """
    if unit not in ("auto", "order", *_NAMES):
        raise DataError(f"There is no unit of time {unit!r}. Give auto, order, {', '.join(_NAMES)}.")
    now = time.time() if now is None else now
    if unit != "order" and (
        unit == "iso" or values.dtype in (pl.Date, pl.Datetime) or _reads_like_dates(values, unit)
    ):
        return _dates(values, column, source, now)
    numbers, faults = check_numbers(values, column, source, _ADVICE)
    if unit == "order":
        return Times(numbers, numbers, "order"), faults
    negative = (numbers < 0).fill_null(False)
    if negative.any():
        faults.append(Fault(column, values, negative, "which is negative, and no time", _ADVICE))
        numbers = numbers.set(negative, None)
    if unit == "auto":
        unit = _unit_of(numbers)
    if unit == "iso":
        days, more = _dates(numbers.cast(pl.String), column, source, now)
        return days, faults + more
    if unit == "order":
        if numbers.null_count() < len(numbers):
            logger.info(
                "%s: column %r is taken as an order, because its numbers (%s to %s) are no unix times",
                *(source, column, numbers.min(), numbers.max()),
            )
        return Times(numbers, numbers, unit), faults
    return _judged(Times(_as_seconds(numbers, _PER_SECOND[unit]), numbers, unit), values, column, source, now, faults)


def _unit_of(numbers: pl.Series) -> TimestampUnit:
    """The unit of numbers that are not negative."""
    real = numbers.filter(numbers >= _FIRST_REAL)
    if not len(real):
        if numbers.dtype.is_integer() and numbers.null_count() < len(numbers) and _are_calendar_days(numbers):
            return "iso"
        return "order"
    middle = real.median()
    assert isinstance(middle, float)
    # A unit begins where it shows 1980; what lies below as seconds is 1e11, the year 5138.
    for unit in ("ns", "us", "ms"):
        if middle >= _FIRST_REAL * _PER_SECOND[unit]:
            return unit
    return "s"


def _are_calendar_days(numbers: pl.Series) -> bool:
    present = numbers.drop_nulls()
    if not present.is_between(19_710_101, 20_991_231).all():
        return False
    return present.cast(pl.String).str.to_date("%Y%m%d", strict=False).null_count() == 0


def _reads_like_dates(values: pl.Series, unit: TimestampUnit) -> bool:
    """Whether text is dates more often than numbers."""
    if unit != "auto" or values.dtype != pl.String:
        return False
    text = values.str.strip_chars().replace("", None).drop_nulls()
    others = text.filter(text.cast(pl.Float64, strict=False).is_null())
    dates = len(others) - _parsed(others).null_count()
    return dates > len(text) - len(others)


def _parsed(text: pl.Series) -> pl.Series:
    """ISO 8601 as microseconds since 1970 (Int64), null where it is none; without a zone it is UTC."""
    text = text.str.strip_chars().str.replace(r"^(\d{4}-\d{2}-\d{2})\s+", "${1}T")
    micros = _parsed_forms(text)
    # Rare forms are rewritten as frequent ones, which costs the others nothing.
    rest = (micros.is_null() & text.is_not_null()).arg_true()
    if not len(rest):
        return micros
    rewritten = text.gather(rest)
    for pattern, form in _FORMS:
        rewritten = rewritten.str.replace(pattern, form)
    return micros.scatter(rest, _parsed_forms(rewritten))


def _parsed_forms(text: pl.Series) -> pl.Series:
    moments = pl.col("text").str
    zoned = pl.col("text").str.contains(r"T.*" + _OFFSET)
    aware = pl.when(zoned).then(pl.col("text").str.replace(r"([+-]\d{2})(\d{2})$", "${1}:${2}"))
    found = pl.coalesce(
        *(
            moments.to_datetime(form, strict=False, time_unit="us").dt.epoch("us")
            for form in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y%m%d", "%Y%m%dT%H%M%S")
        ),
        *(
            aware.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC").dt.epoch("us")
            for form in ("%+", "%Y-%m-%dT%H:%M%#z")
        ),
    )
    return pl.DataFrame({"text": text}).select(found.alias("micros"))["micros"]


def _dates(values: pl.Series, column: str, source: Source, now: float) -> tuple[Times, list[Fault]]:
    faults = []
    per_second = _PER_SECOND["us"]
    if values.dtype == pl.Date:
        raw = values.to_physical().cast(pl.Int64)
        seconds = raw * _DAY
    elif isinstance(values.dtype, pl.Datetime):
        raw = values.to_physical()
        seconds = _as_seconds(raw, _PER_SECOND[values.dtype.time_unit])
    else:
        if values.dtype != pl.String:
            if not values.dtype.is_integer():
                raise DataError(f"{source}: {column} holds {values.dtype}, which is no date. {_ADVICE}")
            values = values.cast(pl.String)
        text = values.str.strip_chars().replace("", None)
        raw = _parsed(text)
        wrong = raw.is_null() & text.is_not_null()
        if wrong.any():
            number = re.fullmatch(r"[-+]?\d+(\.\d+)?", str(text.filter(wrong)[0]))
            mixed = number is not None and raw.null_count() < len(raw)
            why = "a number among dates: the units are mixed" if mixed else "which is no ISO 8601 date"
            faults.append(Fault(column, values, wrong, why, _ADVICE))
        seconds = _as_seconds(raw, per_second)
    return _judged(Times(seconds, raw, "iso"), values, column, source, now, faults)


def _as_seconds(numbers: pl.Series, per_second: int) -> pl.Series:
    if per_second == 1:
        return numbers
    if numbers.dtype.is_integer() and (numbers % per_second == 0).fill_null(True).all():
        return numbers // per_second
    return numbers / per_second


def _judged(
    times: Times, values: pl.Series, column: str, source: Source, now: float, faults: list[Fault]
) -> tuple[Times, list[Fault]]:
    """Adds the times that cannot be to the faults, warns of odd ones, and says what the column was taken for."""
    seconds = times.seconds
    latest = now + _DAY + _YEAR
    early = (seconds < _YEAR).fill_null(False)
    late = (seconds > latest).fill_null(False)
    for rows, why in ((early, "which is no later than 1970"), (late, "which is more than a year from now")):
        if rows.any():
            faults.append(Fault(column, values, rows, why + _other_unit(times, rows, latest), _ADVICE))
    sound = seconds.filter(~(early | late)).drop_nulls()
    if len(sound):
        logger.info(
            "%s: column %r is taken as %s, from %s to %s",
            *(source, column, _NAMES[times.unit], _day(sound.min()), _day(sound.max())),
        )
    odd = (seconds.is_between(_YEAR, _FIRST_USUAL, closed="left")).fill_null(False)
    if odd.any():
        row = int(odd.arg_max() or 0)
        logger.warning(
            "%d row(s) lie before 1990, such as %s (%s is %r); they are kept",
            *(odd.sum(), source.at(row, len(odd)), column, values[row]),
        )
    return times, faults


def _other_unit(times: Times, rows: pl.Series, latest: float) -> str:
    """Words for a value that would be a real time in another unit than its column's, which then mixes two."""
    if times.unit not in _PER_SECOND:
        return ""
    value = times.order.filter(rows)[0]
    fits = [unit for unit, per_second in _PER_SECOND.items() if _FIRST_USUAL <= value / per_second <= latest]
    if not fits:
        return f" in {times.unit}"
    return f" in {times.unit}, but a time in {fits[0]}: the units are mixed"


def _day(seconds: object) -> str:
    assert isinstance(seconds, int | float)
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
